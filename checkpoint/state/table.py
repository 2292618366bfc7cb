"""The kinds of state, in the order in which they are rebuilt, and the capture and rebuilding of a whole process.

Capture, of a stopped process, with one run of injected calls for all its threads::

    with Injection(process) as injection:
        state = table.capture(process, injection)

Rebuilding, when the process has its memory and its files, but not yet its threads::

    build(stub, state, warn=warn, elapsed=elapsed)
    ...                             # whatever else is to be done inside
    stub.leave()
    install(stub, state)            # registers, blocked signals; nothing can be run inside afterwards

A kind is added by a module with its class and one line here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeVar

from checkpoint import procfs
from checkpoint.errors import StateUnreadable
from checkpoint.kernel.signals import tgkill
from checkpoint.state import birth, clocks, landlock, pending, registers
from checkpoint.state.addresses import ClearChildTid, RestartableSequences, RobustList
from checkpoint.state.alike import DIFFERING, AlikeThreads
from checkpoint.state.base import ProcessView, State, TaskBuilder, kind_of
from checkpoint.state.cgroup import Cgroups
from checkpoint.state.clocks import Clocks
from checkpoint.state.comm import Comm
from checkpoint.state.credentials import Credentials
from checkpoint.state.filesystem import Filesystem, ThreadDirectories
from checkpoint.state.hardening import MachineCheckPolicy, SpeculationControls, TimeStampCounter
from checkpoint.state.itimers import IntervalTimers
from checkpoint.state.kernel_files import CoredumpFilter, OomScoreAdjustment
from checkpoint.state.lasting import Dumpable, ParentDeathSignal
from checkpoint.state.likeness import Likeness
from checkpoint.state.limits import ResourceLimits
from checkpoint.state.memory_switches import MemoryDenyWriteExecute, MemorySwitches
from checkpoint.state.mempolicy import NumaPolicy
from checkpoint.state.pending import PendingForProcess, PendingForThread
from checkpoint.state.personality import Personality
from checkpoint.state.posix_timers import PosixTimers
from checkpoint.state.registers import Registers
from checkpoint.state.scheduling import CpuAffinity, IoPriority, Scheduling, TimerSlack
from checkpoint.state.seccomp import Seccomp
from checkpoint.state.signals import AlternateStack, SignalHandlers
from checkpoint.state.subreaper import ChildSubreaper
from tcpstate import trusted
from tcpstate.kernel.calls import CallError, CallTable
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.inject import Injection
    from checkpoint.spawn import Stub
    from checkpoint.tracee import Process

__all__ = [
    "PROCESS_STATES",
    "THREAD_STATES",
    "ProcessState",
    "ThreadState",
    "build",
    "capture",
    "capture_alike",
    "install",
    "make_ready",
    "rebuild_process",
    "rebuild_thread",
]

S = TypeVar("S", bound=State)
_DIFFERING: Final = frozenset(DIFFERING)

#: of a process, rebuilt in its first thread before the states of the threads
PROCESS_STATES: Final[tuple[type[State], ...]] = (
    *birth.FIRST_STATES,
    Filesystem,
    ChildSubreaper,
    MemorySwitches,
    SignalHandlers,  # before any signal is pending: setting SIG_IGN throws pending ones away
    IntervalTimers,
    PosixTimers,  # when all threads exist: a timer may signal one of them
    PendingForProcess,
    ResourceLimits,  # after what a low limit would refuse (timers, queued signals)
    MemoryDenyWriteExecute,  # irrevocable
    OomScoreAdjustment,
    CoredumpFilter,
    Cgroups,
)

#: of a thread
THREAD_STATES: Final[tuple[type[State], ...]] = (
    Comm,
    ThreadDirectories,
    Personality,
    RobustList,
    ClearChildTid,
    RestartableSequences,
    AlternateStack,
    TimerSlack,
    NumaPolicy,
    SpeculationControls,
    TimeStampCounter,
    MachineCheckPolicy,
    Scheduling,
    CpuAffinity,
    IoPriority,
    PendingForThread,
    Registers,
    Credentials,  # ends the privileges that everything above may need
    ParentDeathSignal,  # the change of credentials resets it
    Dumpable,  # this as well, for the whole process: every thread sets it after its own change
    Seccomp,  # the very last: it forbids calls
)


def _index(states: Sequence[State], table: tuple[type[State], ...], of: str) -> dict[type[State], State]:
    """The states by class. ValueError if one is missing, given twice, or not of this table.

    None may be missing: without credentials, for instance, a process would be left with the tool's.
    """
    found: dict[type[State], State] = {}
    for state in states:
        if type(state) in found:
            raise ValueError(f"{of} has {kind_of(type(state))!r} twice")
        found[type(state)] = state
    wrong = [kind_of(cls) for cls in found if cls not in table]
    missing = [kind_of(cls) for cls in table if cls not in found]
    if wrong or missing:
        what = f"does not belong there: {', '.join(wrong)}" if wrong else f"is missing: {', '.join(missing)}"
        raise ValueError(f"among the states of {of} {what}")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadState:
    """All of one thread. ``tid`` is its number in its own PID namespace."""

    tid: int
    states: tuple[State, ...]

    def __post_init__(self) -> None:
        if self.tid <= 0:
            raise ValueError(f"there is no thread {self.tid}")
        _index(self.states, THREAD_STATES, f"thread {self.tid}")

    def get(self, kind: type[S]) -> S:
        """Its state of one kind."""
        return _get(self.states, kind)

    def another(self, tid: int, states: tuple[State, ...]) -> ThreadState:
        """Another thread, with states of the same kinds in the same order. ValueError."""
        if tid <= 0:
            raise ValueError(f"there is no thread {tid}")
        return _thread(tid, states)


_thread = trusted.maker(ThreadState, "tid", "states")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessState:
    """All of one process. ``pid`` is its number in its own PID namespace, ``clocks`` what it saw at the capture."""

    pid: int
    states: tuple[State, ...]
    threads: tuple[ThreadState, ...]
    clocks: Clocks

    def __post_init__(self) -> None:
        _index(self.states, PROCESS_STATES, f"process {self.pid}")
        if not self.threads or self.threads[0].tid != self.pid:
            raise ValueError(f"the first thread of process {self.pid} must come first")
        if len({thread.tid for thread in self.threads}) != len(self.threads):
            raise ValueError(f"process {self.pid} has a thread twice")
        lenders: set[int] = set()
        for thread in self.threads:
            own = thread.get(ThreadDirectories)
            if own.like and own.like not in lenders:
                raise ValueError(f"thread {thread.tid} shares directories that thread {own.like} does not have")
            if own.cwd is not None:
                lenders.add(thread.tid)

    def get(self, kind: type[S]) -> S:
        """Its state of one kind."""
        return _get(self.states, kind)


def _get(states: tuple[State, ...], kind: type[S]) -> S:
    for state in states:
        # not isinstance: of an abstract class it takes longer than all else that is done with most kinds
        if type(state) is kind:
            return state
    raise LookupError(f"no {kind_of(kind)!r} here")


def make_ready(pid: int) -> None:
    """What takes milliseconds and can be done before a process is stopped. NoSuchProcess, OSError."""
    landlock.make_ready(pid)


def capture(process: Process, injection: Injection, more: CallTable | None = None) -> ProcessState:
    """The state of a stopped process with an open injection.

    more  calls that are to be made in its first thread, besides

    StateUnreadable if the kernel refuses a call; the errors of a kind that cannot be moved (SeccompSupervised, ...).
    """
    return _captured(process, injection, more, None)[0]


def capture_alike(
    process: Process, injection: Injection, likeness: Likeness
) -> tuple[ProcessState, tuple[AlikeThreads, ...]]:
    """The same of a process of which not all threads need to be asked: those that are, and what the others have for
    themselves. Those that are asked are in the injection."""
    return _captured(process, injection, None, likeness)


def _captured(
    process: Process, injection: Injection, more: CallTable | None, likeness: Likeness | None
) -> tuple[ProcessState, tuple[AlikeThreads, ...]]:
    view = ProcessView(process, more, None if likeness is None else likeness.asked)
    view.scratch = injection.ranges
    own = [birth.begin(kind, view.tasks[0]) for kind in PROCESS_STATES]
    begun = [[birth.begin(kind, task) for kind in THREAD_STATES] for task in view.tasks]
    if likeness is not None:
        view.seccomp.update({tid: view.seccomp[model] for tid, (_, model) in likeness.like.items()})
    try:
        injection.run({task.tid: task.calls for task in view.tasks})
    except CallError as error:
        raise StateUnreadable(
            f"cannot {error.label}: {os.strerror(error.errno or 0)}", object=f"pid {process.pid}"
        ) from error
    if likeness is not None:
        likeness.look_again(view)
    now = clocks.read(process.pid)
    view.foreign = injection.foreign
    states = tuple(birth.end(each) for each in own)
    threads = {
        task.tid: ThreadState(tid=task.inner_tid, states=tuple(birth.end(each) for each in states))
        for task, states in zip(view.tasks, begun, strict=True)
    }
    apart, alike = ([], ()) if likeness is None else likeness.threads(view, threads)
    state = ProcessState(pid=view.tasks[0].inner_tid, states=states, threads=(*threads.values(), *apart), clocks=now)
    return state, alike


def rebuild_process(state: ProcessState, task: TaskBuilder) -> None:
    """Queue the states of the process in the task of its first thread. All threads exist."""
    for kind in PROCESS_STATES:
        if kind not in birth.FIRST_STATES:
            state.get(kind).rebuild(task)


def rebuild_thread(state: ThreadState, task: TaskBuilder) -> None:
    """Queue the states of one thread; those of the process come before in its first thread's task."""
    for kind in THREAD_STATES:
        state.get(kind).rebuild_privileged(task)
    for kind in THREAD_STATES:
        state.get(kind).rebuild(task)


