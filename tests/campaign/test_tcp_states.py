"""Every cell of the table state x family x queues (tests/cells.py); ``make test`` moves a sample of them."""

import pytest

from tests.cells import CELLS, name_of, net_for_cells, run


@pytest.fixture(scope="module")
def hosts():
    with net_for_cells() as made:
        yield made


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_a_connection_in_this_state_moves(hosts, cell):
    run(hosts, *cell)
