"""What Linux does with addresses and routes when one is added or removed. Each test is one assumption of migrate."""

from __future__ import annotations

import json
import time

import pytest

from migrate.addresses import AddressRecord, add_body, delete_body
from migrate.arrival import resolving
from migrate.rtnetlink import Netlink
from tcpstate.kernel.netlink import Request
from tcpstate.kernel.rtnetlink import AddressFlag, MessageType
from tests.system.test_takeover import Host, hosts

__all__ = ["hosts"]

ADD = Request.CREATE | Request.EXCLUSIVE
Hosts = tuple[Host, Host, Host]


def record(address: str, length: int) -> AddressRecord:
    return AddressRecord(address=address, prefixlen=length, interface="eth0")


def index(host: Host) -> int:
    return int(json.loads(host.ip("-j link show eth0"))[0]["ifindex"])


@pytest.mark.parametrize(("promote", "left"), [(0, False), (1, True)])
def test_deleting_a_primary_deletes_its_secondaries_unless_they_are_promoted(
    hosts: Hosts, promote: int, left: bool
) -> None:
    a, _, _ = hosts
    a.sysctl("net.ipv4.conf.eth0.promote_secondaries", promote)
    a.ip("addr add 10.95.0.1/24 dev eth0")
    a.ip("addr add 10.95.0.2/24 dev eth0")
    a.ip("addr del 10.95.0.1/24 dev eth0")
    assert ("10.95.0.2" in a.ip("addr show dev eth0")) == left


def test_an_error_in_a_batch_does_not_stop_what_follows(hosts: Hosts) -> None:
    a, _, _ = hosts
    with a.inside(), Netlink() as netlink:
        there, absent, new = record("10.94.0.1", 24), record("10.95.0.9", 24), record("10.95.0.1", 24)
        errors = netlink.change(
            [
                (MessageType.NEWADDR, ADD, add_body(there, index(a), 0)),
                (MessageType.DELADDR, Request(0), delete_body(absent, index(a))),
                (MessageType.NEWADDR, ADD, add_body(new, index(a), 0)),
            ]
        )
    assert [e.strerror.partition(":")[0] if e else None for e in errors] == [
        "File exists",
        "Cannot assign requested address",
        None,
    ]
    assert "10.95.0.1/24" in a.ip("addr")


def test_removing_a_source_address_deletes_ipv4_routes_and_strips_ipv6_ones(hosts: Hosts) -> None:
    a, _, _ = hosts
    a.ip("addr add 10.94.0.100/24 dev eth0")
    a.ip("addr add fd94::100/64 dev eth0 nodad")
    a.ip("route add 10.99.0.0/16 via 10.94.0.254 src 10.94.0.100")
    a.ip("-6 route add fd95::/48 via fd94::fe src fd94::100")
    a.ip("addr del 10.94.0.100/24 dev eth0")
    a.ip("addr del fd94::100/64 dev eth0")
    assert "10.99.0.0/16" not in a.ip("route")
    (left,) = (r for r in json.loads(a.ip("-6 -j route")) if r["dst"] == "fd95::/48")
    assert "prefsrc" not in left


def test_an_interface_without_addresses_loses_its_ipv4_routes(hosts: Hosts) -> None:
    a, _, _ = hosts
    a.ip("route add 10.99.0.0/16 dev eth0 scope link")
    a.ip("addr del 10.94.0.1/24 dev eth0")
    assert "10.99.0.0/16" not in a.ip("route")


def test_replacing_flags_of_an_ipv6_address_starts_no_duplicate_detection(hosts: Hosts) -> None:
    a, _, _ = hosts
    a.sysctl("net.ipv6.conf.eth0.accept_dad", 1)
    new = record("fd94::77", 64)
    with a.inside(), Netlink() as netlink:
        body = add_body(new, index(a), AddressFlag.NODAD)
        assert netlink.change([(MessageType.NEWADDR, ADD, body)]) == [None]
        body = add_body(new, index(a), 0)
        assert netlink.change([(MessageType.NEWADDR, Request.REPLACE, body)]) == [None]
    (found,) = (i for i in json.loads(a.ip("-j addr show dev eth0"))[0]["addr_info"] if i["local"] == "fd94::77")
    assert "tentative" not in found
    assert "nodad" not in found


def test_use_of_a_neighbour_resolves_it(hosts: Hosts) -> None:
    a, b, _ = hosts
    with a.inside(), Netlink() as netlink:
        assert netlink.change([resolving(index(a), "10.94.0.2")]) == [None]
    deadline = time.monotonic() + 2
    while a.neighbour("10.94.0.2") is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert a.neighbour("10.94.0.2") == b.mac()
