"""docs/reference/states.md holds the table that `python -m tests.states` writes: every cell, and all of them moved."""

from tests.states import BEGIN, END, PAGE, head, rows


def test_the_table_has_every_cell_and_none_failed():
    table = PAGE.read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()
    assert table[2:] == [f"{head(case, queues)} moved | moved | moved |" for case, queues in rows()]