class _Alike:
    """Queues the states of threads other than the first. Of those that have most of them in common, the very same
    objects, it is worked out once what these take; such threads were born of the same one, and are the same so far."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[CallTable, tuple[State, ...]]] = {}

    def rebuild(self, state: ThreadState, task: TaskBuilder) -> None:
        """Queue the states of a thread."""
        common = tuple(id(one) for one in state.states if type(one) not in _DIFFERING)
        if common not in self._known:
            self._known[common] = self._worked_out(state, task)
        calls, others = self._known[common]
        for one in state.states:
            if type(one) in _DIFFERING:
                one.rebuild(task)
        for one in others:
            one.rebuild(task)
        task.calls.extend(calls)
        task.calls.asked = bool(task.outside)

    @staticmethod
    def _worked_out(state: ThreadState, task: TaskBuilder) -> tuple[CallTable, tuple[State, ...]]:
        """The calls that are the same for all, and the states of which something is each thread's own: those come
        before, as they need privileges that end with the last of the calls."""
        same, others = replace(task, calls=CallTable(), outside=[]), []
        kinds = [kind for kind in THREAD_STATES if kind not in _DIFFERING]
        for kind in kinds:
            state.get(kind).rebuild_privileged(same)
        for kind in kinds:
            one = state.get(kind)
            if one.stands(task):
                continue
            tried = replace(task, calls=CallTable(), outside=[])
            one.rebuild(tried)
            if tried.outside:
                others.append(one)
            else:
                same.calls.extend(tried.calls)
        return same.calls, tuple(others)


def build(
    stub: Stub,
    state: ProcessState,
    *,
    warn: Callable[[str], None],
    elapsed: int = 0,
    path: Callable[[str], str] = lambda path: path,
    placed: bool = False,
) -> None:
    """Give a stub its threads, with their numbers, and all state but the registers.

    warn     told of whatever will differ from the original
    elapsed  nanoseconds since the capture, at this moment, as measured by the caller
    path     maps a path of the source to one here
    placed   its directories are those of another process, which was built before

    StateRefused if the kernel refuses a call, PidTaken, SpawnFailed, TimerOutOfReach, MachineForeign.
    """
    born = procfs.read_status(stub.pid)
    birth.bear_threads(stub, state, warn)
    common = TaskBuilder(
        pid=stub.pid, tid=stub.pid, warn=warn, elapsed=elapsed, birth=born, path=path, placed=placed, users=stub.users
    )
    tasks = [common.of(thread.tid) for thread in stub.threads]
    rebuild_process(state, tasks[0])
    rebuild_thread(state.threads[0], tasks[0])
    alike = _Alike()
    for thread, task in zip(state.threads[1:], tasks[1:], strict=True):
        alike.rebuild(thread, task)
    birth.run(stub, tasks)
    for sleeper, each in zip(stub.threads, state.threads, strict=True):
        registers.fall_asleep(stub, sleeper, each.get(Registers), elapsed)


def install(process: Process, state: ProcessState) -> None:
    """The very end: registers and blocked signals of every thread, and the signals that only the tool can send.

    Nothing may be run inside the process afterwards: it is released next.
    """
    own = process.leader.get_xstate()
    for thread, each in zip(process.threads, state.threads, strict=True):
        registers.install(thread, each.get(Registers), own)
        for number in pending.late(each.get(PendingForThread).signals):
            tgkill(process.pid, thread.tid, number)
    for number in pending.late(state.get(PendingForProcess).signals):
        os.kill(process.pid, number)
