"""What is known of the holds of this host: one file each in ``TCPMIG_RUNTIME_DIR/holds``, mode 0600, root's.

::

    ID.hold      HoldRecord; written before anything is changed, and again when the hold stands
    ID.lock      locked by whoever changes the hold: checkpoint, restore, release, the holder at its end
    ID.N.sock    the holders' sockets (migrate/holder.py)

A record is of this host if boot, network and PID namespace are the same: several test hosts may share a file system.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from checkpoint import procfs
from checkpoint.errors import NoSuchProcess
from migrate import records
from migrate.addresses import AddressRecord
from migrate.errors import HoldBusy, HoldRecordDamaged, HoldUnavailable, NoSuchHold
from migrate.hostfacts import host_facts
from tcpstate import codec
from tcpstate.errors import BadRecord
from tcpstate.frozen import runtime_dir
from tcpstate.slotted import dataclass

__all__ = [
    "HoldRecord",
    "Holder",
    "directory",
    "find",
    "forget",
    "holds",
    "locked",
    "named",
    "read",
    "socket_path",
    "write",
]

_log = logging.getLogger(__name__)

_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A holding process: its PID, and its start time (field 22 of /proc/PID/stat), which tells it from another."""

    pid: int
    start_time: int

    @property
    def alive(self) -> bool:
        """Whether it is there."""
        try:
            stat = procfs.read_stat(self.pid)
        except NoSuchProcess:
            return False
        return stat.start_time == self.start_time and not stat.zombie


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldRecord:
    """One hold.

    hold         its ID, 32 hexadecimal digits: the same as that of the checkpoint's journal
    boot_id, network, pids  where it is: a boot, a network and a PID namespace (inode numbers)
    since        seconds since the epoch
    timeout      seconds after which it ends by itself; 0: never
    image        the file that the processes went into
    roots        their root PIDs
    connections  how many are held
    listeners    where the held listeners listen, for people
    addresses    local addresses that have to come along when the processes are restored elsewhere
    holders      the processes that keep the sockets
    rules        priorities of the routing rules that silence the sockets, by address family
    cgroups      directories of control groups made for the holders
    complete     the hold stands; else the checkpoint has not come so far
    """

    hold: str
    boot_id: str
    network: int
    pids: int
    since: float
    timeout: float
    image: str
    roots: tuple[int, ...]
    connections: int = 0
    listeners: tuple[str, ...] = ()
    addresses: tuple[AddressRecord, ...] = ()
    holders: tuple[Holder, ...] = ()
    rules: dict[int, int] | None = None
    cgroups: tuple[str, ...] = ()
    complete: bool = False

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.hold):
            raise ValueError("a hold is named by 32 hexadecimal digits")

    @property
    def here(self) -> bool:
        """Whether it is of this boot and of these namespaces."""
        facts = host_facts()
        return (self.boot_id, self.network, self.pids) == (facts.boot_id, facts.network, facts.pids)

    @property
    def age(self) -> float:
        """Seconds that it has been there."""
        return max(0.0, time.time() - self.since)


def directory() -> Path:
    """Where they are; made if it is not there. HoldUnavailable."""
    return records.private_directory("holds", "the directory of holds", HoldUnavailable)


def socket_path(hold: str, shard: int) -> Path:
    """Where a holder listens."""
    return directory() / f"{hold}.{shard}.sock"


def write(record: HoldRecord) -> None:
    """Write a record, in place of what was there. HoldUnavailable."""
    path = directory() / f"{record.hold}.hold"
    try:
        records.replace(path, codec.pack(record))
    except OSError as error:
        raise HoldUnavailable(f"its record cannot be written: {error.strerror}", object=str(path)) from error


def read(path: Path) -> HoldRecord:
    """One record. HoldRecordDamaged; FileNotFoundError."""
    try:
        return codec.unpack(HoldRecord, records.read_own(path))
    except BadRecord as error:
        raise HoldRecordDamaged(error.message, object=str(path)) from error


def holds() -> list[HoldRecord]:
    """All records, oldest first, those of other boots and namespaces too; a damaged one is named in the log."""
    found = []
    folder = runtime_dir() / "holds"
    for path in sorted(folder.glob("*.hold")) if folder.is_dir() else []:
        try:
            found.append(read(path))
        except HoldRecordDamaged as error:
            _log.warning("%s", error)
        except FileNotFoundError:
            _log.debug("%s has just ended", path.stem)
    return sorted(found, key=lambda record: record.since)


def find(hold: str) -> HoldRecord | None:
    """The hold of this ID, if it is one of this host."""
    path = runtime_dir() / "holds" / f"{hold}.hold"
    if not _ID.fullmatch(hold) or not path.exists():
        return None
    record = read(path)
    return record if record.here else None


def network_of(hold: str) -> int:
    """The network namespace that a hold is in, if it is of this boot; else that of the calling thread."""
    path = runtime_dir() / "holds" / f"{hold}.hold"
    facts = host_facts()
    if _ID.fullmatch(hold) and path.exists():
        record = read(path)
        if record.boot_id == facts.boot_id:
            return record.network
    return facts.network


def named(text: str) -> HoldRecord:
    """The hold that a person means: its ID, or the beginning of it if there is only one such. NoSuchHold."""
    found = [record for record in holds() if record.hold.startswith(text.lower())] if text else []
    if len(found) != 1:
        raise NoSuchHold("no hold has this ID" if not found else f"{len(found)} holds begin so", object=text)
    return found[0]


@contextlib.contextmanager
def locked(hold: str) -> Iterator[None]:
    """Nobody else changes the hold within the block. HoldBusy."""
    path = directory() / f"{hold}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HoldBusy("another tcpmig is at work on it", object=f"hold {hold}") from None
        yield
    finally:
        if not (directory() / f"{hold}.hold").exists():
            # nothing is left to be locked
            path.unlink(missing_ok=True)
        os.close(descriptor)


def forget(record: HoldRecord) -> None:
    """Remove the files and control groups of a hold. Whoever waits for its lock finds that it is gone."""
    for group in record.cgroups:
        # a holder that is about to end is still in it: then the holder's own end, or the next command, removes it
        with contextlib.suppress(OSError):
            os.rmdir(group)
    folder = directory()
    for path in folder.glob(f"{record.hold}.*.sock"):
        path.unlink(missing_ok=True)
    for kind in ("hold", "lock"):
        (folder / f"{record.hold}.{kind}").unlink(missing_ok=True)
