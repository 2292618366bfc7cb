"""The plan of births (:mod:`checkpoint.tree`) carried out with stubs: the tree stands, as empty processes.

A stand-in for a session or group leader from outside the tree gets that leader's number if it is free here.  If not,
any number will do, and the user is told: the session or group then has another number than it had.

Source: kernel/fork.c (CLONE_PARENT), kernel/exit.c: a child's end leaves a SIGCHLD with its parent, which is taken
away again before the parent has its handlers.
"""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from checkpoint.errors import PidTaken
from checkpoint.files.terminal import PTMX, Pair, TtyCall, open_pair, open_slave
from checkpoint.kernel.clone import CloneFlag
from checkpoint.namespaces.users import UserSpace
from checkpoint.spawn import Stub, spawn_stub
from checkpoint.tree import Death, End, Fork, OwnPids, SetPgid, SetSid, Spawn, TakeTerminal, Task, Unshare, plan
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS

__all__ = ["Birth", "grow"]

_NO_WAIT: Final = struct.pack("<qq", 0, 0)  # struct timespec
_SIGSET_SIZE: Final = 8
_RLIMIT_CORE: Final = 4  # include/uapi/asm-generic/resource.h


class Birth(Protocol):
    """What is needed of a process's record."""

    @property
    def task(self) -> Task:
        """Its place in the tree."""
        ...

    @property
    def exit_signal(self) -> int:
        """What its parent is sent when it ends."""
        ...


def grow(
    records: Sequence[Birth],
    avoid: Iterable[tuple[int, int]],
    stubs: dict[int, Stub],
    warn: Callable[[str], None],
    terminals: dict[int, Pair],
    settle: Callable[[Stub], None] | None = None,
    users: UserSpace | None = None,
    ptmx: Callable[[], str] = lambda: PTMX,
) -> None:
    """Make a stub for every process, in its place of the tree; zombies die at the end.

    avoid  (start, end) of memory that the processes will need
    stubs  filled in as they are born, by PID: what is to be undone if this fails
    terminals  filled in, by number: the pseudo terminals that were opened for sessions
    settle  told each root when it is born, before it bears anybody: what it is made to enter its descendants inherit
    ptmx    what is opened for a pseudo terminal, once a root is born
    users   who has a PID namespace of its own is in there, too; the stubs get its keeper's pidfd

    PidTaken, SpawnFailed, UnsupportedSession, UnsupportedSharing.
    """
    _Grower(records, list(avoid), stubs, warn, terminals, settle, users, ptmx).run()


