"""Connections in every state move between hosts (tests/cells.py).

Each state with each of its queues, and with each family; not every queue with every family: that is the whole table,
by ``make campaign`` and ``python -m tests.states``.
"""

import itertools

import pytest

from tests.cells import CELLS, FAMILIES, Case, name_of, net_for_cells, run


def _sample():
    for at, case in enumerate(Case):
        queues = [q for c, f, q in CELLS if (c, f) == (case, next(iter(FAMILIES)))]
        families = list(FAMILIES)[at % 3 :] + list(FAMILIES)[: at % 3]
        pairs = zip(itertools.cycle(families), itertools.cycle(queues), range(max(len(queues), 3)), strict=False)
        yield from ((case, family, queue) for family, queue, _ in pairs)


SAMPLE = list(_sample())


def test_no_state_queue_or_family_is_left_out():
    assert {(case, queue) for case, _, queue in SAMPLE} == {(case, queue) for case, _, queue in CELLS}
    assert {(case, family) for case, family, _ in SAMPLE} == {(case, family) for case, family, _ in CELLS}
    assert set(SAMPLE) <= set(CELLS)


@pytest.fixture(scope="module")
def hosts():
    with net_for_cells() as made:
        yield made


@pytest.mark.parametrize("cell", SAMPLE, ids=name_of)
def test_a_connection_in_this_state_moves(hosts, cell):
    run(hosts, *cell)
