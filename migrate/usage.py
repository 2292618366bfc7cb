"""Who uses an address of this host: sockets bound or connected on it, and the processes that hold them.

Read before the stop from /proc/net of the calling thread's network namespace and /proc/PID/fd; nothing is touched.
Source: proc(5), net/ipv4/tcp_ipv4.c get_tcp4_sock, net/ipv6/udp.c.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import sys
import time
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

from tcpstate.locate import owners_of
from tcpstate.slotted import dataclass

__all__ = ["AddressUser", "descendants", "held_by", "parse_socket_table", "users_of"]

_TABLES = ("tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6", "icmp", "icmp6")
_NET = Path("/proc/thread-self/net")
#: how often, and after how many seconds, it is looked again for the holder of a socket that seems to have none
_LOOKS = 3
_BETWEEN_LOOKS = 0.005


@dataclass(frozen=True, slots=True)
class AddressUser:
    """A socket whose local address is one of those asked for.

    protocol  ``tcp``, ``udp``, ``raw``, ``icmp``
    address, port  its local end
    peer      other end as text, or empty
    inode     of the socket; never 0
    pids      the processes that hold it, as far as /proc shows them
    """

    protocol: str
    address: str
    port: int
    peer: str
    inode: int
    pids: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"
        return f"{self.protocol} {where}" + (f" to {self.peer}" if self.peer else "")


def parse_socket_table(protocol: str, text: str) -> list[AddressUser]:
    """The sockets in a table of /proc/net that have an owner (an inode) and a local address."""
    found = []
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 10:
            raise ValueError(f"a line of /proc/net/{protocol} has {len(fields)} fields")
        inode = int(fields[9])
        # TIME_WAIT, half-open and orphaned sockets belong to nobody, connections not accepted yet to their listener
        if inode == 0:
            continue
        address, port = _end(fields[1])
        peer, peer_port = _end(fields[2])
        if address.is_unspecified:
            continue
        other = "" if peer.is_unspecified else (f"[{peer}]:{peer_port}" if peer.version == 6 else f"{peer}:{peer_port}")
        found.append(AddressUser(protocol.rstrip("6"), str(address), port, other, inode))
    return found


def users_of(addresses: Collection[str], outside: Collection[int]) -> list[AddressUser]:
    """The sockets on ``addresses`` that are held by a process that is not one of ``outside`` (the moving tree).

    A socket that the tree shares with another process counts: the other one would lose the address. One whose holder
    /proc does not show belongs to another PID namespace, and counts too.
    """
    found = _foreign(addresses, outside)
    for _ in range(_LOOKS):
        # A socket that was closed between our two looks has no holder either: only what stays hidden counts.
        if all(user.pids for user in found):
            break
        time.sleep(_BETWEEN_LOOKS)
        again = {user.inode: user for user in _foreign(addresses, outside)}
        found = [again[user.inode] for user in found if user.inode in again]
    return found


def _foreign(addresses: Collection[str], outside: Collection[int]) -> list[AddressUser]:
    found = [user for user in _sockets() if user.address in addresses]
    holders = owners_of({user.inode for user in found}) if found else {}
    named = [replace(u, pids=tuple(sorted({o.pid for o in holders.get(u.inode, ())}))) for u in found]
    return [u for u in named if not u.pids or not set(u.pids) <= set(outside)]


def held_by(pids: Collection[int]) -> list[AddressUser]:
    """The sockets with a local address that one of ``pids`` has."""
    inodes = owners_of(pids=pids)
    return [user for user in _sockets() if user.inode in inodes]


def _sockets() -> list[AddressUser]:
    return [
        user
        for protocol in _TABLES
        if (_NET / protocol).exists()
        for user in parse_socket_table(protocol, (_NET / protocol).read_text())
    ]


def descendants(pid: int) -> set[int]:
    """``pid`` and the processes below it, at this moment."""
    found: set[int] = set()
    todo = [pid]
    while todo:
        one = todo.pop()
        if one in found:
            continue
        found.add(one)
        todo += _children(one)
    return found


def _children(pid: int) -> Iterable[int]:
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    except OSError:
        # ended meanwhile: it has no children any more
        return []
    return found


def _end(text: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    """An address and port of /proc/net: the address is in words of the machine's byte order."""
    words, port = text.split(":")
    return _address(words), int(port, 16)


# thousands of connections have few addresses
@functools.lru_cache(maxsize=4096)
def _address(words: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    packed = b"".join(int(words[i : i + 8], 16).to_bytes(4, _BYTE_ORDER) for i in range(0, len(words), 8))
    address = ipaddress.ip_address(packed)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


_BYTE_ORDER = sys.byteorder
