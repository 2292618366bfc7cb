"""The threads of a process that is rebuilt: which there must be, and what the process must be before it has them.

They are born when its state is known, in the stop; or before (pre-copy), as each round tells which threads there are.
Then the stop finds most of them standing: who has come since is born, who has ended is dismissed.  Before the second
thread is born the process gets what it can be given while it has only one, so a round tells that, too.

::

    capture_first    at the source, before the rounds
    bear_ahead       at the target, in each round
    dismiss_ended    in the stop, of all processes: a number may have become another's
    bear_threads     then: all that the state tells are there, in its order
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from checkpoint.errors import PidTaken, StateRefused, StateUnreadable
from checkpoint.state.base import ProcessView, State, TaskBuilder, TaskView
from checkpoint.state.filesystem import ThreadDirectories
from checkpoint.state.keyring import SessionKeyring
from checkpoint.state.large_registers import LargeRegisters
from checkpoint.state.membarrier import Membarrier
from tcpstate.kernel.calls import CallError

if TYPE_CHECKING:
    from checkpoint.inject import Injection
    from checkpoint.spawn import Stub
    from checkpoint.state.table import ProcessState, ThreadState
    from checkpoint.thread import Thread
    from checkpoint.tracee import Process

__all__ = [
    "FIRST_STATES",
    "THREADS_MAX",
    "Told",
    "bear_ahead",
    "bear_threads",
    "begin",
    "capture_first",
    "check",
    "dismiss_ended",
    "end",
    "run",
]

_log = logging.getLogger(__name__)

#: of a process, rebuilt while it has one thread only
FIRST_STATES: Final[tuple[type[State], ...]] = (
    Membarrier,  # with several threads each registration takes an RCU grace period, 2 to 15 ms
    LargeRegisters,  # while there is no alternate stack that would be too small
    SessionKeyring,  # each thread has the keyring that it was born with
)
#: threads of a process that are told before the stop, at most: as many as are worth it, and fewer than a stub has room
#: for. Those of a process that has more are all born in the stop
THREADS_MAX: Final = 1 << 14
_NUMBERS: Final = 1 << 22  # PID_MAX_LIMIT, include/linux/threads.h

#: what a round tells of a process: its first states, and the numbers of its threads but the first
Told = tuple[Sequence[State], Sequence[int]]


def check(pid: int, first: Sequence[State], tids: Sequence[int]) -> None:
    """ValueError if a round cannot have told this of a process."""
    if len(tids) > THREADS_MAX:
        raise ValueError(f"process {pid} has {len(tids)} threads")
    if any(not 0 < tid < _NUMBERS for tid in tids):
        raise ValueError(f"a thread of process {pid} has a number that is out of range")
    if len({pid, *tids}) != len(tids) + 1:
        raise ValueError(f"process {pid} has a thread twice")
    if (tids or first) and tuple(map(type, first)) != FIRST_STATES:
        raise ValueError(f"of process {pid} it is not told what it must be before it has threads")


# -- at the source ----------------------------------------------------------------------------------------------------

Begun = State | Generator[None, None, State]


def begin(kind: type[State], task: TaskView) -> Begun:
    """Begin to capture one state: the calls that it needs are in the task's table."""
    begun = kind.capture(task)
    if isinstance(begun, Generator):
        next(begun)
    return begun


def end(begun: Begun) -> State:
    """The state, once the calls have been made."""
    if not isinstance(begun, Generator):
        return begun
    try:
        next(begun)
    except StopIteration as stop:
        state: State = stop.value
        return state
    raise RuntimeError("a capture yields once")


def capture_first(process: Process, injection: Injection) -> tuple[State, ...]:
    """FIRST_STATES of a process that stands still for a moment, with an open injection; nothing if they cannot be read
    (the stop will say why). Errors of injected calls."""
    task = ProcessView(process).tasks[0]
    try:
        begun = [begin(kind, task) for kind in FIRST_STATES]
        injection.run({task.tid: task.calls})
        return tuple(map(end, begun))
    except (CallError, StateUnreadable) as error:
        _log.info("threads of pid %d are not told before the stop: %s", process.pid, error)
        return ()


# -- at the target ----------------------------------------------------------------------------------------------------


