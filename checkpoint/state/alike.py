"""Threads that are in the same state as another one, told in a few numbers each.

A state of a thread is a record, and a thread has twenty of them: to write, to read and to check them takes longer than
all that is done to the thread.  Those that are like another (:mod:`checkpoint.state.likeness`) are told as a row: their
addresses, their name, their registers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from checkpoint.kernel.ptrace import RseqConfig
from checkpoint.kernel.signals import SsFlag
from checkpoint.kernel.threaditer import ThreadRow
from checkpoint.state.addresses import ClearChildTid, RestartableSequences, RobustList
from checkpoint.state.base import State
from checkpoint.state.comm import COMM_SIZE, Comm
from checkpoint.state.filesystem import ThreadDirectories
from checkpoint.state.pending import PendingForThread
from checkpoint.state.registers import Registers
from checkpoint.state.signals import AlternateStack
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.state.table import ThreadState

__all__ = ["DIFFERING", "AlikeThreads", "Likes", "whole"]

#: tid, call, left, blocked, robust list, clear_child_tid, rseq (address, size, signature), alternate stack (enabled,
#: base, size, flags), name
_ROW: Final = struct.Struct(f"<IiqQQQQII?QQI{COMM_SIZE}s")
_NO_CALL: Final = -1
_NO_SIGNALS: Final = PendingForThread(signals=())
_SHARED: Final = ThreadDirectories()
_AUTODISARM: Final = int(SsFlag.AUTODISARM)
#: kinds of state that threads have of their own which are like others; they share the others
DIFFERING: Final[tuple[type[State], ...]] = (
    Comm,
    RobustList,
    ClearChildTid,
    RestartableSequences,
    AlternateStack,
    PendingForThread,
    Registers,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AlikeThreads:
    """Threads of one process that are like another one of it.

    model     the number of that one
    rows      one after the other
    general   their general registers, one after the other, each as many bytes as the model's
    asleep    the same, as they were in their calls, of those that were in one of which the time that is left is known
    extended  their other registers, laid out as the model's
    """

    model: int
    rows: bytes
    general: bytes
    asleep: bytes
    extended: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if len(self.rows) != _ROW.size * len(self.extended):
            raise ValueError("the rows of threads do not agree with their registers")

    def threads(self, model: ThreadState) -> list[ThreadState]:
        """All of each. ValueError if they cannot be like that one."""
        registers, size = model.get(Registers), len(model.get(Registers).general)
        if not size or len(self.general) != size * len(self.extended):
            raise ValueError("registers of threads are missing")
        if model.get(ThreadDirectories) != _SHARED:
            raise ValueError("threads are like one that has directories of its own")
        length = model.get(RobustList).length
        at = 0
        places = [list(map(type, model.states)).index(kind) for kind in DIFFERING]
        found = []
        for number, (row, extended) in enumerate(zip(_ROW.iter_unpack(self.rows), self.extended, strict=True)):
            tid, call, left, blocked, robust, address, *rseq, enabled, base, high, flags, comm = row
            asleep = b""
            if call != _NO_CALL:
                asleep = self.asleep[at : at + size]
                at += size
                if len(asleep) != size:
                    raise ValueError("registers of threads are missing")
            own = (
                Comm(name=comm.rstrip(b"\0")),
                RobustList(head=robust, length=length),
                ClearChildTid(address=address),
                RestartableSequences(address=rseq[0], size=rseq[1], signature=rseq[2]),
                AlternateStack(enabled=enabled, base=base, size=high, flags=flags),
                _NO_SIGNALS,
                Registers(
                    machine=registers.machine,
                    general=self.general[number * size : (number + 1) * size],
                    extended=extended,
                    layout=registers.layout,
                    blocked=blocked,
                    call=None if call == _NO_CALL else call,
                    left=left,
                    asleep=asleep,
                ),
            )
            states = list(model.states)
            for place, state in zip(places, own, strict=True):
                states[place] = state
            found.append(model.another(tid, tuple(states)))
        return found


class Likes:
    """Threads that are like one, as they are found."""

    def __init__(self, model: int) -> None:
        self._model = model
        self._rows = bytearray()
        self._registers: list[Registers] = []

    def add(self, row: ThreadRow, rseq: RseqConfig | None, own: Registers) -> None:
        """One more."""
        enabled = row.stack_size != 0
        self._rows += _ROW.pack(
            *(row.inner, _NO_CALL if own.call is None else own.call, own.left, own.blocked),
            *(row.robust, row.clear_child_tid),
            *((0, 0, 0) if rseq is None else (rseq.address, rseq.size, rseq.signature)),
            *(enabled, row.stack if enabled else 0, row.stack_size, row.stack_flags & _AUTODISARM if enabled else 0),
            row.comm.split(b"\0", 1)[0],
        )
        self._registers.append(own)

    def told(self) -> AlikeThreads:
        """All of them."""
        return AlikeThreads(
            model=self._model,
            rows=bytes(self._rows),
            general=b"".join([own.general for own in self._registers]),
            asleep=b"".join([own.asleep for own in self._registers]),
            extended=tuple([own.extended for own in self._registers]),
        )


def whole(threads: Sequence[ThreadState], alike: Sequence[AlikeThreads]) -> tuple[ThreadState, ...]:
    """All threads of a process again. ValueError."""
    models = {thread.tid: thread for thread in threads}
    found = list(threads)
    for some in alike:
        if some.model not in models:
            raise ValueError(f"threads are like thread {some.model}, which is none")
        found += some.threads(models[some.model])
    return tuple(found)
