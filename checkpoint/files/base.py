"""The plan that every kind of open file follows: a record, how it is captured, how it is made again.

A kind is a frozen dataclass, member of the family :class:`OpenFile`, registered with :func:`register` by what its link
in /proc/PID/fd and its mode look like.  ``kinds.py`` lists the kinds, most particular first: the first that fits takes
the file.

The life of one kind::

    examine   before the stop    raises Refused, or returns a warning; disturbs nothing
    capture   in the stop        the record
    check     at the target      before anything is built: raises what rebuild would run into, or returns a warning
    rebuild   at the target      a descriptor in our process
    complete  at the target      once every descriptor is there: queued data, locks
    late      at the target      what a FILES_DELTA brought
    release   at the target      the addresses are local and the original is gone: names, queues, filters
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import socket
import stat
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypeVar

from checkpoint.errors import FileCaptureFailed, UnsupportedLock
from checkpoint.files.abi import CAPTURED_FLAGS, SETTABLE_FLAGS, AccessMode, Fcntl, FileFlag, LockType, OwnerType
from tcpstate.codec import family, kind_of, member
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder
    from checkpoint.files.table import FileTable

__all__ = [
    "AsyncOwner",
    "FdView",
    "FileLock",
    "OpenFile",
    "PosixLock",
    "Rule",
    "kind_name",
    "locks_of",
    "parse_info",
    "read_info",
    "register",
    "rule_of",
    "set_flags",
]

_OWNER = struct.Struct("<ii")  # struct f_owner_ex
_INFO_CHUNK = 1 << 16
_PATH = int(FileFlag.PATH)


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncOwner:
    """Who is told by a signal that the file became ready (F_SETOWN_EX, F_SETSIG).

    type    thread, process or group
    pid     its number; 0: nobody, only the signal was set
    signal  0 stands for SIGIO
    """

    type: OwnerType
    pid: int
    signal: int

    def renumbered(self, number: Callable[[int], int]) -> AsyncOwner:
        """With another number; 0 of somebody who has none there."""
        return dataclasses.replace(self, pid=number(self.pid))


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLock:
    """A lock that belongs to the description.

    whole   made by flock(2), else by F_OFD_SETLK
    lease   a lease (F_SETLEASE): who opens the file otherwise has to wait until it is given up
    type    READ (shared) or WRITE (exclusive)
    start   first byte, for OFD locks
    length  bytes, 0: to the end of the file
    """

    whole: bool
    type: LockType
    start: int = 0
    length: int = 0
    lease: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PosixLock:
    """A record lock of one process (F_SETLK); it belongs to process and inode, not to a description."""

    type: LockType
    start: int
    length: int


@dataclass(slots=True, kw_only=True, eq=False)
class FdView:
    """One open file description of the source, as seen from outside.

    pid, fd   where it was seen first; fd is -1 for a file that is only mapped, or only in flight in a message
    dup       our duplicate (pidfd_getfd); -1 for a file that is only mapped
    magic     path in /proc that opens the same file anew
    link      what that path reads as
    flags     F_GETFL without O_CLOEXEC
    info      the ``name:\\tvalue`` lines of fdinfo
    lines     all its lines
    places    every (pid, fd) that is this description
    writable  mappings: the file was opened for writing, and the mapping may become writable
    """

    pid: int
    fd: int
    dup: int
    magic: str
    link: str
    flags: int
    pos: int
    info: dict[str, str]
    lines: tuple[str, ...]
    stat: os.stat_result
    table: FileTable
    places: list[tuple[int, int]]
    _socket: socket.socket | None = None
    _protocol: tuple[int, int, int] | None = None

    @property
    def protocol(self) -> tuple[int, int, int]:
        """Family, type and protocol of a socket; three times -1 of anything else."""
        if self._protocol is None:
            if self.dup < 0 or not stat.S_ISSOCK(self.stat.st_mode):
                self._protocol = -1, -1, -1
            else:
                # asked for every kind of file there is: socket.family would make an enum each time
                sock = self.socket
                self._protocol = int(sock.family), int(sock.type), sock.proto
        return self._protocol

    @property
    def socket(self) -> socket.socket:
        """The duplicate as a socket; it owns ``dup`` from then on."""
        if self._socket is None:
            self._socket = socket.socket(fileno=self.dup)
        return self._socket

    @property
    def access(self) -> AccessMode:
        """How it was opened."""
        return AccessMode.of(self.flags)

    @property
    def object(self) -> str:
        """The subject of errors and verdicts."""
        if self.fd >= 0:
            return f"pid {self.pid} fd {self.fd}"
        return f"pid {self.pid} {self.magic.rpartition('/proc/')[2].partition('/')[2] or self.link}"

    @property
    def is_standard_stream(self) -> bool:
        """Whether some process has it as descriptor 0, 1 or 2."""
        return any(fd in (0, 1, 2) for _, fd in self.places)

    def close(self) -> None:
        """Give up our duplicate."""
        if self._socket is not None:
            self._socket.close()
        elif self.dup >= 0:
            os.close(self.dup)
        self.dup = -1
        self._socket = None

    def refresh(self) -> None:
        """Read fdinfo again."""
        self.lines, self.info = parse_info(read_info(self.pid, self.fd))

    def number(self, name: str, base: int = 10) -> int:
        """The number in the fdinfo line ``name``; FileCaptureFailed if it is not there."""
        try:
            return int(self.info[name], base)
        except (KeyError, ValueError):
            raise FileCaptureFailed(f"fdinfo has no number {name!r}: {self.lines}", object=self.object) from None

    def common(self) -> dict[str, Any]:
        """The fields of every kind."""
        return {"flags": self.flags, "pos": self.pos, "owner": self._owner(), "locks": tuple(self._locks())}

    def _owner(self) -> AsyncOwner | None:
        if self.dup < 0 or self.flags & _PATH:
            return None
        kind, pid = _OWNER.unpack(fcntl.fcntl(self.dup, Fcntl.GETOWN_EX, _OWNER.pack(0, 0)))
        signal = fcntl.fcntl(self.dup, Fcntl.GETSIG)
        if not pid and not signal:
            return None
        return AsyncOwner(type=OwnerType(kind), pid=pid, signal=signal)

    def _locks(self) -> list[FileLock]:
        return [
            FileLock(
                whole=kind == "FLOCK",
                type=lock.type,
                start=0 if kind == "LEASE" else lock.start,
                length=0 if kind == "LEASE" else lock.length,
                lease=kind == "LEASE",
            )
            for kind, lock in locks_of(self.lines, self.object)
            if kind != "POSIX"
        ]


@family
@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFile:
    """One open file description.

    flags  access mode and status flags (F_GETFL)
    pos    file position, where the kind has one
    owner  receiver of signals of readiness, if one was set
    locks  flock and OFD locks
    """

    flags: int
    pos: int = 0
    owner: AsyncOwner | None = None
    locks: tuple[FileLock, ...] = ()

    #: whether a mapping can have such a file behind it
    mappable: ClassVar[bool] = False
    #: whether capture() changes nothing and may be called while the process runs, so that the target can check() early
    foreseeable: ClassVar[bool] = False
    #: whether time alone changes it, while its processes rest
    by_clock: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.flags <= CAPTURED_FLAGS or self.pos < 0:
            raise ValueError("flags or position out of range")
        self.validate()

    def validate(self) -> None:
        """ValueError if the kind's own fields are out of range: records may come from anywhere."""

    @classmethod
    def examine(cls, view: FdView) -> str:
        """A warning, or an empty text; raises Refused. May not change anything, nor rely on the process resting."""
        return ""

    @classmethod
    def capture(cls, view: FdView) -> Self:
        """The record of a stopped process's open file."""
        return cls(**view.common())

    def check(self, host: Rebuilder) -> str:
        """Whether the file can be made here: a warning, or an empty text, or a TcpmigError. Builds nothing."""
        return ""

    def rebuild(self, host: Rebuilder) -> int:
        """An equal open file description; its descriptor in our process."""
        raise NotImplementedError(f"{type(self).__name__}.rebuild")

    def complete(self, host: Rebuilder, fd: int) -> None:
        """What needs the other descriptors to be there."""

    def late(self, host: Rebuilder, fd: int) -> None:
        """This record replaces the one that ``fd`` was made from."""

    def release(self, host: Rebuilder, fd: int) -> None:
        """The addresses are here; make the file work."""

    @property
    def access(self) -> AccessMode:
        """How it was opened."""
        return AccessMode.of(self.flags)

    @property
    def tids(self) -> frozenset[int]:
        """The threads that it refers to: they must be there before it."""
        return frozenset()

    @property
    def tcp_port(self) -> int:
        """The local port of a TCP connection or listener; 0 for all else."""
        return 0

    def on_devices(self, devices: Mapping[str, str]) -> Self:
        """The same with the interface names of another host, where they are in ``devices``: done to every part that
        knows interfaces (endpoints, socket options, connections, groups), also in tuples."""
        return self._with_parts("on_devices", devices) if devices else self

    def renumbered(self, number: Callable[[int], int]) -> Self:
        """The same with processes, groups and sessions as another PID namespace numbers them (0: it has no number
        there): done to every part that names some."""
        return self._with_parts("renumbered", number)

    def _with_parts(self, method: str, argument: object) -> Self:
        """With all parts that have this method, also in tuples, replaced by what it returns."""
        changes: dict[str, Any] = {}
        for name, part in ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self)):
            if hasattr(part, method):
                changes[name] = getattr(part, method)(argument)
            elif isinstance(part, tuple) and any(hasattr(one, method) for one in part):
                changes[name] = tuple(getattr(one, method)(argument) for one in part)
        return dataclasses.replace(self, **changes) if changes else self