def bear_ahead(stubs: Mapping[int, Stub], told: Mapping[int, Told], warn: Callable[[str], None]) -> None:
    """Let the stubs have these threads, which share everything with their first ones, and no others. Of those whose
    numbers are in use here nobody is born: that may be over when they are needed. StateRefused, SpawnFailed."""
    for pid, (first, tids) in told.items():
        # what was told of the process is another thing now: its threads would be without it
        _dismiss_but(stubs[pid], tids if stubs[pid].first == tuple(first) else ())
    for pid, (first, tids) in told.items():
        stub = stubs[pid]
        if first:
            _become(stub, tuple(first), warn)
        there = _numbers(stub)
        missing = [tid for tid in tids if tid not in there]
        while missing:
            try:
                stub.clone_threads(missing)
                break
            except PidTaken as error:
                there = _numbers(stub)
                missing = [tid for tid in missing if tid not in there]
                _log.info("thread %d of process %d is not born before the stop: %s", missing.pop(0), pid, error.message)


def dismiss_ended(stubs: Mapping[int, Stub], states: Mapping[int, ProcessState]) -> None:
    """The originals stand still: threads that are none of theirs, or share other directories than was thought, end. May
    be repeated."""
    for pid, state in states.items():
        stub = stubs[pid]
        if len(stub.threads) > 1 and stub.threads_of is not state:
            leader = state.pid
            _dismiss_but(stub, [one.tid for one in state.threads if _lender(one, leader) == leader])


def bear_threads(stub: Stub, state: ProcessState, warn: Callable[[str], None]) -> None:
    """Give a stub its threads, with their numbers and nothing else; what was born ahead and has not been dismissed
    (:func:`dismiss_ended`) is one of them. May be repeated. StateRefused, PidTaken, SpawnFailed."""
    if stub.threads_of is state:
        return
    dismiss_ended({state.pid: stub}, {state.pid: state})
    first = tuple(state.get(kind) for kind in FIRST_STATES)
    if stub.first != first:
        _dismiss_but(stub, ())
        _become(stub, first, warn)
    there = _numbers(stub)
    missing = [thread for thread in state.threads[1:] if thread.tid not in there]
    stub.clone_threads([thread.tid for thread in missing], [_lender(thread, state.pid) for thread in missing])
    there = _numbers(stub)
    stub.threads[1:] = [there[thread.tid] for thread in state.threads[1:]]
    stub.threads_of = state


def _numbers(stub: Stub) -> dict[int, Thread]:
    """All threads but the first, by their numbers in their own PID namespace."""
    return {thread.inner_tid: thread for thread in stub.threads[1:]}


def _dismiss_but(stub: Stub, tids: Sequence[int]) -> None:
    if len(stub.threads) > 1:
        wanted = set(tids)
        stub.dismiss([thread for tid, thread in _numbers(stub).items() if tid not in wanted])


def _become(stub: Stub, first: tuple[State, ...], warn: Callable[[str], None]) -> None:
    """While it has one thread only."""
    if stub.first != first:
        task = TaskBuilder(pid=stub.pid, tid=stub.pid, warn=warn)
        for state in first:
            state.rebuild(task)
        run(stub, [task])
        stub.first = first


def run(stub: Stub, tasks: Sequence[TaskBuilder]) -> None:
    """Do what is queued for threads of a stub, inside and outside. StateRefused."""
    tables = {task.tid: task.calls for task in tasks if len(task.calls)}
    first = dict(itertools.islice(tables.items(), 1))
    try:
        # By itself: it sets what is done on signals. One that is ignored by default is thrown away then, wherever it is
        # pending: also that by which another thread is just about to stop, which would leave our code and run.
        stub.run_all(first)
        stub.run_all({tid: calls for tid, calls in tables.items() if tid not in first})
    except CallError as error:
        raise StateRefused(
            f"cannot {error.label}: {os.strerror(error.errno or 0)}", object=f"pid {stub.pid}"
        ) from error
    for task in tasks:
        task.run_outside()


def _lender(thread: ThreadState, leader: int) -> int | None:
    """The thread whose directories this one shares; None: nobody's."""
    own = thread.get(ThreadDirectories)
    return own.like or (leader if own.cwd is None else None)
