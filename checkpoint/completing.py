"""Rebuilt processes that have their files and all of their memory get what is left: threads and state, registers last.

Nothing can be called inside them afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from checkpoint.indoors import settle
from checkpoint.memory.layout import MemoryLayout
from checkpoint.records import ProcessRecord
from checkpoint.spawn import Stub
from checkpoint.state import birth, table
from checkpoint.state.registers import Registers
from checkpoint.state.table import ProcessState

__all__ = ["complete"]


def complete(
    living: Sequence[ProcessRecord],
    states: Mapping[int, ProcessState],
    layouts: Mapping[int, MemoryLayout],
    stubs: Mapping[int, Stub],
    *,
    whole: bool,
    since_ns: int,
    warn: Callable[[str], None],
    path: Callable[[str], str],
) -> None:
    """Do it, for all processes of a tree.

    living, states, layouts, stubs  the processes, and by their PIDs what they are to be, and are now
    whole     all of their memory is there; else what its pages say cannot be looked at
    since_ns  when the states were captured, by our CLOCK_MONOTONIC
    warn      told, in one sentence, of whatever will differ
    path      maps a path of the source to one here

    StateRefused, PidTaken, SpawnFailed, TimerOutOfReach, MachineForeign, HandlerInVdso, ...
    """
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
        elapsed = time.monotonic_ns() - since_ns
        placed = bool(record.task.directories)
        table.build(stubs[pid], states[pid], warn=warn, elapsed=elapsed, path=path, placed=placed)
    for record in living:
        stub = stubs[record.task.pid]
        stub.leave()
        table.install(stub, states[record.task.pid])
