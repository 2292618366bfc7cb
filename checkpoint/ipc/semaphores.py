"""System V semaphores: a set, its values, who used each last, and what is undone when a process ends (SEM_UNDO).

A process is given its adjustments by an operation that is undone and one that is not, in one call, so that the value
stays what it is; and it has been the last user after an operation and its contrary.

Source: ipc/sem.c.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Final, Self

from checkpoint.ipc.base import SystemV
from checkpoint.kernel import sem_undo, sysvipc
from checkpoint.kernel.sysvipc import SEMBUF, Listed, SemFlag
from tcpstate.codec import member
from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.spawn import Stub

__all__ = ["SemaphoreSet", "Undo"]

#: SEMVMX
_HIGHEST: Final = 32767
#: SEMMSL at its largest, include/uapi/linux/sem.h
_MOST: Final = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Undo:
    """What is added to one semaphore of a set when a process ends."""

    pid: int
    place: int
    add: int

    def __post_init__(self) -> None:
        if self.pid <= 0 or not 0 <= self.place < _MOST or not 0 < abs(self.add) <= _HIGHEST:
            raise ValueError("process, semaphore or adjustment out of range")


@member(SystemV, "semaphores")
@dataclass(frozen=True, slots=True, kw_only=True)
class SemaphoreSet(SystemV):
    """One set.

    values  of each semaphore
    last    the process that changed each last; 0: none of the tree
    undo    what is undone at the end of the tree's processes
    """

    what: ClassVar[str] = "semaphore set"
    option: ClassVar[str] = "-s"
    waits: ClassVar[frozenset[int]] = frozenset({SYS.semop, SYS.semtimedop})

    values: tuple[int, ...]
    last: tuple[int, ...]
    undo: tuple[Undo, ...] = ()

    def validate(self) -> None:
        if not 0 < len(self.values) == len(self.last) <= _MOST or not all(0 <= v <= _HIGHEST for v in self.values):
            raise ValueError("semaphores out of range")
        if any(pid < 0 for pid in self.last) or any(one.place >= len(self.values) for one in self.undo):
            raise ValueError("a user of a semaphore out of range")

    def renumbered(self, number: Callable[[int], int]) -> Self:
        undo = tuple(dataclasses.replace(one, pid=number(one.pid)) for one in self.undo)
        return dataclasses.replace(self, last=tuple(map(number, self.last)), undo=undo)

    @classmethod
    def listed(cls) -> list[Listed]:
        return sysvipc.list_sets()

    @classmethod
    def users(cls, one: Listed, pids: Sequence[int]) -> set[int]:
        last = set(sysvipc.last_users(one.number, one.count)) - {0}
        return last | {undo.pid for undo in _undo(one, pids)}

    @classmethod
    def capture(cls, one: Listed, pids: Sequence[int]) -> Self:
        last = sysvipc.last_users(one.number, one.count)
        undo = tuple(_undo(one, pids))
        if undo and one.count > sem_undo.LONGEST:
            raise KernelFeatureMissing(
                f"what is to be undone is read of {sem_undo.LONGEST} semaphores at most, the set has {one.count}",
                object=f"{cls.what} {one.number}",
            )
        return cls(
            number=one.number,
            key=one.key,
            mode=one.mode,
            uid=one.uid,
            gid=one.gid,
            values=sysvipc.values(one.number, one.count),
            last=tuple(pid if pid in pids else 0 for pid in last),
            undo=undo,
        )

    def create(self) -> bool:
        return sysvipc.create_set(self.number, self.key, len(self.values), self.mode)

    def fill(self) -> None:
        sysvipc.set_values(self.number, self.values)
        sysvipc.change_set(self.number, self.uid, self.gid, self.mode)

    def used(self, stubs: Mapping[int, Stub]) -> None:
        # first what is undone, of all processes, then who was the last: the one makes another the last
        for pid in {one.pid for one in self.undo} & set(stubs):
            mine = [one for one in self.undo if one.pid == pid]
            self._operate(stubs[pid], [_kept(one.place, one.add) for one in mine])
        for pid in set(self.last) & set(stubs):
            mine_last = [place for place, last in enumerate(self.last) if last == pid]
            self._operate(stubs[pid], [_touched(place, self.values[place]) for place in mine_last])

    def _operate(self, stub: Stub, operations: Iterable[bytes]) -> None:
        calls = CallTable()
        for each in operations:
            count = len(each) // SEMBUF.size
            calls.call(SYS.semop, self.number, calls.put(each), count, label=f"semop of {self.name}")
        stub.run(calls)

    @classmethod
    def remove(cls, number: int) -> None:
        sysvipc.remove_set(number)


def _kept(place: int, add: int) -> bytes:
    """Operations after which ``add`` is added at the process's end, and nothing is changed now."""
    undone = SEMBUF.pack(place, -add, SemFlag.NOWAIT | SemFlag.UNDO)
    other = SEMBUF.pack(place, add, SemFlag.NOWAIT)
    # neither below zero on the way, nor (but for values near the limit) above what a semaphore holds
    return other + undone if add > 0 else undone + other


def _touched(place: int, value: int) -> bytes:
    """Operations that change nothing, but have been made."""
    up, down = SEMBUF.pack(place, 1, SemFlag.NOWAIT), SEMBUF.pack(place, -1, SemFlag.NOWAIT)
    return up + down if value < _HIGHEST else down + up


def _undo(one: Listed, pids: Sequence[int]) -> list[Undo]:
    """What the tree's processes will undo of one set."""
    found = []
    for pid in pids:
        try:
            told = sem_undo.adjustments(pid)
        except ProcessLookupError:
            continue  # it has just ended
        for number, adjustments in told:
            if number == one.number:
                known = enumerate(adjustments[: one.count])
                found += [Undo(pid=pid, place=place, add=add) for place, add in known if add]
    return found
