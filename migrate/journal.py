"""The journal: what must be known after a crash, on disk before it is done.

One file per migration and side, ``STATE_DIR/journals/ID.source`` or ``ID.target``, and one per checkpoint and restore::

    "TCPMIGJ1"   then records:   length u32, crc32 u32 (little endian), msgpack of a JournalRecord
    zeros        room written beforehand

The room is written and synced when the file is made, so that a later fdatasync writes one block and no metadata: that
is the cost inside the stop (0.16 ms instead of 0.22 on the development machine's virtio disk, much more elsewhere).  A
record that a crash cut short is the last one and has a wrong checksum: it was not yet acted upon, and is ignored.  A
wrong checksum with valid records behind it is damage, and said.

While the program lives it holds a lock on the file.  Closed journals are kept for a month: the other side may ask.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import logging
import os
import re
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from migrate.arrival import ArrivalRecord
from migrate.departure import DepartureRecord
from migrate.errors import JournalDamaged, JournalUnusable
from migrate.hostfacts import host_facts, state_directory
from migrate.messages import HostFacts
from tcpstate import codec
from tcpstate.codec import family, member
from tcpstate.errors import BadRecord
from tcpstate.slotted import dataclass

__all__ = [
    "AddressesArrive",
    "AddressesLeave",
    "Closed",
    "End",
    "Journal",
    "JournalRecord",
    "JournalView",
    "Note",
    "Opened",
    "Place",
    "Role",
    "Step",
    "StepKind",
    "find_journal",
    "journals",
    "read_journal",
]

_log = logging.getLogger(__name__)

MAGIC = b"TCPMIGJ1"
_FRAME = struct.Struct("<II")
ROOM = 64 << 10
MAX_RECORD = 256 << 20
#: seconds after which a closed journal is removed
KEEP = 30 * 86400
_LOCK_TRIES = 10
_LOCK_PAUSE = 0.01

_NAME = re.compile(r"[0-9a-f]{32}\.(source|target|checkpoint|restore|handover)")


class Role(enum.Enum):
    """Whose journal it is."""

    SOURCE = "source"
    TARGET = "target"
    CHECKPOINT = "checkpoint"
    RESTORE = "restore"
    HANDOVER = "handover"  # a hold is given up for a restore elsewhere

    @property
    def leaves(self) -> bool:
        """Whether the processes ran here before."""
        return self in (Role.SOURCE, Role.CHECKPOINT)


class StepKind(enum.Enum):
    """What is about to happen, or has been decided."""

    COMMIT = "commit"  # source: COMMIT may have been sent; checkpoint: the image is complete, the originals must go
    STARTED = "started"  # target, restore: the processes outlive the program, and are this host's
    RUNNING = "running"  # either: they run at the target
    ABORTED = "aborted"  # either: all is undone on this side


class End(enum.Enum):
    """How it ended."""

    MOVED = "moved"  # they do not run here any more, or they run here now
    ABORTED = "aborted"  # all is as it was
    DONE = "done"  # all is as it was, as it should be: a checkpoint that lets them run on


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A host as long as it lives: a boot, a network and a PID namespace (inode numbers)."""

    boot_id: str
    network: int
    pids: int

    @classmethod
    def of(cls, facts: HostFacts) -> Place:
        """The place in what a host tells of itself."""
        return cls(boot_id=facts.boot_id, network=facts.network, pids=facts.pids)


@family
@dataclass(frozen=True, slots=True, kw_only=True)
class JournalRecord:
    """Base of the records."""


@member(JournalRecord, "opened")
@dataclass(frozen=True, slots=True, kw_only=True)
class Opened(JournalRecord):
    """The first record: what it is about, and on which host (a boot, a network and a PID namespace).

    host, rsh, remote_command  how the source reached the target; empty in the target's
    roots                      root processes, by their PID at the source
    tool                       PID of the program
    wall                       seconds since the epoch, for people
    image                      the file of a checkpoint or restore
    there                      the other host, in the source's
    """

    migration: str
    role: Role
    boot_id: str
    network: int
    pids: int
    tool: int
    wall: float
    roots: tuple[int, ...] = ()
    host: str = ""
    rsh: str = ""
    remote_command: str = ""
    image: str = ""
    there: Place | None = None


@member(JournalRecord, "note")
@dataclass(frozen=True, slots=True, kw_only=True)
class Note(JournalRecord):
    """Something that the room below needs to undo its own work: its name and bytes, opaque here."""

    name: str
    data: bytes


@member(JournalRecord, "leave")
@dataclass(frozen=True, slots=True, kw_only=True)
class AddressesLeave(JournalRecord):
    """Source: these addresses are about to be removed."""

    departure: DepartureRecord


@member(JournalRecord, "arrive")
@dataclass(frozen=True, slots=True, kw_only=True)
class AddressesArrive(JournalRecord):
    """Target: these addresses are about to be added."""

    arrival: ArrivalRecord


