"""What a tool changes on a host that would outlast its death, as it is written down before the change.

A note has a name (:class:`Trace`) and the packed record below; who keeps the notes (a journal) need not understand
them.  Their undoing is in :mod:`checkpoint.undo` and :mod:`checkpoint.finish`.

``places`` are (pid, descriptor): wherever the open file was seen.  Processes are named with their start time as well:
a number that was given to another process meanwhile is no longer meant.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import stat
from collections.abc import Callable, Iterable
from dataclasses import field

from checkpoint import procfs
from checkpoint.errors import NoSuchProcess
from checkpoint.files.base import FdView, FileLock, OpenFile
from checkpoint.files.listener import is_tcp
from checkpoint.files.tcp import Original
from checkpoint.files.udp import IP_PKTINFO, IPV6_RECVPKTINFO
from checkpoint.procfs import Stat
from checkpoint.tracee import Process
from tcpstate import codec
from tcpstate.freeze import QuietState
from tcpstate.kernel.bpf import Instruction
from tcpstate.kernel.sockets import SO, Level
from tcpstate.slotted import dataclass

_PEEK_OFF = (int(Level.SOCKET), int(SO.PEEK_OFF))
#: options that are on while a queue is read
_TOLD = {
    (socket.AF_INET, socket.SOCK_DGRAM): ((int(Level.IP), IP_PKTINFO),),
    (socket.AF_INET6, socket.SOCK_DGRAM): ((int(Level.IPV6), IPV6_RECVPKTINFO),),
}

__all__ = [
    "FrozenTree",
    "GivenUpLock",
    "HeldListener",
    "HeldListeners",
    "Made",
    "NoteWriter",
    "Peeked",
    "Roots",
    "Rules",
    "StagedName",
    "Stubs",
    "Trace",
    "Traced",
    "alive",
    "given_up_locks",
    "listener_name",
    "peeked",
    "write",
]

#: keeps a note (name, bytes) and returns when it will outlast the tool's death
NoteWriter = Callable[[str, bytes], None]


class Trace(enum.StrEnum):
    """The names of notes."""

    ROOTS = "roots"  # Roots: trees that are about to be stopped
    RULES = "rules"  # Rules: routing rules, added now
    LISTENERS = "listeners"  # HeldListeners: listeners that are about to drop SYNs
    PEEKED = "peeked"  # Peeked: sockets whose queues are about to be read
    SHELF = "shelf"  # tcpstate.shelf.Shelved: where lies what will be taken out of the listeners' accept queues
    TREE = "tree"  # FrozenTree: processes about to be kept stopped, connections to be frozen, locks to be given up
    STUBS = "stubs"  # Stubs: rebuilt processes that are about to outlive the tool
    MADE = "made"  # Made: a file or directory that is about to be made, and is not to stay


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """One process.

    start_time   field 22 of /proc/PID/stat
    stop_signal  it holds the process in a stop of its own (state T): it stays so
    """

    pid: int
    start_time: int
    stop_signal: int = 0

    @classmethod
    def now(cls, pid: int) -> Traced:
        """The process that has this number now. NoSuchProcess."""
        return cls(pid=pid, start_time=procfs.read_stat(pid).start_time)

    @classmethod
    def of(cls, process: Process) -> Traced:
        """A process that stands still."""
        return cls(pid=process.pid, start_time=process.stat.start_time, stop_signal=process.stop_signal)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roots:
    """The roots of the trees. Their members are not known before they stand still."""

    processes: list[Traced]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Rules of :class:`tcpstate.silence.Blackhole`: priority by address family. A later record replaces it."""

    priorities: dict[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldListener:
    """A listening socket: its address, its own filter, and its own mark (tcpstate.filters.ListenerState)."""

    places: list[tuple[int, int]]
    name: str
    filter: tuple[Instruction, ...]
    mark: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldListeners:
    """The listeners of the trees; what they accept meanwhile inherits the filter."""

    listeners: list[HeldListener]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peeked:
    """Sockets that are not TCP: options (level, number, value) as they are."""

    sockets: list[tuple[list[tuple[int, int]], list[tuple[int, int, int]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenUpLock:
    """A flock or OFD lock of an open file."""

    places: list[tuple[int, int]]
    lock: FileLock


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenTree:
    """Processes that will stay stopped if the tool dies, parents before children; connections as they were; locks.

    objects  System V objects that only they use, as notes of what was made name them (:class:`Made`): they go with the
             processes when the copy runs
    more     they have more connections, that were told before the stop and are not changed (checkpoint.files.ahead):
             nothing has to be given back to those, but when the copy runs they must not say a word either
    """

    processes: list[Traced]
    connections: list[Original]
    locks: list[GivenUpLock]
    objects: list[str] = field(default_factory=list)
    more: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedName:
    """The file of a local socket, or a shipped file: where it waits, and its place."""

    staged: str
    real: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A file or directory of ours: beside the place of a local socket, or of an image."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stubs:
    """Rebuilt processes, complete.

    names    of local sockets and shipped files, that appear at the release: their places are those of this host
    roots    root processes: PID at the source to PID here
    held     connections that were taken back from a hold, by index in FILES: as they were before they were frozen
    devices  interface names of the source to those here, as ``--map-dev`` says
    numbers  PIDs in the image to those here, where they differ: the tree is in a PID namespace of its own
    """

    processes: list[Traced]
    names: list[StagedName]
    roots: dict[int, int]
    held: dict[int, QuietState] = field(default_factory=dict)
    devices: dict[str, str] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)


def write(note: NoteWriter | None, trace: Trace, record: object) -> None:
    """Keep a note; nothing if there is nobody to keep it (a rehearsal, a test)."""
    if note is not None:
        note(trace, codec.pack(record))


def given_up_locks(entries: Iterable[FdView], records: Iterable[OpenFile]) -> list[GivenUpLock]:
    """The locks of open files; ``records`` in the order of ``entries``."""
    pairs = zip(entries, records, strict=True)
    return [GivenUpLock(places=view.places, lock=lock) for view, record in pairs for lock in record.locks]


def peeked(entries: Iterable[FdView]) -> Peeked:
    """The sockets among open files whose queues are read by peeking, as they are."""
    found = []
    for view in entries:
        if view.dup >= 0 and stat.S_ISSOCK(view.stat.st_mode) and not is_tcp(view):
            options = [_PEEK_OFF, *_TOLD.get((view.socket.family, view.socket.type), ())]
            # a socket of another kind has none of them
            with contextlib.suppress(OSError):
                values = [(level, option, view.socket.getsockopt(level, option)) for level, option in options]
                found.append((view.places, values))
    return Peeked(sockets=found)


def listener_name(sock: socket.socket) -> str:
    """The address of a listening socket as text."""
    address, port = sock.getsockname()[:2]
    return f"{address} {port}"


def alive(processes: Iterable[Traced]) -> list[Traced]:
    """Those that are there still and have not ended."""
    return [each for each in processes if _is_there(each)]


def _is_there(traced: Traced) -> bool:
    try:
        stat: Stat = procfs.read_stat(traced.pid)
    except NoSuchProcess:
        return False
    return stat.start_time == traced.start_time and not stat.zombie