def set_flags(fd: int, flags: int) -> None:
    """Give the descriptor those status flags that can be given afterwards (not O_ASYNC: that comes with the owner)."""
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & SETTABLE_FLAGS)


_Kind = TypeVar("_Kind", bound=OpenFile)


class Rule(NamedTuple):
    """Which open files are of a kind: the shape of their link, their type (S_IFSOCK, ..), and whatever else holds of
    them; None: any."""

    link: re.Pattern[str] | None
    mode: int | None
    match: Callable[[FdView], bool] | None


_rules: dict[type[OpenFile], Rule] = {}


def register(
    kind: str, *, link: str | None = None, mode: int | None = None, match: Callable[[FdView], bool] | None = None
) -> Callable[[type[_Kind]], type[_Kind]]:
    """Class decorator: the class is a member of OpenFile called ``kind``, for files whose link matches the regular
    expression ``link``, whose type is ``mode`` (S_IFREG, ..) and for which ``match`` holds. Without any of the three
    nothing is captured as this kind by itself."""

    def add(cls: type[_Kind]) -> type[_Kind]:
        member(OpenFile, kind)(cls)
        if link is not None or mode is not None or match is not None:
            pattern = None if link is None else re.compile(link, re.DOTALL)
            _rules[cls] = Rule(pattern, mode, match)
        return cls

    return add


