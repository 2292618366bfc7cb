"""The plan of a kind of System V object: a record, how it is captured, how it is made again.

An object belongs to no process, and the kernel tells only who used it last.  It is a tree's if one of the tree's
processes did, or waits in it; and it moves only if nobody else who lives is known to use it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from checkpoint.kernel.sysvipc import Listed
from tcpstate.codec import family
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.spawn import Stub

__all__ = ["SystemV"]

_ID_MAX = (1 << 31) - 1


@family
@dataclass(frozen=True, slots=True, kw_only=True)
class SystemV(abc.ABC):
    """One object.

    number   its ID
    key      as given to semget or msgget; 0: none (IPC_PRIVATE)
    mode     permission bits
    uid      its owner, and ``gid``
    """

    number: int
    key: int
    mode: int
    uid: int
    gid: int

    #: what people call it
    what: ClassVar[str]
    #: what ipcs and ipcrm call it
    option: ClassVar[str]
    #: which words of /proc/PID/syscall name its ID: the numbers of calls that wait in it
    waits: ClassVar[frozenset[int]]

    def __post_init__(self) -> None:
        if not 0 <= self.number <= _ID_MAX or not -_ID_MAX - 1 <= self.key <= _ID_MAX or not 0 <= self.mode <= 0o777:
            raise ValueError("ID, key or mode out of range")
        if not 0 <= self.uid < 1 << 32 or not 0 <= self.gid < 1 << 32:
            raise ValueError("owner out of range")
        self.validate()

    @property
    def name(self) -> str:
        """The subject of errors."""
        return f"{self.what} {self.number}, key {self.key & 0xFFFFFFFF:#010x}"

    @abc.abstractmethod
    def validate(self) -> None:
        """ValueError if the kind's own fields are out of range: records may come from anywhere."""

    @abc.abstractmethod
    def renumbered(self, number: Callable[[int], int]) -> Self:
        """With its users as another PID namespace numbers them; 0: not at all."""

    @classmethod
    @abc.abstractmethod
    def listed(cls) -> list[Listed]:
        """All that there are in this IPC namespace."""

    @classmethod
    @abc.abstractmethod
    def users(cls, one: Listed, pids: Sequence[int]) -> set[int]:
        """The processes that are known to use it, whoever they are; ``pids`` are the tree's."""

    @classmethod
    @abc.abstractmethod
    def capture(cls, one: Listed, pids: Sequence[int]) -> Self:
        """The record of one that nobody outside of the stopped tree uses. OSError."""

    @abc.abstractmethod
    def create(self) -> bool:
        """Make it; False if the ID is taken. OSError (EEXIST: the key is)."""

    @abc.abstractmethod
    def fill(self) -> None:
        """Give it what is in it. OSError."""

    @abc.abstractmethod
    def used(self, stubs: Mapping[int, Stub]) -> None:
        """Let the rebuilt processes have used it, by the PIDs of the source. CallError."""

    @classmethod
    @abc.abstractmethod
    def remove(cls, number: int) -> None:
        """Take it away. OSError."""
