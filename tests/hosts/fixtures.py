"""Fixtures: `net`, `source`, `target`, `client`, fresh for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hosts import Host, Net, ThreeHosts, three_hosts

__all__ = ["client", "hosts", "net", "source", "target"]


@pytest.fixture
def hosts() -> Iterator[ThreeHosts]:
    """Source, target and client on one bridge; the service address is on the source."""
    with three_hosts() as three:
        yield three


@pytest.fixture
def net(hosts: ThreeHosts) -> Net:
    """The bridge of the three hosts."""
    return hosts.net


@pytest.fixture
def source(hosts: ThreeHosts) -> Host:
    """The host where services start."""
    return hosts.source


@pytest.fixture
def target(hosts: ThreeHosts) -> Host:
    """The host that they move to."""
    return hosts.target


@pytest.fixture
def client(hosts: ThreeHosts) -> Host:
    """The host of the peers."""
    return hosts.client
