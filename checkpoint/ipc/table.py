"""The System V semaphores and message queues of a tree: found, judged, captured, made again, removed.

::

    verdicts    before the stop
    Objects     in the stop, and before it
    check, make at the target: IDs and keys are free; they are there, with all that is in them
    used        the rebuilt processes have their part in them
    remove      at the source, when the processes are gone; at the target, if the rebuild is given up

A kind is added by a module with its class and one line here.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from checkpoint import procfs
from checkpoint.errors import IpcNotMade, IpcShared, IpcTaken, NoSuchProcess, StateUnreadable
from checkpoint.ipc.base import SystemV
from checkpoint.ipc.queues import MessageQueue
from checkpoint.ipc.semaphores import SemaphoreSet
from checkpoint.kernel.sysvipc import Listed
from checkpoint.namespaces.spaces import Kind, own_kinds
from checkpoint.verdict import Status, Verdict
from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.calls import CallError

if TYPE_CHECKING:
    from checkpoint.spawn import Stub

__all__ = ["KINDS", "Objects", "check", "make", "remove", "remove_noted", "used", "verdicts"]

_log = logging.getLogger(__name__)

KINDS: Final[tuple[type[SystemV], ...]] = (SemaphoreSet, MessageQueue)

#: objects of a tree, as they were told before its stop: (what, ID)
_Known = frozenset[tuple[str, int]]

#: a note of what was made, or is to go: this, the kind, its ID
_NOTE: Final = "/proc/sysvipc/"


def _waiting(pids: Iterable[int]) -> dict[tuple[int, int], set[int]]:
    """(call, its first argument) -> the processes that are in such a call."""
    found: dict[tuple[int, int], set[int]] = {}
    for pid in pids:
        try:
            tids = procfs.threads(pid)
        except NoSuchProcess:
            continue
        for tid in tids:
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{tid}/syscall", encoding="ascii") as file:
                words = file.read().split()
                if len(words) > 2 and words[0].isdigit():
                    found.setdefault((int(words[0]), int(words[1], 16)), set()).add(pid)
    return found


def _of_tree(
    pids: Sequence[int], before: _Known = frozenset(), *, whole: bool = False
) -> list[tuple[type[SystemV], Listed, set[int]]]:
    """(kind, object, its living users outside of the tree) of each object that the tree uses, or used ``before``.

    whole  the IPC namespace is the tree's own: all objects in it are
    """
    listed = [(kind, one) for kind in KINDS for one in kind.listed()]
    if not listed:
        return []
    waiting = _waiting(pids)
    found = []
    for kind, one in listed:
        try:
            users = kind.users(one, pids)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EIDRM):
                continue  # it is gone
            raise
        for call in kind.waits:
            users |= waiting.get((call, one.number), set())
        if whole or users & set(pids) or (kind.what, one.number) in before:
            found.append((kind, one, {pid for pid in users - set(pids) if procfs.lives(pid)}))
    return found


def _shared(kind: type[SystemV], one: Listed, others: set[int]) -> IpcShared:
    names = ", ".join(f"pid {pid}" for pid in sorted(others))
    return IpcShared(f"it is used by {names} outside of the tree, too", object=f"{kind.what} {one.number}")


def verdicts(pids: Sequence[int], *, whole: bool = False) -> list[Verdict]:
    """One verdict for each object that the tree uses; ``whole``: all that are in its own namespace."""
    try:
        objects = _of_tree(pids, whole=whole)
    except KernelFeatureMissing as error:
        return [Verdict.refuse(error, "semaphores")]
    found = []
    for kind, one, others in objects:
        if others:
            found.append(Verdict.refuse(_shared(kind, one, others), kind.what))
        else:
            text = f"{one.count} {'semaphores' if kind is SemaphoreSet else 'messages'}"
            found.append(Verdict(subject=f"{kind.what} {one.number}", kind=kind.what, status=Status.OK, text=text))
    return found


class Objects:
    """The objects of a tree on its way out.

    records  what :meth:`capture` found
    whole    the IPC namespace is the tree's own, as :meth:`look` has found: all objects in it are, and go with it
    """

    def __init__(self) -> None:
        self.records: tuple[SystemV, ...] = ()
        self.whole = False
        self._before: _Known = frozenset()

    def look(self, pids: Sequence[int]) -> None:
        """While the processes run, the first of them the root: who waits in an object shows only now.
        KernelFeatureMissing."""
        self.whole = bool(pids) and Kind.IPC in own_kinds(pids[0])
        self._before = frozenset((kind.what, one.number) for kind, one, _ in _of_tree(pids, whole=self.whole))

    def capture(self, pids: Sequence[int]) -> None:
        """The processes stand still. IpcShared, StateUnreadable, KernelFeatureMissing."""
        found = []
        for kind, one, others in _of_tree(pids, self._before, whole=self.whole):
            if others:
                raise _shared(kind, one, others)
            try:
                found.append(kind.capture(one, pids))
            except OSError as error:
                name = f"{kind.what} {one.number}"
                raise StateUnreadable(f"it cannot be read: {error.strerror}", object=name) from error
        self.records = tuple(found)

    def notes(self, segments: Iterable[str]) -> list[str]:
        """What :func:`remove_noted` knows them by, with the notes of shared memory segments; of a namespace that goes
        with the tree nothing has to be removed."""
        return [] if self.whole else [*segments, *map(_note, self.records)]

    def remove(self) -> None:
        """The processes are gone, and their copies are elsewhere or in an image. May be repeated."""
        remove(self.records)
        self.records = ()


def _note(one: SystemV) -> str:
    return f"{_NOTE}{one.option}/{one.number}"


def check(objects: Iterable[SystemV]) -> None:
    """IpcTaken if an ID or a key is in use here."""
    for kind in KINDS:
        mine = [one for one in objects if isinstance(one, kind)]
        if not mine:
            continue
        there = kind.listed()
        numbers, keys = {one.number for one in there}, {one.key for one in there if one.key}
        for one in mine:
            if one.number in numbers:
                raise _taken(one, "its ID")
            if one.key in keys:
                raise _taken(one, "its key")


def _taken(one: SystemV, what: str) -> IpcTaken:
    return IpcTaken(f"there is one with {what} here", object=one.name, fix=f"See `ipcs {one.option}`; `ipcrm` removes.")


def make(objects: Iterable[SystemV], note: Callable[[str], None] | None, undo: Callable[[SystemV], None]) -> None:
    """Make them, with what is in them. IpcTaken, IpcNotMade.

    note  told what outlasts us, before it is made
    undo  told of each that was made
    """
    for one in objects:
        if note is not None:
            note(_note(one))
        try:
            if not one.create():
                raise _taken(one, "its ID")
            undo(one)
            one.fill()
        except OSError as error:
            if error.errno == errno.EEXIST:
                raise _taken(one, "its key") from error
            raise IpcNotMade(f"{error.strerror}", object=one.name) from error


def used(objects: Iterable[SystemV], stubs: Mapping[int, Stub]) -> None:
    """Give the rebuilt processes their part in them: before their credentials. IpcNotMade."""
    for one in objects:
        try:
            one.used(stubs)
        except CallError as error:
            raise IpcNotMade(f"cannot {error.label}: {os.strerror(error.errno or 0)}", object=one.name) from error


def remove(objects: Iterable[SystemV]) -> None:
    """Nobody needs them any more. May be repeated."""
    for one in objects:
        _remove(type(one), one.number)


def _remove(kind: type[SystemV], number: int) -> bool:
    """Whether it was there."""
    try:
        kind.remove(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EIDRM):
            _log.warning("the %s %d cannot be removed: %s", kind.what, number, error.strerror)
        return False
    return True


def remove_noted(path: str) -> bool | None:
    """Remove what such a note names; whether there was anything. None if the path is not such a note."""
    for kind in KINDS:
        start = f"{_NOTE}{kind.option}/"
        if path.startswith(start):
            return _remove(kind, int(path[len(start) :]))
    return None
