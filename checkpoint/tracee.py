"""A tree of processes, stopped: threads, processes, and the tree. (First version: the interface.)"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from checkpoint.arch import Registers
from checkpoint.kernel.ptrace import Option, RseqConfig
from checkpoint.memory.vma import Vma
from checkpoint.procfs import Stat
from checkpoint.verdict import Verdict

__all__ = ["Process", "Stop", "Thread", "Tree", "verdicts"]

STOP_TIMEOUT: Final = 5.0


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a thread stopped: ``event`` (ptrace Event) and ``signal``."""

    event: int
    signal: int


class Thread:
    """One thread that is traced by us.

    tid, inner_tid  its number here, and in its own PID namespace
    registers       what the *application* has in its registers, as of the stop: corrected for a critical section of
                    rseq, with a spurious EINTR (made by our stop) turned into a restart. Injected code running does
                    not change it. `arch.for_restore(...)` makes of it what a rebuilt thread must get.
    sigmask         its blocked signals, as of the stop
    rseq            its rseq area or None
    """

    tid: int
    inner_tid: int
    registers: Registers
    sigmask: int
    rseq: RseqConfig | None

    def seize(self, options: Option) -> None: ...
    def interrupt(self) -> None: ...
    def wait(self, timeout: float | None = None) -> Stop: ...
    def get_registers(self) -> Registers: ...  # raw, now: the engine's while an injection runs
    def set_registers(self, registers: Registers) -> None: ...
    def get_xstate(self) -> bytes: ...
    def set_xstate(self, data: bytes) -> None: ...
    def get_sigmask(self) -> int: ...
    def set_sigmask(self, mask: int) -> None: ...
    def pending(self, *, shared: bool = False) -> list[bytes]: ...
    def detach(self, signal: int = 0) -> None: ...


class Process:
    """One stopped process.

    pid, inner_pid   its number here, and in its own PID namespace
    threads          leader first
    stat             as of the stop (ppid, pgid, sid, ...)
    stop_signal      the signal that holds it in a group stop (state T) of its own, 0 if it runs
    mem_fd, pagemap_fd, pidfd   opened on first use, closed by `close`
    maps             read at first use after the stop; `forget_maps()` after something changed them
    """

    pid: int
    inner_pid: int
    threads: list[Thread]
    stat: Stat
    stop_signal: int

    @property
    def leader(self) -> Thread: ...
    def thread(self, tid: int) -> Thread: ...
    @property
    def mem_fd(self) -> int: ...
    @property
    def pidfd(self) -> int: ...
    @property
    def pagemap_fd(self) -> int: ...
    @property
    def maps(self) -> list[Vma]: ...
    def forget_maps(self) -> None: ...
    def read(self, address: int, size: int) -> bytes: ...
    def write(self, address: int, data: bytes) -> None: ...
    def close(self) -> None: ...


class Tree:
    """Processes that are stopped together, parents before children; `zombies`: the dead among them (stat)."""

    processes: list[Process]
    zombies: list[Stat]

    @classmethod
    def stop(cls, roots: Iterable[int], *, timeout: float = STOP_TIMEOUT) -> Tree: ...
    def queue_sigstops(self) -> None: ...
    def resume(self) -> None: ...
    def kill(self) -> None: ...


def verdicts(pid: int) -> list[Verdict]: ...
