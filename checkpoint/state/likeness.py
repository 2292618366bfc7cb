"""Threads of a stopped process that are in the same state: one of them is asked for it, by calls that it makes.

Most threads of a program differ in nothing but their registers, their names and a few addresses.  Which of them do the
kernel's own notes tell (:mod:`checkpoint.kernel.threaditer`), for all threads at once and while they stand still.  Of
those that are alike the first is asked; the others get its states, but for those kinds (DIFFERING) that are read of
each.  Where the kernel does not tell, all are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from checkpoint.kernel import threaditer
from checkpoint.kernel.signals import SsFlag
from checkpoint.kernel.threaditer import ThreadRow
from checkpoint.state.addresses import ClearChildTid, RestartableSequences, RobustList
from checkpoint.state.base import ProcessView, State, TaskView
from checkpoint.state.comm import Comm
from checkpoint.state.pending import PendingForThread
from checkpoint.state.registers import Registers
from checkpoint.state.signals import AlternateStack

if TYPE_CHECKING:
    from checkpoint.state.table import ThreadState
    from checkpoint.thread import Thread
    from checkpoint.tracee import Process

__all__ = ["DIFFERING", "Likeness"]

#: kinds of state that are read of every thread
DIFFERING: Final[tuple[type[State], ...]] = (
    Comm,
    RobustList,
    ClearChildTid,
    RestartableSequences,
    AlternateStack,
    PendingForThread,
    Registers,
)


class Likeness:
    """Who is asked, and for whom it stands.

    asked  threads that are asked, the first of the process first
    like   the tids of the others: what the kernel keeps of each, and whom it is like
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self.asked: list[Thread] = []
        self.like: dict[int, tuple[ThreadRow, int]] = {}
        rows = self._rows() if len(process.threads) > 1 else {}
        first = rows.get(process.pid)
        known: dict[bytes, int] = {}
        for thread in process.threads:
            row = rows.get(thread.tid)
            if row is None or first is None or row.alone or row.pending or row.directories != first.directories:
                self.asked.append(thread)
                continue
            model = known.setdefault(row.common, thread.tid)
            if model == thread.tid:
                self.asked.append(thread)
            else:
                self.like[thread.tid] = row, model

    def _rows(self) -> Mapping[int, ThreadRow]:
        """By our numbers; nothing where the kernel does not tell, or its numbers are not ours."""
        depth = len(self._process.status["NSpid"].split())
        if depth > 2:
            return {}
        rows = threaditer.rows(self._process.pid) or ()
        return {(row.inner if depth == 1 else row.outer): row for row in rows}

    def look_again(self, view: ProcessView) -> None:
        """The calls have been made: those that are like others may have got signals since."""
        if self.like:
            view.silent = [TaskView(view, thread) for thread in self._process.threads if thread.tid in self.like]
            masks = {tid: row.pending for tid, row in self._rows().items()}
            for task in view.silent:
                # of one that is not seen any more it is asked
                task.has_pending = masks.get(task.tid, 1)

    def threads(
        self, view: ProcessView, asked: Mapping[int, ThreadState], make: Callable[[int, tuple[State, ...]], ThreadState]
    ) -> dict[int, ThreadState]:
        """The states of the others, by tid. ``asked``: of those that were."""
        found: dict[int, ThreadState] = {}
        places: dict[int, list[int]] = {}
        for task in view.silent:
            row, model = self.like[task.tid]
            states = list(asked[model].states)
            if model not in places:
                kinds = [type(state) for state in states]
                places[model] = [kinds.index(kind) for kind in DIFFERING]
            for place, state in zip(places[model], self._differing(task, row, asked[model]), strict=True):
                states[place] = state
            found[task.tid] = make(row.inner, tuple(states))
        return found

    def _differing(self, task: TaskView, row: ThreadRow, model: ThreadState) -> Iterator[State]:
        """Those of DIFFERING of one that is like another."""
        yield Comm(name=row.comm.split(b"\0", 1)[0])
        yield RobustList(head=row.robust, length=model.get(RobustList).length)
        yield ClearChildTid(address=row.clear_child_tid)
        yield RestartableSequences.capture(task)
        enabled = row.stack_size != 0
        yield AlternateStack(
            enabled=enabled,
            base=row.stack if enabled else 0,
            size=row.stack_size,
            flags=int(row.stack_flags & SsFlag.AUTODISARM) if enabled else 0,
        )
        yield PendingForThread.of(task, task.has_pending)
        yield Registers.capture(task)