def rule_of(cls: type[OpenFile]) -> Rule | None:
    """What open files of the kind have in common; None: nothing is captured as this kind by itself."""
    return _rules.get(cls)


def kind_name(cls: type[OpenFile]) -> str:
    """What users read: the kind's name in records and verdicts."""
    return kind_of(cls)


def read_info(pid: int, fd: int) -> str:
    """The text of /proc/PID/fdinfo/FD."""
    # one of these per descriptor is read in the stop: without the layers of open()
    source = os.open(f"/proc/{pid}/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(source, _INFO_CHUNK):
            parts.append(part)
            # it is one record (fs/proc/fd.c, single_open), of which a read brings all that it has room for
            if len(part) < _INFO_CHUNK:
                break
    finally:
        os.close(source)
    return b"".join(parts).decode("ascii", "surrogateescape")


def parse_info(text: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """(lines, named values) of a fdinfo text. The entries of an epoll instance, of which there may be thousands, are
    lines only."""
    lines = tuple(text.splitlines())
    named = (line.partition(":") for line in lines if not line.startswith("tfd:"))
    return lines, {name: value.strip() for name, colon, value in named if colon}


_KINDS = ("FLOCK", "OFDLCK", "POSIX", "LEASE")
#: ``lock:\t1: POSIX  ADVISORY  WRITE 9569 fe:00:2147348 5 14`` (fs/locks.c, lock_get_status)
_LOCK = re.compile(r"lock:\s+\d+:\s+(\w+)\s+(\w+)\s+(\w+)\s+(-?\d+)\s+\S+\s+(\d+)\s+(\d+|EOF)")


def locks_of(lines: tuple[str, ...], object: str) -> list[tuple[str, PosixLock]]:
    """(FLOCK, OFDLCK, LEASE or POSIX; the lock) for each lock line of a fdinfo; UnsupportedLock for leases that are
    being broken, and delegations."""
    found = []
    for line in lines:
        if not line.startswith("lock:"):
            continue
        parts = _LOCK.match(line)
        if parts is None or parts[1] not in _KINDS or parts[3] not in ("READ", "WRITE") or parts[2] == "BREAKING":
            raise UnsupportedLock(f"lock of another kind: {line[5:].strip()}", object=object)
        start, last = int(parts[5]), parts[6]
        length = 0 if last == "EOF" else int(last) - start + 1
        mode = LockType.READ if parts[3] == "READ" else LockType.WRITE
        found.append((parts[1], PosixLock(type=mode, start=start, length=length)))
    return found