@member(JournalRecord, "step")
@dataclass(frozen=True, slots=True, kw_only=True)
class Step(JournalRecord):
    """A step of the protocol. ``detail``: for people; ``pids``: PID at the source to PID here, of RUNNING."""

    step: StepKind
    detail: str = ""
    pids: dict[int, int] | None = None


@member(JournalRecord, "closed")
@dataclass(frozen=True, slots=True, kw_only=True)
class Closed(JournalRecord):
    """The last record: nothing is left to be settled."""

    end: End
    wall: float


_Record = TypeVar("_Record", bound=JournalRecord)


@dataclass(frozen=True, slots=True)
class JournalView:
    """A journal as read back.

    torn   its last record was cut short by a crash
    mine   it was written in this boot, network namespace and PID namespace
    alive  the program that writes it is still there
    """

    path: Path
    opened: Opened
    records: tuple[JournalRecord, ...]
    torn: bool
    mine: bool
    alive: bool

    @property
    def closed(self) -> Closed | None:
        """How it ended; None if something is left to be settled."""
        last = self.records[-1]
        return last if isinstance(last, Closed) else None

    def notes(self, name: str) -> list[bytes]:
        """All notes of a name, oldest first."""
        return [r.data for r in self.records if isinstance(r, Note) and r.name == name]

    def last(self, kind: type[_Record]) -> _Record | None:
        """The newest record of a kind."""
        return next((r for r in reversed(self.records) if isinstance(r, kind)), None)

    def step(self, step: StepKind) -> Step | None:
        """The newest record of a step."""
        return next((r for r in reversed(self.records) if isinstance(r, Step) and r.step is step), None)

    def reached(self, step: StepKind) -> bool:
        """Whether a step was journalled."""
        return self.step(step) is not None


class Journal:
    """A journal being written. JournalUnusable if the directory or the disk does not take it."""

    def __init__(self, opened: Opened, *, directory: Path | None = None) -> None:
        folder = (directory or state_directory()) / "journals"
        self.path = folder / f"{opened.migration}.{opened.role.value}"
        self._end = 0
        self._room = 0
        self._fd = -1
        if not _NAME.fullmatch(self.path.name):
            raise JournalUnusable("a migration is named by 32 hexadecimal digits", object=opened.migration)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _prune(folder)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            self._write(MAGIC)
            self.append(opened)
            parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)
        except OSError as error:
            self._close()
            raise JournalUnusable(f"the journal cannot be made: {error.strerror}", object=str(self.path)) from error

    @classmethod
    def open(
        cls,
        role: Role,
        migration: str,
        *,
        roots: tuple[int, ...] = (),
        host: str = "",
        rsh: str = "",
        remote_command: str = "",
        image: str = "",
        there: Place | None = None,
        directory: Path | None = None,
    ) -> Journal:
        """A new journal of this host."""
        facts = host_facts()
        return cls(
            Opened(
                migration=migration,
                role=role,
                boot_id=facts.boot_id,
                network=facts.network,
                pids=facts.pids,
                tool=os.getpid(),
                wall=time.time(),
                roots=roots,
                host=host,
                rsh=rsh,
                remote_command=remote_command,
                image=image,
                there=there,
            ),
            directory=directory,
        )

    @classmethod
    def take(cls, view: JournalView) -> Journal | None:
        """The journal of a program that has died, to be written on: a record that it cut short is overwritten. None if
        somebody else has it. JournalDamaged, JournalUnusable."""
        self = cls.__new__(cls)
        self.path = view.path
        try:
            self._fd = os.open(view.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            _lock(self._fd)
            self._end, self._room = _length(view.path), os.fstat(self._fd).st_size
            _write_all(self._fd, bytes(self._room - self._end), self._end)
        except BlockingIOError:
            self._close()
            return None
        except OSError as error:
            self._close()
            raise JournalUnusable(f"the journal cannot be written: {error.strerror}", object=str(view.path)) from error
        return self

    def append(self, *records: JournalRecord) -> None:
        """Write records and wait until they are on disk. JournalUnusable if that fails: then do not act."""
        data = bytearray()
        for record in records:
            payload = codec.pack(record)
            if len(payload) > MAX_RECORD:
                raise JournalUnusable(f"a record of {len(payload)} bytes is too long", object=str(self.path))
            data += _FRAME.pack(len(payload), zlib.crc32(payload)) + payload
        try:
            self._write(data)
            os.fdatasync(self._fd)
        except OSError as error:
            raise JournalUnusable(f"the journal cannot be written: {error.strerror}", object=str(self.path)) from error

    def note(self, name: str, data: bytes) -> None:
        """Append a :class:`Note`."""
        self.append(Note(name=name, data=data))

    def step(self, step: StepKind, detail: str = "", pids: dict[int, int] | None = None) -> None:
        """Append a :class:`Step`."""
        self.append(Step(step=step, detail=detail, pids=pids))

    def finish(self, end: End) -> None:
        """Nothing is left to be settled: write that, give the room back, and close."""
        self.append(Closed(end=end, wall=time.time()))
        try:
            os.ftruncate(self._fd, self._end)
        except OSError as error:
            raise JournalUnusable(f"the journal cannot be closed: {error.strerror}", object=str(self.path)) from error
        finally:
            self._close()

    def leave(self) -> None:
        """Close the file with something left to be settled: `tcpmig recover` finds it."""
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, data: bytes | bytearray) -> None:
        while self._end + len(data) > self._room:
            more = max(ROOM, self._end + len(data) - self._room)
            _write_all(self._fd, bytes(more), self._room)
            os.fsync(self._fd)
            self._room += more
        _write_all(self._fd, data, self._end)
        self._end += len(data)


