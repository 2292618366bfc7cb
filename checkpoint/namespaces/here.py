"""What we call the processes of a tree that has a PID namespace of its own.

Source: /proc/PID/status, ``NSpid``, ``NSpgid``, ``NSsid``: a number for each PID namespace, ours first, the process's
own last; 0 of a group or session that has none there (fs/proc/array.c, task_state).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from checkpoint import procfs

__all__ = ["number_here", "pairs_of"]

_LINES = ("NSpid", "NSpgid", "NSsid")


def pairs_of(pid: int, tid: int | None = None) -> Iterator[tuple[int, int]]:
    """(our number, its own) of a process or thread, its group and its session."""
    status = procfs.read_status(pid, tid)
    for line in _LINES:
        numbers = status[line].split()
        yield int(numbers[0]), int(numbers[-1])


class _Numbered(Protocol):
    @property
    def pid(self) -> int: ...


def number_here(stubs: Mapping[int, _Numbered], number: int) -> int:
    """What we call a process, thread, group or session of a tree that is being rebuilt.

    stubs  its processes, by the tree's own numbers

    0 if it is not there, and the tree is in a PID namespace of its own; else the number itself.
    """
    if not number or all(stub.pid == pid for pid, stub in stubs.items()):
        return number
    if number in stubs:
        return stubs[number].pid
    for stub in stubs.values():
        for tid in procfs.threads(stub.pid):
            for ours, theirs in pairs_of(stub.pid, tid):
                if theirs == number:
                    return ours
    return 0
