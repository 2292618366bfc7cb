"""The keys by which held connections and listeners are looked up."""

from __future__ import annotations

import socket

import pytest

from tcpstate.connid import ConnId
from tcpstate.kernel.nftables import KeyType, SetKey
from tcpstate.uses.hold import ListeningEnd, _connection_key, _listener_keys


def test_a_connection_is_looked_up_as_its_packets_come() -> None:
    key = _connection_key(ConnId.tcp("10.0.0.5", 80, "10.0.0.9", 1234))
    # source first: the peer
    assert key == bytes([10, 0, 0, 9, 0x04, 0xD2, 0, 0, 10, 0, 0, 5, 0, 80, 0, 0])
    assert len(key) == SetKey((KeyType.IPV4_ADDRESS, KeyType.SERVICE, KeyType.IPV4_ADDRESS, KeyType.SERVICE)).size


def test_the_scope_of_a_link_local_address_is_not_in_its_packets() -> None:
    key = _connection_key(ConnId.tcp("fe80::1%lo", 80, "fe80::2%lo", 1234))
    assert key[:16] == socket.inet_pton(socket.AF_INET6, "fe80::2")
    assert len(key) == 40


@pytest.mark.parametrize(
    ("end", "sets"),
    [
        (ListeningEnd("10.0.0.5", 80), ["listeners4"]),
        (ListeningEnd("fd00::5", 80), ["listeners6"]),
        (ListeningEnd("0.0.0.0", 80), ["ports4"]),
        (ListeningEnd("::", 80, both=True), ["ports6", "ports4"]),
        (ListeningEnd("::", 80), ["ports6"]),
    ],
)
def test_a_listener_is_where_its_syns_come(end: ListeningEnd, sets: list[str]) -> None:
    assert [name for name, _ in _listener_keys(end)] == sets


def test_types_are_told_as_nft_tells_them() -> None:
    assert SetKey((KeyType.IPV4_ADDRESS, KeyType.SERVICE)).type == 7 << 6 | 13
