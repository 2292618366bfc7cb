"""Giving a new process its descriptors, by calls injected in it.

The process takes each file out of ours with pidfd_getfd, which always returns the lowest free number; dup3 moves it to
the right one. So the numbers are filled from the lowest up, and which number comes is known beforehand: where it is the
wanted one already, dup3 to itself would fail.

Epoll registrations are made here as well, since the number under which a file is added is part of the key. An entry
whose number leads elsewhere by now is made first, while that number is still free.

Record locks come last: closing any descriptor of a file drops the process's locks on it. So this whole step comes after
the mappings are made.
"""

from __future__ import annotations

import signal
import struct
from typing import Final, Protocol

from checkpoint.errors import BadFileRecord, LockTaken
from checkpoint.files.abi import (
    EPOLL_CTL_ADD,
    EPOLL_CTL_DEL,
    EPOLL_CTL_MOD,
    EpollEvent,
    EpollFlag,
    Fcntl,
    FileFlag,
    Flock,
    LockType,
)
from checkpoint.files.descriptors import allow, gaps
from checkpoint.files.epoll import Epoll, EpollWatch, fired
from checkpoint.files.pty import PtyMaster
from checkpoint.files.rebuild import Rebuilder
from checkpoint.files.terminal import TtyCall
from tcpstate.kernel.calls import CallTable, Result
from tcpstate.kernel.machine import SYS

__all__ = ["Installation", "Target", "install"]

_ALL: Final = 0xFFFFFFFF
#: numbers above the process's own that the work needs: our pidfd, an epoll instance
_WORKING_NUMBERS: Final = 2


class Target(Protocol):
    """What is needed of a new process (``spawn.Stub`` has it)."""

    @property
    def pid(self) -> int: ...
    @property
    def tool_pidfd(self) -> int: ...
    def run(self, table: CallTable) -> None: ...


def install(rebuilder: Rebuilder, pid: int, stub: Target, *, shared: bool = False) -> None:
    """Give the process that is ``pid`` in the image its descriptors, and nothing else. Its mappings are made.

    shared  it has the table of another, and comes before that one: all it does is to tell its terminal what is in front
    """
    calls = CallTable()
    work = Installation(calls, rebuilder, pid, stub.tool_pidfd, shared=shared)
    allow(stub.pid, work.highest)
    stub.run(calls)
    again = CallTable()
    work.settle(again)
    if len(again):
        stub.run(again)


