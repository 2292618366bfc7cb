"""Connections in every state move on this kernel, too: one cell of each state of the table (tests/cells.py)."""

import pytest

from tests.cells import CELLS, FAMILIES, Case, name_of, net_for_cells, run

SAMPLE = []
for at, case in enumerate(Case):
    of_case = [cell for cell in CELLS if cell[0] is case]
    # the fullest queues, and each family in turn
    family = list(FAMILIES)[at % len(FAMILIES)]
    SAMPLE.append(max((cell for cell in of_case if cell[1] == family), key=lambda cell: len(cell[2])))


@pytest.fixture(scope="module")
def hosts():
    with net_for_cells() as made:
        yield made


@pytest.mark.parametrize("cell", SAMPLE, ids=name_of)
def test_a_connection_in_this_state_moves(hosts, cell):
    run(hosts, *cell)
