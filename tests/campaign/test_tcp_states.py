"""Every cell of the table state x family x queues (tests/cells.py); ``make test`` moves a sample of them."""

import pytest

from tcpstate.freeze import Blackhole
from tests.cells import CELLS, name_of, run
from tests.tscnet import net


@pytest.fixture(scope="module")
def hosts():
    with net() as made:
        for host in (made.a, made.b):
            with host:
                Blackhole().ensure()
        yield made


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_a_connection_in_this_state_moves(hosts, cell):
    run(hosts, *cell)