class _Grower:
    def __init__(
        self,
        records: Sequence[Birth],
        avoid: list[tuple[int, int]],
        stubs: dict[int, Stub],
        warn: Callable[[str], None],
        terminals: dict[int, Pair],
        settle: Callable[[Stub], None] | None,
        users: UserSpace | None,
        ptmx: Callable[[], str],
    ) -> None:
        self._ptmx = ptmx
        self._terminals = terminals
        self._users = users
        self._settle = settle
        self._records = {r.task.pid: r for r in records}
        self._avoid = avoid
        self._stubs = stubs
        self._warn = warn
        self._stand_ins: dict[int, Stub] = {}
        self._renumbered: dict[int, int] = {}

    def run(self) -> None:
        try:
            for step in plan(r.task for r in self._records.values()):
                match step:
                    case Spawn(pid, stand_in):
                        self._born(pid, stand_in, self._spawner())
                    case Fork(pid=pid, stand_in=stand_in):
                        self._born(pid, stand_in, self._forker(step))
                    case Unshare(pid, files, directories):
                        self._call(self._stub(pid), SYS.unshare, _shared(files=files, directories=directories))
                    case SetSid(pid):
                        self._call(self._stub(pid), SYS.setsid)
                    case OwnPids(pid):
                        if self._users is not None:
                            self._users.enter(self._stub(pid))
                        self._call(self._stub(pid), SYS.unshare, CloneFlag.NEWPID)
                    case TakeTerminal(pid, number):
                        self._take_terminal(self._stub(pid), number)
                    case SetPgid(pid, pgid):
                        self._call(self._stub(pid), SYS.setpgid, 0, self._number(pgid))
                    case End(pid, reaper):
                        self._end(self._stand_ins.pop(pid), reaper)
                    case Death(pid, parent, wait_code):
                        self._die(pid, parent, wait_code)
        finally:
            for stub in self._stand_ins.values():
                stub.kill()

    def _stub(self, pid: int) -> Stub:
        return self._stand_ins[pid] if pid in self._stand_ins else self._stubs[pid]

    def _number(self, pid: int) -> int:
        """The number here of a leader: of one that is gone it is the number that its group kept."""
        if pid in self._stand_ins:
            return self._stand_ins[pid].inner_pid
        return self._renumbered.get(pid, pid)

    def _born(self, pid: int, stand_in: bool, make: Callable[[int | None], Stub]) -> None:
        if not stand_in:
            self._stubs[pid] = stub = make(pid)
            if self._settle is not None and self._records[pid].task.ppid not in self._records:
                self._settle(stub)
            return
        try:
            self._stand_ins[pid] = make(pid if pid > 0 else None)
        except PidTaken:
            stub = make(None)
            self._stand_ins[pid] = stub
            self._renumbered[pid] = stub.inner_pid
            self._warn(
                f"the number {pid} of a session or group from outside the tree is taken here; it becomes "
                f"{stub.inner_pid}"
            )

    def _spawner(self) -> Callable[[int | None], Stub]:
        line = 0 if self._users is None else self._users.pid
        return lambda number: spawn_stub(number, self._avoid, line)

    def _forker(self, birth: Fork) -> Callable[[int | None], Stub]:
        flags = _shared(files=birth.files, directories=birth.directories)
        if birth.sibling:
            flags |= CloneFlag.PARENT
        record = self._records.get(birth.pid)
        exit_signal = signal.SIGCHLD if record is None else record.exit_signal
        return lambda number: self._stub(birth.creator).fork(number, flags, exit_signal=exit_signal)

    def _take_terminal(self, stub: Stub, number: int) -> None:
        master = open_pair(number, self._warn, self._ptmx())
        self._terminals[number] = pair = Pair(master, open_slave(master, os.O_RDWR))
        calls = CallTable()
        fd = calls.call(SYS.pidfd_getfd, stub.tool_pidfd, pair.slave, 0, label="taking a terminal")
        calls.call(SYS.ioctl, fd, TtyCall.TIOCSCTTY, 0, label="TIOCSCTTY")
        calls.call(SYS.close, fd, label="closing a terminal")
        stub.run(calls)

    @staticmethod
    def _call(stub: Stub, nr: int, *args: int) -> None:
        calls = CallTable()
        calls.call(nr, *args, label=SYS(nr).name)
        stub.run(calls)

    def _end(self, stub: Stub, reaper: int | None) -> None:
        """A stand-in leaves."""
        number = stub.inner_pid
        stub.exit(0)
        if reaper is not None:
            parent = self._stub(reaper)
            calls = CallTable()
            calls.call(SYS.wait4, number, 0, 0, 0, label="wait for a stand-in")
            _take_sigchld(calls)
            parent.run(calls)

    def _die(self, pid: int, parent: int, wait_code: int) -> None:
        """A stub becomes the zombie that its record tells of."""
        stub = self._stubs.pop(pid)
        if wait_code & 0x7F:
            # no core file of a stub, whatever the core pattern says
            calls = CallTable()
            calls.call(SYS.prlimit64, 0, _RLIMIT_CORE, calls.put(bytes(16)), 0, label="no core file")
            stub.run(calls)
            stub.die(wait_code & 0x7F)
        else:
            stub.exit(wait_code >> 8 & 0xFF)
        if parent in self._stubs:
            calls = CallTable()
            _take_sigchld(calls)
            self._stubs[parent].run(calls)


def _shared(*, files: bool, directories: bool) -> int:
    """What clone shares and unshare parts."""
    return (CloneFlag.FILES if files else 0) | (CloneFlag.FS if directories else 0)


def _take_sigchld(calls: CallTable) -> None:
    """Take away the SIGCHLD that a child's end has left; it is no error if there is none."""
    mask = calls.put(struct.pack("<Q", 1 << (signal.SIGCHLD - 1)))
    calls.call(SYS.rt_sigtimedwait, mask, 0, calls.put(_NO_WAIT), _SIGSET_SIZE, ignore=True, label="take SIGCHLD")
