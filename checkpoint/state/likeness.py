"""Threads of a stopped process that are in the same state: one of them is asked for it, by calls that it makes.

Most threads of a program differ in nothing but their registers, their names and a few addresses.  Which of them do the
kernel's own notes tell (:mod:`checkpoint.kernel.threaditer`), for all threads at once and while they stand still.  Of
those that are alike the first is asked; of the others it is read what each has for itself
(:mod:`checkpoint.state.alike`).  Where the kernel does not tell, all are asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from checkpoint.kernel import threaditer
from checkpoint.kernel.threaditer import ThreadRow
from checkpoint.state.alike import AlikeThreads, Likes
from checkpoint.state.base import ProcessView, TaskView
from checkpoint.state.pending import PendingForThread
from checkpoint.state.registers import Registers

if TYPE_CHECKING:
    from checkpoint.state.table import ThreadState
    from checkpoint.thread import Thread
    from checkpoint.tracee import Process

__all__ = ["Likeness"]


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
        """The calls have been made: those that are like others may have got signals since, and are told whole then."""
        if not self.like:
            return
        view.silent = [TaskView(view, thread) for thread in self._process.threads if thread.tid in self.like]
        masks = {tid: row.pending for tid, row in self._rows().items()}
        for task in view.silent:
            # of one that is not seen any more it is asked
            task.has_pending = masks.get(task.tid, 1)

    def threads(
        self, view: ProcessView, asked: Mapping[int, ThreadState]
    ) -> tuple[list[ThreadState], tuple[AlikeThreads, ...]]:
        """The others: those with signals that wait for them, and rows. ``asked``: the states of those that were."""
        apart: list[ThreadState] = []
        likes: dict[int, Likes] = {}
        for task in view.silent:
            row, model = self.like[task.tid]
            some = likes.get(model)
            if some is None:
                some = likes[model] = Likes(asked[model].tid)
            thread, own = task.thread, Registers.capture(task)
            if task.has_pending:
                one = Likes(asked[model].tid)
                one.add(row, thread.rseq, own)
                (found,) = one.told().threads(asked[model])
                signals = PendingForThread.of(task, task.has_pending)
                states = [signals if type(state) is PendingForThread else state for state in found.states]
                apart.append(found.another(found.tid, tuple(states)))
            else:
                some.add(row, thread.rseq, own)
        return apart, tuple(some.told() for some in likes.values())
