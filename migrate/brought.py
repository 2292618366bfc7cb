"""What an address has brought along to this host, kept until the next boot: when the address leaves again, so do these
routes and rules.

They cannot be told from the host's own by looking: a gateway that only the address could reach where it came from may
be everybody's neighbour here.

Files: ``RUNTIME_DIR/addresses/NETNS-ADDRESS``, NETNS being the inode number of the network namespace.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from migrate.addresses import AddressRecord
from migrate.routes import RouteRecord, route_body, rule_body
from migrate.rtnetlink import Netlink
from tcpstate import codec
from tcpstate.errors import BadRecord
from tcpstate.frozen import runtime_dir
from tcpstate.kernel.netlink import Request
from tcpstate.kernel.rtnetlink import MessageType

__all__ = ["recall", "remember", "withdraw"]

_log = logging.getLogger(__name__)


def _file(netlink: Netlink, address: str) -> Path:
    return runtime_dir() / "addresses" / f"{netlink.netns}-{address}"


def remember(netlink: Netlink, record: AddressRecord) -> None:
    """``record`` has come, with the routes and rules that were made for it here. OSError."""
    file = _file(netlink, record.address)
    if not record.routes and not record.rules:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = file.with_name(f"{file.name}.{os.getpid()}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as out:
        out.write(codec.pack(record))
    os.replace(fresh, file)


def recall(netlink: Netlink, address: str) -> AddressRecord | None:
    """What has come with an address; None if nothing has, or not by us. OSError."""
    try:
        return codec.unpack(AddressRecord, _file(netlink, address).read_bytes())
    except FileNotFoundError:
        return None
    except BadRecord as error:
        _log.warning("what came with %s is not known any more: %s", address, error.message)
        return None


def withdraw(netlink: Netlink, addresses: Iterable[str]) -> None:
    """The addresses have left: so do the routes and rules that came with them. OSError."""
    for address in addresses:
        record = recall(netlink, address)
        if record is not None:
            # errors: gone already. The kernel takes away IPv4 routes whose source has left
            netlink.change((MessageType.DELROUTE, Request(0), route_body(r, r.index)) for r in _now(record))
            netlink.change((MessageType.DELRULE, Request(0), rule_body(r)) for r in record.rules)
        _file(netlink, address).unlink(missing_ok=True)


def _now(record: AddressRecord) -> list[RouteRecord]:
    """The routes as they are without the address: IPv6 ones have lost it as their preferred source, and stayed."""
    strip = record.family == socket.AF_INET6
    return [replace(r, source="") if strip and r.source == record.address else r for r in record.routes]
