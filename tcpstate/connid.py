"""Conn-IDs: the name of a connection, ``tcp:LOCAL:PORT-PEER:PORT`` (paper, section 3)."""

from __future__ import annotations

import functools
import re
import socket
from typing import Self

from tcpstate.errors import ConnIdSyntax
from tcpstate.kernel.sockets import MAPPED_PREFIX, is_v6
from tcpstate.slotted import dataclass

__all__ = ["ConnId"]

_END = r"(?:\[(?P<{0}6>(?=[^\]]*:)[0-9A-Fa-f:.]+(?:%[^\]\s]+)?)\]|(?P<{0}4>[0-9.]+)):(?P<{0}p>[0-9]{{1,5}})"
_SYNTAX = re.compile(r"(?P<protocol>[a-z]+):" + _END.format("l") + "-" + _END.format("p"))
PORT_MAX = 0xFFFF


@functools.lru_cache(maxsize=4096)
def canonical_address(text: str) -> str:
    """The one spelling of an address: IPv6 as in RFC 5952, a v4-mapped one in IPv4 form. ValueError if it is none."""
    address, percent, scope = text.partition("%")
    try:
        if not is_v6(address):
            if percent:
                raise ValueError(f"{text!r}: an IPv4 address has no scope")
            return socket.inet_ntop(socket.AF_INET, socket.inet_pton(socket.AF_INET, address))
        raw = socket.inet_pton(socket.AF_INET6, address)
    except (OSError, UnicodeEncodeError):
        raise ValueError(f"{text!r} is not an IP address") from None
    if raw[:12] == MAPPED_PREFIX:
        return socket.inet_ntop(socket.AF_INET, raw[12:])
    return socket.inet_ntop(socket.AF_INET6, raw) + percent + scope


@dataclass(frozen=True, slots=True)
class ConnId:
    """One connection as its local end sees it.

    protocol           ``tcp``
    local, peer        addresses in canonical form; v4-mapped ones in IPv4 form; link-local IPv6 with ``%interface``
    local_port, peer_port  0 .. 65535

    Raises ValueError for anything else.
    """

    protocol: str
    local: str
    local_port: int
    peer: str
    peer_port: int

    def __post_init__(self) -> None:
        if self.protocol != "tcp":
            raise ValueError(f"protocol {self.protocol!r} is not tcp")
        for address in (self.local, self.peer):
            if canonical_address(address) != address:
                raise ValueError(f"{address!r} is not in canonical form")
        if is_v6(self.local) != is_v6(self.peer):
            raise ValueError("one end is IPv4, the other IPv6")
        for port in (self.local_port, self.peer_port):
            if not 0 <= port <= PORT_MAX:
                raise ValueError(f"port {port} is out of range")

    @classmethod
    def tcp(cls, local: str, local_port: int, peer: str, peer_port: int) -> Self:
        """Of addresses in any spelling."""
        return cls("tcp", canonical_address(local), local_port, canonical_address(peer), peer_port)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of its text form; :class:`~tcpstate.errors.ConnIdSyntax` if it is none."""
        match = _SYNTAX.fullmatch(text.strip())
        if match is None:
            raise ConnIdSyntax("this is not a conn-ID", object=text)
        part = match.groupdict()
        try:
            return cls(
                part["protocol"],
                canonical_address(part["l6"] or part["l4"]),
                int(part["lp"]),
                canonical_address(part["p6"] or part["p4"]),
                int(part["pp"]),
            )
        except ValueError as error:
            raise ConnIdSyntax(str(error), object=text) from None

    def __str__(self) -> str:
        return f"{self.protocol}:{_end(self.local, self.local_port)}-{_end(self.peer, self.peer_port)}"

    @property
    def v6(self) -> bool:
        """Whether IPv6 packets carry it."""
        return is_v6(self.local)

    def reversed(self) -> ConnId:
        """The same connection as the peer sees it."""
        return ConnId(self.protocol, self.peer, self.peer_port, self.local, self.local_port)


def _end(address: str, port: int) -> str:
    return f"[{address}]:{port}" if is_v6(address) else f"{address}:{port}"
