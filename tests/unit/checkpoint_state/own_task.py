"""The test's own process as a task: its calls are made by itself, so no ptrace and no privilege is needed."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

from checkpoint.kernel.ptrace import RseqConfig
from checkpoint.state.base import ProcessView, State, TaskBuilder
from tcpstate.kernel import batch

S = TypeVar("S", bound=State)
T = TypeVar("T")


@dataclass
class OwnThread:
    tid: int
    rseq: RseqConfig | None = None
    queued: dict[bool, list[bytes]] = field(default_factory=lambda: {True: [], False: []})

    def pending(self, *, shared: bool = False) -> list[bytes]:
        return self.queued[shared]


def own_view(thread: OwnThread | None = None) -> ProcessView:
    process: Any = SimpleNamespace(pid=os.getpid(), threads=[thread or OwnThread(os.getpid())])
    return ProcessView(process)


def capture(kind: type[S], view: ProcessView | None = None) -> S:
    task = (view or own_view()).tasks[0]
    begun = kind.capture(task)
    if isinstance(begun, State):
        return begun
    next(begun)
    batch.run(task.calls)
    try:
        next(begun)
    except StopIteration as stop:
        state: S = stop.value
        return state
    raise AssertionError("a capture yields once")


def rebuild(state: State, *, elapsed: int = 0) -> list[str]:
    """Give this process the state; returns the warnings."""
    warnings: list[str] = []
    task = TaskBuilder(pid=os.getpid(), tid=os.getpid(), warn=warnings.append, elapsed=elapsed)
    state.rebuild_privileged(task)
    state.rebuild(task)
    batch.run(task.calls)
    task.run_outside()
    return warnings


def in_child(work: Callable[[], T]) -> T:
    """The result of ``work``, done in a child process that it may leave in any condition."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            with os.fdopen(writing, "wb") as file:
                pickle.dump(work(), file)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        data = file.read()
    assert os.waitpid(child, 0)[1] == 0
    result: T = pickle.loads(data)
    return result


def round_trip(prepare: Callable[[], object], kind: type[S]) -> tuple[S, S]:
    """(a child's state after ``prepare``, that of another child that was given it)."""
    first = in_child(lambda: (prepare(), capture(kind))[1])
    second = in_child(lambda: (rebuild(first), capture(kind))[1])
    return first, second
