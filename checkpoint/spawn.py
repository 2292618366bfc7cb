"""Stubs: the processes that rebuilt ones start as.

A stub is born with the PID that is wanted, by clone3 and exec of a program of one page in which nothing happens.  It is
made by machine code in our own process: the child borrows our memory until its exec and runs no Python.  Then it is
stopped, and calls injected into it make of it what it shall be; other processes and threads are cloned by it.

Should the tool die, so do the stubs (PTRACE_O_EXITKILL), until :meth:`Stub.survive_tool`.  Before they are traced they
watch the tool themselves, by a pidfd.

All that is ours in a stub lies in its *window*, a range of addresses that is free in every process to be rebuilt.

Source: clone3(2), execveat(2), ptrace(2), kernel/pid.c (set_tid).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Self

from checkpoint import births, procfs, waiting
from checkpoint.arch import SPAWN, USER_END, stub_elf
from checkpoint.errors import AddressGapMissing, PidTaken, SpawnFailed
from checkpoint.inject import Injection
from checkpoint.kernel import ptrace
from checkpoint.kernel.clone import (
    AT_EMPTY_PATH,
    CLONE_ARGS_SIZE,
    SET_TID_OFFSET,
    THREAD,
    CloneArgs,
    CloneFlag,
    pack_tids,
)
from checkpoint.kernel.program import executable
from checkpoint.kernel.ptrace import Option
from checkpoint.lastpid import TRIES, next_is
from checkpoint.memory.vma import PAGE
from checkpoint.stubinjection import StubInjection
from checkpoint.thread import Thread, signal_of, wait_status
from checkpoint.tracee import Process
from tcpstate.kernel.batch import libc, syscall
from tcpstate.kernel.calls import CallError, CallTable
from tcpstate.kernel.machine import SYS

if TYPE_CHECKING:
    from checkpoint.namespaces.users import Users
    from checkpoint.state.base import State
    from checkpoint.state.table import ProcessState

__all__ = ["Stub", "find_gap", "spawn_stub"]

# The window: the program's page, the parking place, the engines, the tables (checkpoint.stubinjection).
_WINDOW_SIZE: Final = 128 << 20
_PARKING: Final = (1 << 20, 2 << 20)
_GAP_ALIGN: Final = 2 << 20
#: no window below: where small programs without address randomization lie, and null pointers point
_LOWEST: Final = 0x1000_0000

_OPTIONS: Final = Option.TRACEFORK | Option.TRACEVFORK | Option.TRACECLONE | Option.EXITKILL
_ALL_SIGNALS: Final = (1 << 64) - 1
_STOP_TIMEOUT: Final = 5.0
_LAST_FD: Final = 0xFFFFFFFF
_NAME: Final = "tcpmig-stub"
_LEAST_ERRNO: Final = -4095


def find_gap(avoid: Iterable[tuple[int, int]], size: int) -> int:
    """The lowest address, not too low, from which ``size`` bytes, and a margin around them, overlap nothing in
    ``avoid``. AddressGapMissing if there is none."""
    at = _LOWEST
    for start, end in sorted(avoid):
        if start >= at + size + _GAP_ALIGN:
            break
        at = max(at, end + _GAP_ALIGN + -end % _GAP_ALIGN)
    if at + size + _GAP_ALIGN > USER_END:
        raise AddressGapMissing(f"there are no {size >> 20} MiB of address space that none of the processes uses")
    return at


class Stub(Process):
    """A process of ours, stopped, that will become a rebuilt one.

    window      (start, end) of the addresses that are ours until :meth:`leave`: to be left alone
    parking     (start, end): a part of it that is free, where the kernel's own mappings may wait for their place
    tool_pidfd  number *in the stub* of a pidfd of the tool, with which it can take our descriptors; no other descriptor
                is open; in a user namespace of its own, of the keeper, which has our descriptors
    users       the user namespace that it is in; None: the tool's. ``chooses_numbers``: it may choose those of threads
    """

    def __init__(self, pid: int, window: tuple[int, int], tool_pidfd: int) -> None:
        super().__init__(pid)
        self.window = window
        self.parking = (window[0] + _PARKING[0], window[0] + _PARKING[1])
        self.tool_pidfd = tool_pidfd
        self.chooses_numbers = True
        self.users: Users | None = None
        self.first: tuple[State, ...] = ()
        self.threads_of: ProcessState | None = None
        self._injection: StubInjection
        self._to_swallow: list[Thread] = []

    @property
    def injection(self) -> Injection:
        """Open from birth to :meth:`leave`."""
        return self._injection

    # -- birth

    @classmethod
    def _seized(cls, pid: int, window: tuple[int, int], tool_pidfd: int) -> Self:
        stub = cls(pid, window, tool_pidfd)
        thread = Thread(pid, pid)
        try:
            thread.seize(_OPTIONS | Option.SUSPEND_SECCOMP)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EINVAL):
                raise
            thread.seize(_OPTIONS)
        thread.interrupt()
        thread.await_interrupt(_STOP_TIMEOUT)
        stub._adopt([thread])
        return stub

    def _adopt(self, threads: Iterable[Thread]) -> None:
        """Threads that stand still become ours; what is in their registers does not matter."""
        for thread in threads:
            current = thread.get_registers()
            thread.registers = current.moved(current.ip)
            thread.sigmask = _ALL_SIGNALS  # no signal is to be delivered before the rebuilt thread's mask is in place
            thread.rseq = None
            self.threads.append(thread)
        self.stat = procfs.read_stat(self.pid)

    def _newborn(self, pid: int, tid: int, inner: int | None = None) -> Thread:
        """A thread that one of our calls has made: it is traced already. ``inner``: the number that it was given."""
        thread = Thread(pid, tid, inner)
        thread.await_interrupt(_STOP_TIMEOUT)
        return thread

    def fork(self, pid: int | None, flags: int = 0, *, exit_signal: int = signal.SIGCHLD) -> Stub:
        """A child, a copy of this stub.

        pid    its number in the stub's PID namespace; None: any
        flags  CLONE_*; with CLONE_PARENT it is a sibling
        PidTaken, SpawnFailed.
        """
        self._clone([pid], [flags], 0 if flags & CloneFlag.PARENT else exit_signal)
        number = self._injection.born.pop()
        child = type(self)(number, self.window, self.tool_pidfd)
        child.users = self.users
        child._adopt([self._newborn(number, number)])
        child._injection = self._injection.inherited(child)
        return child

    def clone_threads(self, tids: Sequence[int | None], lenders: Sequence[int | None] = ()) -> None:
        """More threads, with these numbers in the stub's PID namespace (None: any), added to ``threads`` in this order.

        lenders  for each of them, the thread whose directories and umask it shares: the first one, or one of ``tids``
                 that comes before it; None: nobody's.  Not given: all share those of the first.

        PidTaken, SpawnFailed: those before the one that could not be born are there.
        """
        if not tids:
            return
        first = self.leader.tid
        whose = list(lenders) or [first] * len(tids)
        creators = {n: first if lender is None or lender not in tids else lender for n, lender in enumerate(whose)}
        made: dict[int, Thread] = {}
        for creator in dict.fromkeys(creators.values()):
            places = [n for n, by in creators.items() if by == creator]
            parent = first if creator == first else made[tids.index(creator)].tid
            flags = [THREAD & ~CloneFlag.FS if whose[n] is None else THREAD for n in places]
            if self.chooses_numbers:
                born = self._cloned([tids[n] for n in places], flags, parent)
            else:
                born = [self._counted_on(tids[n], how, parent) for n, how in zip(places, flags, strict=True)]
            made.update(zip(places, born, strict=True))
        self.threads[-len(tids) :] = [made[n] for n in range(len(tids))]

    def _cloned(self, tids: Sequence[int | None], flags: Sequence[int], creator: int) -> list[Thread]:
        """Threads, by a stub that may choose their numbers. PidTaken, SpawnFailed."""
        born: list[Thread] = []
        try:
            self._clone(tids, flags, 0, creator)
        finally:
            for tid, inner in zip(self._injection.born, tids, strict=False):
                born.append(self._newborn(self.pid, tid, inner))
            self._injection.born.clear()
            if born:
                self._adopt(born)
                self._injection._arrived(born)
        return born

    def dismiss(self, threads: Sequence[Thread]) -> None:
        """End threads, none of which is the first."""
        if threads:
            self._injection.dismiss(threads)
            gone = {thread.tid for thread in threads}
            self.threads = [thread for thread in self.threads if thread.tid not in gone]

    def _counted_on(self, tid: int | None, how: int, creator: int) -> Thread:
        """One thread, by a stub that may not choose: the kernel is told which number was the last. PidTaken."""
        for _ in range(TRIES):
            next_is(tid)
            self._clone([None], [how], 0, creator)
            thread = self._newborn(self.pid, self._injection.born.pop())
            if tid in (None, thread.tid):
                self._adopt([thread])  # at once: the next one may fail, and all that is there must end then
                self._injection._arrived([thread])
                return thread
            self._injection.dismiss([thread])  # somebody else had a child at the same moment
        raise SpawnFailed("the number could not be had", object=f"thread {tid}")

    def _clone(
        self, numbers: Sequence[int | None], flags: Sequence[int], exit_signal: int, creator: int | None = None
    ) -> None:
        calls = CallTable()
        for number, how in zip(numbers, flags, strict=True):
            args = calls.put(CloneArgs(how, exit_signal, 0, int(number is not None)).pack())
            if number is not None:
                calls.pointer(args + SET_TID_OFFSET, calls.put(pack_tids(number)))
            calls.call(SYS.clone3, args, CLONE_ARGS_SIZE, label=f"clone3 {number or ''}".rstrip())
        try:
            self.run(calls, creator)
        except CallError as error:
            raise _clone_failed(error.errno or 0, numbers[error.index]) from error

    # -- life

    def run(self, table: CallTable, tid: int | None = None) -> None:
        """Run a table in one thread, the first if none is named. See :meth:`Injection.run`."""
        self._injection.run({self.leader.tid if tid is None else tid: table})

    def run_all(self, tables: Mapping[int, CallTable]) -> None:
        """Run a table in each of the threads named, all at once. See :meth:`Injection.run`."""
        self._injection.run(tables)

    def interrupted(self, thread: Thread, number: int, args: tuple[int, ...]) -> int | None:
        """What a call that would sleep returns if it is interrupted at once, as the kernel sees it; None if it could
        not be begun. The last that is done in this thread before :meth:`leave`."""
        return self._injection.interrupted(thread, number, args)

    @property
    def spare(self) -> int:
        """The address of some bytes that no table uses."""
        return self._injection.spare

    def leave(self) -> None:
        """Unmap the window, and with it all that is ours. The threads then stand still with all signals blocked and
        meaningless registers: what comes next are their real registers and masks."""
        self._injection.close()

    def queue_sigstops(self) -> None:
        """Queue a SIGSTOP to every thread that has none of its own waiting: once it survives the tool, the tool's death
        leaves it stopped instead of running. After :meth:`leave`."""
        for thread in self.threads:
            if not any(signal_of(info) == signal.SIGSTOP for info in thread.pending()):
                syscall(SYS.tgkill, self.pid, thread.tid, signal.SIGSTOP)
                self._to_swallow.append(thread)

    def survive_tool(self) -> None:
        """From now on the death of the tool lets it run on, or leaves it stopped (:meth:`queue_sigstops`)."""
        for thread in self.threads:
            ptrace.set_options(thread.tid, Option(0))

    def release(self) -> None:
        """Let it run, without us."""
        self._swallow_sigstops(self._to_swallow)
        for thread in self.threads:
            waiting.go_on(self, thread)
            thread.detach()
        self.close()

    # -- death

    def exit(self, status: int) -> None:
        """It exits, and is a zombie until its parent, if that is not the tool, has waited for it."""
        calls = CallTable()
        calls.call(SYS.exit_group, status)
        self._injection.send_off(self.leader, calls)
        self._ended()

    def die(self, number: int) -> None:
        """It is killed by a signal whose default action that is."""
        leader = self.leader
        leader.set_sigmask(0)
        os.kill(self.pid, number)
        leader.cont()
        while os.WIFSTOPPED(status := wait_status(leader.tid, _STOP_TIMEOUT)):
            ptrace.cont(leader.tid, os.WSTOPSIG(status) if status >> 16 == 0 else 0)
        self.close()

    def _ended(self) -> None:
        for thread in [*self.threads[1:], self.leader]:
            self.await_end(thread)
        self.close()


def _clone_failed(error: int, number: int | None) -> PidTaken | SpawnFailed:
    """What a failed clone3 means."""
    name = f"pid {number}" if number is not None else ""
    if error == errno.EEXIST and number is not None:
        users = procfs.users_of_number(number)
        return PidTaken(f"the number is in use: {'; '.join(users) or 'in another PID namespace'}", object=name)
    if error == errno.EINVAL and number is not None:
        return SpawnFailed("the number is outside this PID namespace's range", object=name, fix="Raise kernel.pid_max.")
    return SpawnFailed(os.strerror(error), object=name)


def spawn_stub(pid: int | None, avoid: Iterable[tuple[int, int]], line: int = 0) -> Stub:
    """Start a stub as our child, stopped, with calls possible.

    pid    its number; None: any. In a PID namespace that the caller has unshared: the number in there
    avoid  (start, end) of all memory that it, and all that is forked from it, shall have
    line   PID of a process that has our descriptors, from which it takes them; 0: from us
    A time namespace that the caller has unshared is entered, too.
    PidTaken, SpawnFailed, AddressGapMissing.
    """
    base = find_gap(avoid, _WINDOW_SIZE)
    window = (base, base + _WINDOW_SIZE)
    tool = os.pidfd_open(line or os.getpid())
    program = -1
    try:
        program = executable(_NAME, stub_elf(base, tool))
        os.set_inheritable(tool, True)
        number = births.run(lambda: _start(program, pid))
        return _first_steps(number, window, tool)
    finally:
        for fd in (tool, program):
            if fd >= 0:
                os.close(fd)


def _first_steps(number: int, window: tuple[int, int], tool: int) -> Stub:
    stub: Stub | None = None
    try:
        stub = Stub._seized(number, window, tool)
        injection = StubInjection(stub)
        injection.open()
        stub._injection = injection
        calls = CallTable()
        if tool:
            calls.call(SYS.close_range, 0, tool - 1, 0, label="close_range")
        calls.call(SYS.close_range, tool + 1, _LAST_FD, 0, label="close_range")
        stub.run(calls)
    except BaseException:
        os.kill(number, signal.SIGKILL)
        if stub is None:
            os.waitpid(number, 0)
        else:
            stub._ended()
        raise
    return stub


def _start(program: int, pid: int | None) -> int:
    """clone3 and exec; the child's number in our PID namespace."""
    tids = ctypes.create_string_buffer(pack_tids(pid if pid is not None else 0))
    wanted = pid is not None
    flags = CloneFlag.VM | CloneFlag.VFORK | CloneFlag.CLEAR_SIGHAND
    args = CloneArgs(flags, signal.SIGCHLD, ctypes.addressof(tids) if wanted else 0, int(wanted)).pack()
    clone_args = ctypes.create_string_buffer(args, len(args))
    empty = ctypes.create_string_buffer(1)
    argv = (ctypes.c_void_p * 2)(ctypes.addressof(empty), None)
    envp = (ctypes.c_void_p * 1)(None)
    exec_args = (ctypes.c_uint64 * 5)(
        *(program, ctypes.addressof(empty), ctypes.addressof(argv), ctypes.addressof(envp), AT_EMPTY_PATH)
    )
    # A signal handled by the child, in memory that is ours, would be handled twice.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        machine = _machine_spawn()
        if machine is not None:
            number = machine(ctypes.addressof(clone_args), len(args), ctypes.addressof(exec_args))
        if machine is None or number == -errno.EINVAL:
            # before 6.2 a child that borrows our memory cannot enter another time namespace
            number = _plain_spawn(args, exec_args)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if _LEAST_ERRNO <= number < 0:
        raise _clone_failed(-number, pid)
    _await_exec(number)
    return number


