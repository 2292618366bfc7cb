"""The hosts of these tests, and connections to be moved between them."""

import pytest

from tcpstate.silence import Blackhole
from tests.kernel.tcp_rebuild.moved import FAMILIES, Move
from tests.tscnet import net


@pytest.fixture(scope="module")
def hosts():
    with net() as made:
        for host in made.hosts:
            with host:
                Blackhole().ensure()
        yield made


@pytest.fixture(params=FAMILIES)
def move(request, hosts):
    made = Move(hosts, request.param)
    yield made
    made.end()


@pytest.fixture
def move4(hosts):
    made = Move(hosts, "IPv4")
    yield made
    made.end()
