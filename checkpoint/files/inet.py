"""Internet addresses of sockets, as records hold them."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

from tcpstate.kernel.sockets import SO, Level
from tcpstate.slotted import dataclass

__all__ = ["Endpoint", "bound_devices"]

#: IFNAMSIZ
_NAME_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An address and a port.

    address    as the socket shows it (an IPv6 socket that speaks IPv4 shows ``::ffff:10.0.0.1``)
    port       0 .. 65535
    flow_info  IPv6
    scope      IPv6, link-local: name of the interface
    """

    address: str
    port: int
    flow_info: int = 0
    scope: str = ""

    def __post_init__(self) -> None:
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        try:
            socket.inet_pton(family, self.address)
        except OSError:
            raise ValueError(f"{self.address!r} is not an address") from None
        if not 0 <= self.port <= 0xFFFF or not 0 <= self.flow_info < 1 << 32 or len(self.scope) > 15:
            raise ValueError("port, flow label or interface out of range")

    def __str__(self) -> str:
        scope = f"%{self.scope}" if self.scope else ""
        return f"[{self.address}{scope}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    @classmethod
    def of(cls, name: tuple[Any, ...]) -> Self:
        """Of what getsockname() and getpeername() return."""
        flow_info, scope = (name[2], name[3]) if len(name) > 2 else (0, 0)
        return cls(
            address=name[0].partition("%")[0],
            port=name[1],
            flow_info=flow_info,
            scope=socket.if_indextoname(scope) if scope else "",
        )

    def on_devices(self, devices: Mapping[str, str]) -> Self:
        """The same with the interface name of another host, if it is in ``devices``."""
        return replace(self, scope=devices.get(self.scope, self.scope))

    @property
    def sockaddr(self) -> tuple[Any, ...]:
        """For bind(), connect() and sendto(); OSError if there is no such interface here."""
        if ":" not in self.address:
            return self.address, self.port
        return self.address, self.port, self.flow_info, socket.if_nametoindex(self.scope) if self.scope else 0

    @property
    def wildcard(self) -> bool:
        """Whether it stands for all addresses."""
        return self.address in ("0.0.0.0", "::")


def bound_devices(sock: socket.socket) -> set[str]:
    """The interfaces that a socket is bound to, by SO_BINDTODEVICE or by a link-local address."""
    found = set()
    # one that has gone here as well is not looked for elsewhere
    with contextlib.suppress(OSError):
        found.add(sock.getsockopt(Level.SOCKET, SO.BINDTODEVICE, _NAME_SIZE).rstrip(b"\0").decode(errors="replace"))
    with contextlib.suppress(OSError):
        found.add(Endpoint.of(sock.getsockname()).scope)
    return found - {""}