def _await_exec(number: int) -> None:
    """Wait until the child runs its program; SpawnFailed if it ends instead. vfork lets us go on a moment earlier, in
    the middle of exec or of exit."""
    while True:
        ended, status = os.waitpid(number, os.WNOHANG)
        if ended:
            reason = os.strerror(os.WEXITSTATUS(status)) if os.WIFEXITED(status) else f"wait status {status:#x}"
            raise SpawnFailed(f"the stub's program cannot be executed: {reason}")
        try:
            if _NAME in os.readlink(f"/proc/{number}/exe"):
                return
        except FileNotFoundError:
            os.sched_yield()  # it has no memory any more: it is about to end


@functools.cache
def _machine_spawn() -> Callable[[int, int, int], int] | None:
    """The spawn code in executable memory of ours, for the life of the process; None if that is refused."""
    try:
        code = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    code.write(SPAWN)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), mmap.PROT_READ | mmap.PROT_EXEC):
        return None
    function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)(address)
    function._code = code  # type: ignore[attr-defined]  # the mapping must live as long as the function
    return function


def _plain_spawn(args: bytes, exec_args: ctypes.Array[ctypes.c_uint64]) -> int:
    """The same by plain calls, with a copy of our memory instead of a loan: slower by the time that a fork takes."""
    flags = int.from_bytes(args[:8], "little") & ~int(CloneFlag.VM)
    own = ctypes.create_string_buffer(flags.to_bytes(8, "little") + args[8:], len(args))
    try:
        number = syscall(SYS.clone3, ctypes.addressof(own), len(args))
    except OSError as error:
        return -(error.errno or errno.EINVAL)
    if number:
        return number
    try:
        syscall(SYS.execveat, *exec_args)
    finally:
        os._exit(ctypes.get_errno())
