"""The hosts of these tests, and connections to be moved between them."""

import pytest

from tests.kernel.tcp_rebuild.moved import FAMILIES, Move
from tests.tscnet import silent_net


@pytest.fixture(scope="module")
def hosts():
    with silent_net() as made:
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
