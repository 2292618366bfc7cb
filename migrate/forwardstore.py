"""What is known of the forwardings of this host: one file each in ``TCPMIG_RUNTIME_DIR/forwards``, mode 0600, root's.

A forwarding has two ends, which have its ID in common: at home, the host that the network brings the addresses to, and
away, where the processes run.  A record is written before anything of its end is made.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import time

from migrate import records
from migrate.errors import ForwardChangeFailed
from migrate.hostfacts import host_facts
from tcpstate import codec
from tcpstate.errors import BadRecord
from tcpstate.frozen import runtime_dir
from tcpstate.kernel.bpf.steer import Role
from tcpstate.slotted import dataclass

__all__ = ["ForwardRecord", "find", "forget", "forwards", "named", "of_address", "write"]

_log = logging.getLogger(__name__)

_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardRecord:
    """One end of a forwarding.

    forward    its ID, 32 hexadecimal digits: that of the migration which began it
    role       which end this is
    boot_id, network  where it is: a boot and a network namespace (inode number)
    since      seconds since the epoch
    host       the other host, as it was called; empty: not known
    near, far  the tunnel's ends: addresses of this host and of the other one
    addresses  that are forwarded
    complete   it stands; else the migration that makes it is at work, or died
    """

    forward: str
    role: Role
    boot_id: str
    network: int
    since: float
    host: str
    near: str
    far: str
    addresses: tuple[str, ...]
    complete: bool = False

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.forward):
            raise ValueError("a forwarding is named by 32 hexadecimal digits")
        if ipaddress.ip_address(self.near).version != ipaddress.ip_address(self.far).version:
            raise ValueError("the tunnel's ends are of two families")
        for address in self.addresses:
            ipaddress.ip_address(address)

    @property
    def here(self) -> bool:
        """Whether it is of this boot and network namespace."""
        facts = host_facts()
        return (self.boot_id, self.network) == (facts.boot_id, facts.network)

    @property
    def age(self) -> float:
        """Seconds that it has been there."""
        return max(0.0, time.time() - self.since)

    @property
    def number(self) -> int:
        """The tunnel's network identifier: 24 bits, not 0. Both ends have it from the ID."""
        return int(self.forward[:6], 16) or 1

    @property
    def device(self) -> str:
        """The name of the tunnel's interface."""
        return f"tmf{self.forward[:10]}"

    @property
    def table(self) -> int:
        """Of the routes into the tunnel."""
        return 0x74000000 | self.number


def write(record: ForwardRecord) -> None:
    """Write a record, in place of what was there. ForwardChangeFailed."""
    try:
        folder = records.private_directory("forwards", "the directory of forwardings", ForwardChangeFailed)
        records.replace(folder / f"{record.forward}.{record.role.value}", codec.pack(record))
    except OSError as error:
        what = f"its record cannot be written: {error.strerror}"
        raise ForwardChangeFailed(what, object=f"forwarding {record.forward}") from error


def forget(record: ForwardRecord) -> None:
    """Remove the record; that it is gone already is no error. OSError."""
    (runtime_dir() / "forwards" / f"{record.forward}.{record.role.value}").unlink(missing_ok=True)


def forwards() -> list[ForwardRecord]:
    """Those of this boot and network namespace, oldest first. What another boot has left is removed; a damaged record
    is named in the log."""
    folder = runtime_dir() / "forwards"
    found = []
    boot = host_facts().boot_id
    for path in sorted(folder.glob("*.*")) if folder.is_dir() else []:
        if path.suffix == ".new":
            continue
        try:
            record = codec.unpack(ForwardRecord, records.read_own(path))
        except FileNotFoundError:
            _log.debug("%s has just ended", path.stem)
        except (BadRecord, ValueError) as error:
            _log.warning("%s: %s", path, error)
        else:
            if record.boot_id != boot:
                # its interface, routes and programs ended with that boot
                path.unlink(missing_ok=True)
            elif record.here:
                found.append(record)
    return sorted(found, key=lambda record: record.since)


def find(forward: str, role: Role) -> ForwardRecord | None:
    """This host's end of a forwarding."""
    return next((one for one in forwards() if (one.forward, one.role) == (forward, role)), None)


def of_address(address: str, role: Role) -> ForwardRecord | None:
    """The forwarding that an address has here."""
    return next((one for one in forwards() if one.role is role and address in one.addresses), None)


def named(text: str) -> ForwardRecord | None:
    """The forwarding that a person means by an ID, or its beginning; None if there is not exactly one."""
    found = [one for one in forwards() if one.forward.startswith(text.lower())] if text else []
    return found[0] if len(found) == 1 else None
