"""What the open files of a tree are as a record of the image, and what listing them needs of processes and mappings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from checkpoint.files.base import OpenFile, PosixLock
from checkpoint.files.content import Content

__all__ = ["LocksOfFile", "Mapping", "Owner", "TreeFiles"]


class Owner(Protocol):
    """What is needed of a process (``tracee.Process`` has it)."""

    @property
    def pid(self) -> int: ...


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
    """

    files: list[OpenFile]
    contents: list[Content]
    tables: dict[int, dict[int, tuple[int, bool]]]
    locks: dict[int, list[LocksOfFile]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pid, table in self.tables.items():
            for fd, (index, _) in table.items():
                if not 0 <= fd < 1 << 30 or not 0 <= index < len(self.files):
                    raise ValueError(f"pid {pid} fd {fd} leads to file {index} of {len(self.files)}")
        for pid, held in self.locks.items():
            for lock in held:
                if not 0 <= lock.file < len(self.files):
                    raise ValueError(f"pid {pid} has locks on file {lock.file} of {len(self.files)}")

    def renumbered(self, number: Callable[[int], int]) -> TreeFiles:
        """With processes, groups and sessions as another PID namespace numbers them."""
        return TreeFiles(
            files=[file.renumbered(number) for file in self.files],
            contents=self.contents,
            tables={number(pid): table for pid, table in self.tables.items()},
            locks={number(pid): held for pid, held in self.locks.items()},
        )
