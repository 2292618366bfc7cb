"""Rebuilt processes that have their files and all of their memory get what is left: threads and state, registers last.

Their states come all at once; or, while the originals' are still being read, some and then others.  Nothing can be
called inside a process that is complete.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from checkpoint.errors import ImageIncomplete
from checkpoint.indoors import settle
from checkpoint.memory.layout import MemoryLayout
from checkpoint.records import StatesRecord, TreeRecord
from checkpoint.spawn import Stub
from checkpoint.state import birth, table
from checkpoint.state.registers import Registers
from checkpoint.state.table import ProcessState

__all__ = ["Completion"]


class Completion:
    """The states of a tree's processes, and who has been given his.

    states  by PID, those that have come; of the tree's living processes, and nobody else
    begun   a process has been completed: no more memory may come
    """

    def __init__(self) -> None:
        self.states: dict[int, ProcessState] = {}
        self.begun = False
        self._arrived_ns = 0
        self._complete = set[int]()

    def take(self, tree: TreeRecord | None, told: StatesRecord) -> None:
        """States have come. ImageIncomplete if they are not expected, or do not fit the tree."""
        if tree is None or (self.states and not told.apart):
            raise ImageIncomplete("the record STATES came where it is not expected")
        try:
            found = tree.states(told)
        except ValueError as error:
            raise ImageIncomplete(f"the record STATES does not fit TREE: {error}") from None
        if not self.states.keys().isdisjoint(found):
            raise ImageIncomplete("the record STATES tells of a process again")
        self.states |= found
        self._arrived_ns = time.monotonic_ns()

    def complete(
        self,
        tree: TreeRecord,
        layouts: Mapping[int, MemoryLayout],
        stubs: Mapping[int, Stub],
        *,
        whole: bool,
        warn: Callable[[str], None],
        path: Callable[[str], str],
    ) -> None:
        """Complete the processes whose states have come since the last time.

        layouts, stubs  by their PIDs what the processes are to be, and are now
        whole     all of their memory is there; else what its pages say cannot be looked at
        warn      told, in one sentence, of whatever will differ
        path      maps a path of the source to one here

        StateRefused, PidTaken, SpawnFailed, TimerOutOfReach, MachineForeign, HandlerInVdso, ...
        """
        self.begun = True
        fresh = self.states.keys() - self._complete
        self._complete |= fresh
        living = [record for record in tree.living if record.task.pid in fresh]
        states = {pid: self.states[pid] for pid in fresh}
        birth.dismiss_ended(stubs, states)
        for record in living:
            pid = record.task.pid
            registers = [thread.get(Registers) for thread in states[pid].threads]
            settle(stubs[pid], layouts[pid], registers, whole=whole)
            if record.task.directories:
                # threads with directories of their own begin in the tool's, not in those that others are given
                birth.bear_threads(stubs[pid], states[pid], warn)
        for record in living:
            pid = record.task.pid
            elapsed = time.monotonic_ns() - self._arrived_ns
            placed = bool(record.task.directories)
            table.build(stubs[pid], states[pid], warn=warn, elapsed=elapsed, path=path, placed=placed)
        for record in living:
            stub = stubs[record.task.pid]
            stub.leave()
            table.install(stub, states[record.task.pid])
