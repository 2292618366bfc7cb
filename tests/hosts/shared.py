"""Fixtures for modules whose tests share their hosts: import ``hosts`` and ``at_home`` into the module.

What a test leaves on a host (processes, files, units) it takes away itself; the addresses of the service are put back.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hosts.net import ThreeHosts, three_hosts

__all__ = ["at_home", "hosts"]


@pytest.fixture(scope="module")
def hosts() -> Iterator[ThreeHosts]:
    """The same for all tests of a module."""
    with three_hosts() as three:
        yield three


@pytest.fixture(autouse=True)
def at_home(hosts: ThreeHosts) -> Iterator[None]:
    """Whatever moved away in a test is back for the next one."""
    yield
    services = (hosts.net.service4, hosts.net.service6)
    moved = [each for each in hosts.target.addresses() if each.partition("/")[0] in services]
    for each in moved:
        hosts.target.remove_address(each)
        hosts.source.add_address(each)
    if moved:
        # nobody announces that
        hosts.client.ip("neigh flush all")