class Installation:
    """The calls for one process.

    pid    of the process in the image
    pidfd  number, in the new process, of a pidfd of ours
    shared  its descriptors are another's
    """

    def __init__(self, calls: CallTable, rebuilder: Rebuilder, pid: int, pidfd: int, *, shared: bool = False) -> None:
        self._calls = calls
        self._host = rebuilder
        self._pid = pid
        self._table = rebuilder.records.tables.get(pid, {})
        #: descriptors that it has already, of what was told ahead
        self._kept = {} if shared else rebuilder.standing.kept(pid)
        self._deaf_candidates: set[tuple[int, int]] = set()
        self._special, self._ordinary = self._watches()
        special = max((watch.number for _, watch in self._special), default=-1)
        #: our pidfd's place during the work: above all numbers of the process
        self._tool = max(max(self._table, default=-1), special) + 1
        self._work = self._tool + 1
        self._pidfd = pidfd
        self._deaf: list[tuple[Result, int, EpollWatch]] = []
        self._record_locks: list[tuple[Result, int]] = []
        self._foreground: list[tuple[Result, PtyMaster]] = []
        if shared:
            self._tool = pidfd
            self._terminals()
        else:
            self._fill()

    @property
    def highest(self) -> int:
        """The highest number that the calls use."""
        return self._tool + _WORKING_NUMBERS

    def _watches(self) -> tuple[list[tuple[int, EpollWatch]], list[tuple[int, EpollWatch]]]:
        """(special, ordinary) entries of epoll instances that this process adds: (index of the instance, entry)."""
        special: list[tuple[int, EpollWatch]] = []
        ordinary: list[tuple[int, EpollWatch]] = []
        held: set[int] = set()
        for index, record in enumerate(self._host.later, self._host.first):
            if not isinstance(record, Epoll):
                continue
            held = held or {file for file, _ in self._table.values()}
            for watch in record.watches:
                if watch.pid == self._pid:
                    place = self._table.get(watch.number)
                    usual = index in held and place is not None and place[0] == watch.file
                    (ordinary if usual and not fired(watch) else special).append((index, watch))
                    if usual and fired(watch):
                        self._deaf_candidates.add((index, watch.number))
        # those that have fired come first: nothing else may be ready when they fire again
        special.sort(key=lambda pair: not fired(pair[1]))
        return special, ordinary

    def _call(self, label: str, number: SYS, *args: int | Result) -> Result:
        return self._calls.call(number, *args, label=f"{label} of pid {self._pid}")

    def _fill(self) -> None:
        if self._pidfd != self._tool:
            self._call("moving our pidfd", SYS.dup3, self._pidfd, self._tool, FileFlag.CLOEXEC)
        self._drop_watches()
        for start, end in gaps(self._kept, self._tool):
            self._call("closing descriptors", SYS.close_range, start, end - 1, 0)
        self._call("closing descriptors", SYS.close_range, self._tool + 1, _ALL, 0)
        for index, watch in self._special:
            self._special_watch(index, watch)
        where = self._descriptors()
        for index, watch in self._ordinary:
            self._control(self._calls, EPOLL_CTL_ADD, where[index], watch, watch.events)
        self._terminals()
        self._deaf = [(count, where[index], watch) for count, index, watch in self._deaf]
        self._call("closing our pidfd", SYS.close, self._tool)
        self._locks()

    def _drop_watches(self) -> None:
        """What an epoll instance that stands already watches no more, while numbers and files are still as told."""
        for epoll, fd in self._host.standing.epolls(self._pid):
            for number in epoll.dropped:
                # it is gone by itself, if its file has no other descriptor
                label = f"epoll entry {number}"
                self._calls.call(SYS.epoll_ctl, fd, EPOLL_CTL_DEL, number, 0, ignore=True, label=label)

    def _fetch(self, index: int) -> Result:
        fd = self._host.descriptor(index)
        return self._call(f"taking {self._host.name(index)}", SYS.pidfd_getfd, self._tool, fd, 0)

    def _descriptors(self) -> dict[int, int]:
        """Every descriptor at its number; where each file is."""
        where = {index: number for number, index in self._kept.items()}
        taken = {self._tool, *self._kept}
        lowest = 0
        for number in sorted(self._table.keys() - self._kept.keys()):
            index, cloexec = self._table[number]
            flags = FileFlag.CLOEXEC if cloexec else 0
            while lowest in taken:
                lowest += 1
            if index in where:
                self._call(f"fd {number}", SYS.dup3, where[index], number, flags)
            else:
                got = self._fetch(index)
                if lowest == number:
                    # what pidfd_getfd returns is close-on-exec
                    if not cloexec:
                        self._call(f"fd {number}", SYS.fcntl, number, Fcntl.SETFD, 0)
                else:
                    self._call(f"fd {number}", SYS.dup3, got, number, flags)
                    self._call(f"closing after fd {number}", SYS.close, got)
                where[index] = number
            taken.add(number)
        return where

    def _special_watch(self, index: int, watch: EpollWatch) -> None:
        # The table is empty but for our pidfd, far above: what is taken comes as 0.
        self._call("epoll instance", SYS.dup3, self._fetch(index), self._work, FileFlag.CLOEXEC)
        self._call("epoll instance", SYS.close, 0)
        self._fetch(watch.file)
        if watch.number:
            self._call("watched file", SYS.dup3, 0, watch.number, FileFlag.CLOEXEC)
            self._call("watched file", SYS.close, 0)
        if (index, watch.number) in self._deaf_candidates:
            # A one-shot entry that has fired is deaf until the application arms it. Adding an entry arms it: so it is
            # added for anything and made to fire at once, if the file is ready for something. If not: settle().
            anything = watch.events | EpollFlag.IN | EpollFlag.OUT
            self._control(self._calls, EPOLL_CTL_ADD, self._work, watch, anything)
            event = self._calls.room(EpollEvent.FORMAT.size)
            count = self._calls.call(SYS.epoll_pwait, self._work, event, 1, 0, 0, ignore=True, label="epoll entry")
            self._deaf.append((count, index, watch))
        else:
            self._control(self._calls, EPOLL_CTL_ADD, self._work, watch, watch.events)
        self._call("watched file", SYS.close, watch.number)
        self._call("epoll instance", SYS.close, self._work)

    def _control(self, calls: CallTable, what: int, instance: int, watch: EpollWatch, events: int) -> None:
        event = calls.put(EpollEvent(events=events, data=watch.data).pack())
        calls.call(SYS.epoll_ctl, instance, what, watch.number, event, label=f"epoll entry {watch.number}")

    def _terminals(self) -> None:
        """The session that this process leads tells its terminal which group is in front."""
        for index, record in enumerate(self._host.later, self._host.first):
            if not isinstance(record, PtyMaster) or not record.session:
                continue
            if record.session == self._pid and record.number in self._host.terminals:
                pair = self._host.terminals[record.number]
                fd = self._call("a terminal", SYS.pidfd_getfd, self._tool, pair.slave, 0)
                group = self._calls.put(struct.pack("<i", record.foreground))
                label = f"foreground group of {self._host.name(index)}"
                done = self._calls.call(SYS.ioctl, fd, TtyCall.TIOCSPGRP, group, ignore=True, label=label)
                self._foreground.append((done, record))
                self._call("a terminal", SYS.close, fd)
            # its size was set when the leader's group was in front: nobody has to hear of that
            mask = self._calls.put(struct.pack("<Q", 1 << (signal.SIGWINCH - 1)))
            wait = self._calls.put(bytes(16))
            self._calls.call(SYS.rt_sigtimedwait, mask, 0, wait, 8, ignore=True, label="take SIGWINCH")

    def _locks(self) -> None:
        for held in self._host.records.locks.get(self._pid, []):
            numbers = [n for n, (index, _) in sorted(self._table.items()) if index == held.file]
            if not numbers:
                raise BadFileRecord("a record lock on a file that is not open", object=f"pid {self._pid}")
            for lock in held.locks:
                kind = LockType(lock.type)
                region = self._calls.put(Flock(type=kind, start=lock.start, length=lock.length).pack())
                label = f"record lock on fd {numbers[0]}"
                done = self._calls.call(SYS.fcntl, numbers[0], Fcntl.SETLK, region, ignore=True, label=label)
                self._record_locks.append((done, numbers[0]))

    def settle(self, calls: CallTable) -> None:
        """What follows from how the first calls went: entries that could not fire wait for errors only, and a lock that
        somebody else holds (on a shared file system, the original) is told."""
        for count, instance, watch in self._deaf:
            if count.value != 1:
                self._control(calls, EPOLL_CTL_MOD, instance, watch, watch.events)
        for done, record in self._foreground:
            if not done.ok:
                self._host.warn(
                    f"/dev/pts/{record.number}: the group {record.foreground} is not there to be in its foreground"
                )
        for done, number in self._record_locks:
            if not done.ok:
                self._host.warn(
                    str(LockTaken("a record lock could not be taken", object=f"pid {self._pid} fd {number}"))
                )