def _lock(fd: int) -> None:
    """Lock for writing. BlockingIOError if a program writes it; one that only looks has it for a moment."""
    for _ in range(_LOCK_TRIES):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(_LOCK_PAUSE)
    raise BlockingIOError


def _write_all(fd: int, data: bytes | bytearray, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        if count == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view = view[count:]
        offset += count


def read_journal(path: Path) -> JournalView:
    """Read a journal back. JournalDamaged if it is none, or damaged in its middle."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            alive = not _lockable(fd)
            data = path.read_bytes()
        finally:
            os.close(fd)
    except OSError as error:
        raise JournalDamaged(f"it cannot be read: {error.strerror}", object=str(path)) from error
    records, torn, _ = _parse(data, path)
    if not records or not isinstance(records[0], Opened):
        raise JournalDamaged("it does not begin with what it is about", object=str(path))
    opened, facts = records[0], host_facts()
    mine = Place(boot_id=opened.boot_id, network=opened.network, pids=opened.pids) == Place.of(facts)
    return JournalView(path, opened, tuple(records), torn, mine, alive)


def find_journal(migration: str, role: Role, directory: Path | None = None) -> JournalView | None:
    """The journal of a migration on this side; None if there is none. JournalDamaged."""
    path = (directory or state_directory()) / "journals" / f"{migration}.{role.value}"
    return read_journal(path) if _NAME.fullmatch(path.name) and path.exists() else None


def journals(directory: Path | None = None) -> Iterator[JournalView]:
    """The readable journals in the state directory, oldest first; damaged ones are named in the log."""
    folder = (directory or state_directory()) / "journals"
    found: list[JournalView] = []
    for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
        if _NAME.fullmatch(name):
            try:
                found.append(read_journal(folder / name))
            except JournalDamaged as error:
                _log.warning("%s", error)
    yield from sorted(found, key=lambda view: view.opened.wall)


def _length(path: Path) -> int:
    """Bytes up to the end of the last whole record."""
    return _parse(path.read_bytes(), path)[2]


def _parse(data: bytes, path: Path) -> tuple[list[JournalRecord], bool, int]:
    """The records, whether another one was cut short, and where they end."""
    if data[: len(MAGIC)] != MAGIC:
        raise JournalDamaged("it does not start as a journal does", object=str(path))
    records: list[JournalRecord] = []
    at = len(MAGIC)
    while at + _FRAME.size <= len(data):
        length, checksum = _FRAME.unpack_from(data, at)
        if length == 0:
            # the room behind the last record; a torn record may have left its length unwritten
            return records, any(data[at:]), at
        payload = data[at + _FRAME.size : at + _FRAME.size + length]
        if len(payload) < length or zlib.crc32(payload) != checksum:
            if any(_intact(data, start) for start in range(at + _FRAME.size, len(data) - _FRAME.size)):
                raise JournalDamaged(f"the record at byte {at} has a wrong checksum", object=str(path))
            return records, True, at
        try:
            records.append(codec.unpack(JournalRecord, payload))
        except BadRecord as error:
            raise JournalDamaged(f"the record at byte {at}: {error.message}", object=str(path)) from error
        at += _FRAME.size + length
    return records, at != len(data), at


def _intact(data: bytes, at: int) -> bool:
    """Whether a whole record stands at ``at``."""
    length, checksum = _FRAME.unpack_from(data, at)
    end = at + _FRAME.size + length
    whole: bool = length > 0 and end <= len(data) and zlib.crc32(data[at + _FRAME.size : end]) == checksum
    return whole


def _lockable(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _prune(folder: Path) -> None:
    """Remove journals that were closed long ago."""
    for name in os.listdir(folder):
        path = folder / name
        if _NAME.fullmatch(name) and _age(path) > KEEP:
            # one that cannot be read is left for a person to look at; one that is gone was pruned by another program
            with contextlib.suppress(JournalDamaged, FileNotFoundError):
                if read_journal(path).closed is not None:
                    path.unlink()
