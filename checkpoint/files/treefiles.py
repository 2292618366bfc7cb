"""What the open files of a tree are as a record of the image, and what listing them needs of processes and mappings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import field
from typing import NamedTuple, Protocol

from checkpoint.files.base import OpenFile, PosixLock
from checkpoint.files.content import Content
from checkpoint.files.epoll import EpollWatch
from tcpstate.slotted import dataclass

__all__ = [
    "AheadEpoll",
    "AheadFiles",
    "AheadPlace",
    "LastMapped",
    "LocksOfFile",
    "Mapping",
    "Numbered",
    "Owner",
    "TreeFiles",
]


class Owner(Protocol):
    """What is needed of a process (``tracee.Process`` has it)."""

    @property
    def pid(self) -> int: ...


class Numbered(NamedTuple):
    """A process of which only the number is known."""

    pid: int


class Mapping(Protocol):
    """What is needed of a mapping (``memory.vma.Vma`` has it)."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def shared(self) -> bool: ...
    @property
    def dev(self) -> int: ...
    @property
    def inode(self) -> int: ...
    @property
    def name(self) -> str: ...


class LastMapped:
    """The mapping that was added last, and the index of its file."""

    __slots__ = ("_end", "_file", "index")

    def __init__(self, pid: int, vma: Mapping, index: int) -> None:
        self._end = vma.end
        self._file = (pid, vma.shared, vma.dev, vma.inode, vma.name)
        self.index = index

    def continued_by(self, pid: int, vma: Mapping) -> bool:
        """Whether ``vma`` begins where this one ends, and is of the same file."""
        return vma.start == self._end and self._file == (pid, vma.shared, vma.dev, vma.inode, vma.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocksOfFile:
    """The record locks that a process has on one file.

    file   index of a description that the process has of the file
    locks  the ranges
    """

    file: int
    locks: tuple[PosixLock, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeFiles:
    """Everything that the processes of a tree hold open or mapped. One record of the image.

    files     one per open file description, and one per file that is only mapped
    contents  files whose bytes travel along
    tables    by PID: descriptor -> (index in files, close-on-exec)
    locks     by PID: record locks (F_SETLK)
    ahead     so many files were told before, in an :class:`AheadFiles`, and are not among ``files``, whose numbers go
              on from there; nor are descriptors in ``tables`` that were told with them
    gone      those of them that are not open any more
    moved_on  of plain files among them that are not where they were: position, bytes, time of modification
    staged    contents that were told before, too: index to number in CONTENTS
    """

    files: list[OpenFile]
    contents: list[Content]
    tables: dict[int, dict[int, tuple[int, bool]]]
    locks: dict[int, list[LocksOfFile]] = field(default_factory=dict)
    ahead: int = 0
    gone: tuple[int, ...] = ()
    moved_on: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    staged: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = self.ahead + len(self.files)
        for pid, table in self.tables.items():
            # there may be thousands, and everything stands still: the lowest and the highest tell of all
            indexes = [index for index, _ in table.values()]
            if not table or (0 <= min(table) <= max(table) < 1 << 30 and 0 <= min(indexes) <= max(indexes) < count):
                continue
            for fd, index in zip(table, indexes, strict=True):
                if not 0 <= fd < 1 << 30 or not 0 <= index < count:
                    raise ValueError(f"pid {pid} fd {fd} leads to file {index} of {count}")
        for pid, held in self.locks.items():
            for lock in held:
                if not 0 <= lock.file < count:
                    raise ValueError(f"pid {pid} has locks on file {lock.file} of {count}")
        if self.ahead < 0 or any(not 0 <= index < self.ahead for index in (*self.gone, *self.moved_on)):
            raise ValueError("files that were told ahead are out of range")
        contents = range(len(self.contents))
        if any(index not in contents for index in self.staged) or len({*self.staged.values()}) != len(self.staged):
            raise ValueError("contents that were told ahead are out of range, or two are the same")

    def renumbered(self, number: Callable[[int], int]) -> TreeFiles:
        """With processes, groups and sessions as another PID namespace numbers them."""
        return dataclasses.replace(
            self,
            files=[file.renumbered(number) for file in self.files],
            tables={number(pid): table for pid, table in self.tables.items()},
            locks={number(pid): held for pid, held in self.locks.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AheadPlace:
    """The only descriptor of a file that is told ahead."""

    pid: int
    fd: int
    cloexec: bool

    def __post_init__(self) -> None:
        if self.pid <= 0 or not 0 <= self.fd < 1 << 30:
            raise ValueError(f"pid {self.pid} fd {self.fd} is out of range")


@dataclass(frozen=True, slots=True, kw_only=True)
class AheadEpoll:
    """An epoll instance, as far as it watches connections that are told ahead.

    watches  by the only descriptors of those
    """

    pid: int
    fd: int
    cloexec: bool
    watches: tuple[EpollWatch, ...]

    def __post_init__(self) -> None:
        if self.pid <= 0 or not 0 <= self.fd < 1 << 30:
            raise ValueError(f"pid {self.pid} fd {self.fd} is out of range")
        if len({watch.number for watch in self.watches}) != len(self.watches):
            raise ValueError("an epoll instance watches a number twice")


@dataclass(frozen=True, slots=True, kw_only=True)
class AheadFiles:
    """Files of processes that run, told before the stop. The first files of the tree.

    files    idle connections with their records; behind them plain files (:mod:`checkpoint.files.plain`)
    places   where each of them is
    epolls   those that watch them
    read_at  when their clocks were read: CLOCK_MONOTONIC of the source, nanoseconds; on the line of the host that
             builds them, as far as the source could know
    """

    files: list[OpenFile]
    places: list[AheadPlace]
    read_at: int
    epolls: list[AheadEpoll] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.files) != len(self.places) or not 0 <= self.read_at < 1 << 62:
            raise ValueError("files and their places do not agree, or a clock cannot show that")
        numbers = [(place.pid, place.fd) for place in self.places]
        if len({*numbers, *((one.pid, one.fd) for one in self.epolls)}) != len(numbers) + len(self.epolls):
            raise ValueError("two files have one place")
        for epoll in self.epolls:
            for watch in epoll.watches:
                if (
                    watch.file >= len(numbers)
                    or numbers[watch.file] != (watch.pid, watch.number)
                    or watch.pid != epoll.pid
                ):
                    raise ValueError("an epoll instance watches what is not told")
