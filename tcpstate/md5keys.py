"""TCP MD5 signatures (RFC 2385): keys kept, and our own segments signed. BGP lives by it.

A socket has keys for peers, or for prefixes of peers; segments to and from such a peer must be signed.  sock_diag shows
the keys to who has CAP_NET_ADMIN; they are set before connect(), in repair, and a listener's apply to the connections
that it accepts.

Keys are secrets: no message, log, comparison or listing of ours contains one.  Records do, as they contain what the
application had in its queues; images are readable by their owner only.

Source: net/ipv4/tcp_ipv4.c tcp_v4_parse_md5_keys, tcp_v4_md5_hash_skb; net/ipv4/tcp_diag.c tcp_diag_put_md5sig.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Final

from tcpstate.connid import canonical_address
from tcpstate.errors import KeysNotRestored
from tcpstate.kernel import diag, md5sig
from tcpstate.kernel.bpf.signed import nobody_signs
from tcpstate.kernel.sockets import Level, is_v6, pack_address
from tcpstate.kernel.tcp import TCP, TcpState
from tcpstate.segment import Segment, build
from tcpstate.slotted import dataclass

__all__ = ["SigningKey", "all_keys", "give_keys", "key_for", "keys_of", "listeners_keys", "signed", "supported"]

_NO_ROOM: Final = bytes((1, 1, md5sig.OPTION_KIND, 18)) + bytes(16)
_IP_HEADER: Final = {False: 20, True: 40}
_TCP_HEADER: Final = 20
_CHECKSUM: Final = slice(16, 18)
_PROTOCOL_TCP: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningKey:
    """One key of a socket.

    address  the peer, or the network of peers; IPv4 addresses of IPv6 sockets in IPv4 form
    prefix   length of the network's prefix, bits
    secret   the key; not shown

    Raises ValueError for what no kernel takes.
    """

    address: str
    prefix: int
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if canonical_address(self.address) != self.address or "%" in self.address:
            raise ValueError(f"{self.address!r} is not an address in canonical form")
        if not 0 <= self.prefix <= (128 if is_v6(self.address) else 32):
            raise ValueError(f"a prefix of {self.prefix} bits is impossible")
        if not 0 < len(self.secret) <= md5sig.KEY_MAX:
            raise ValueError(f"a key of {len(self.secret)} bytes is impossible")

    def covers(self, address: str) -> bool:
        """Whether it is for this peer."""
        bare = address.partition("%")[0]
        return is_v6(bare) == is_v6(self.address) and ipaddress.ip_address(bare) in self.network

    @property
    def network(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        """The peers."""
        return ipaddress.ip_network(f"{self.address}/{self.prefix}", strict=False)


@functools.cache
def supported() -> bool:
    """Whether this kernel has signatures at all (CONFIG_TCP_MD5SIG)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        try:
            sock.setsockopt(Level.TCP, TCP.MD5SIG, b"")
        except OSError as error:
            # EINVAL: it is too short
            return error.errno != errno.ENOPROTOOPT
    return True


def keys_of(
    socks: Sequence[socket.socket], known: Mapping[int, tuple[SigningKey, ...]] | None = None
) -> list[tuple[SigningKey, ...]]:
    """The keys of each socket that connects, is connected or listens. One pass over the network namespace's sockets,
    unless ``known`` is what :func:`all_keys` said since their owners stopped.

    OSError; () for all without CAP_NET_ADMIN."""
    found = all_keys() if known is None else known
    if not found:
        return [()] * len(socks)
    return [found.get(os.fstat(s.fileno()).st_ino, ()) for s in socks]


def all_keys() -> dict[int, tuple[SigningKey, ...]]:
    """The keys of all sockets of the calling thread's network namespace that have some, by inode. OSError."""
    return {} if not supported() or nobody_signs() else _told(diag.md5_keys())


def listeners_keys() -> dict[int, tuple[SigningKey, ...]]:
    """:func:`all_keys` of those that listen: the kernel has them in a table of their own, and passes no connection.
    OSError."""
    return _told(diag.md5_keys(1 << TcpState.LISTEN)) if supported() else {}


def _told(found: Mapping[int, Sequence[tuple[int, str, int, bytes]]]) -> dict[int, tuple[SigningKey, ...]]:
    return {
        inode: tuple(SigningKey(address=a, prefix=p, secret=k) for _, a, p, k in keys) for inode, keys in found.items()
    }


def give_keys(sock: socket.socket, keys: Sequence[SigningKey], name: str) -> None:
    """Set a socket's keys, before it connects or listens. KeysNotRestored; ``name``: what to call it."""
    for key in keys:
        address = pack_address(key.address, 0, family=sock.family)
        try:
            sock.setsockopt(Level.TCP, TCP.MD5SIG_EXT, md5sig.pack(address, key.prefix, key.secret))
        except OSError as error:
            raise KeysNotRestored(f"setting a key for {key.network}: {error.strerror}", object=name) from None


def key_for(keys: Sequence[SigningKey], peer: str) -> SigningKey | None:
    """The key for a peer: that of the longest prefix."""
    fitting = [key for key in keys if key.covers(peer)]
    return max(fitting, key=lambda key: key.prefix) if fitting else None


def signed(segment: Segment, keys: Sequence[SigningKey]) -> Segment:
    """A segment of the peer as the owner of ``keys`` expects it: signed, if there is a key for the peer."""
    key = key_for(keys, segment.source)
    if key is None:
        return segment
    with_room = replace(segment, options=segment.options + _NO_ROOM)
    return replace(with_room, options=with_room.options[:-16] + _digest(with_room, key.secret))


def _digest(segment: Segment, secret: bytes) -> bytes:
    v6 = is_v6(segment.source)
    packet = build(segment)
    tcp = packet[_IP_HEADER[v6] :]
    family = socket.AF_INET6 if v6 else socket.AF_INET
    ends = socket.inet_pton(family, segment.source) + socket.inet_pton(family, segment.destination)
    if v6:
        pseudo = ends + len(tcp).to_bytes(4, "big") + _PROTOCOL_TCP.to_bytes(4, "big")
    else:
        pseudo = ends + _PROTOCOL_TCP.to_bytes(2, "big") + len(tcp).to_bytes(2, "big")
    header = bytearray(tcp[:_TCP_HEADER])
    header[_CHECKSUM] = bytes(2)
    # the options are not covered
    return hashlib.md5(pseudo + header + segment.payload + secret, usedforsecurity=False).digest()
