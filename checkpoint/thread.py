"""One thread of another process, traced by ptrace: stop, registers, signals, running on.

All of it must be done by the very thread of ours that seized it (ptrace(2)).
"""

from __future__ import annotations

import os
import signal
import time
from typing import Final

from checkpoint import procfs
from checkpoint.arch import Registers, get_extended, set_extended
from checkpoint.errors import ProcessDied, StopTimeout
from checkpoint.kernel import ptrace
from checkpoint.kernel.ptrace import Event, Option, RseqConfig
from tcpstate.slotted import dataclass

__all__ = ["Stop", "Thread", "signal_of", "wait_status"]

# A batch of calls takes tens of microseconds, less than a sleep does: look that often before sleeping.
_LOOKS: Final = 20
#: seconds of one sleep at most: a thread of ours that does not block SIGCHLD may have taken the one we wait for
_LONGEST_SLEEP: Final = 1e-3
_SIGCHLD: Final = frozenset({signal.SIGCHLD})


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a thread stands still.

    event   what kind of stop it is (:class:`~checkpoint.kernel.ptrace.Event`)
    signal  SIGNAL: the signal that is to be delivered. STOP: SIGTRAP, or the signal that holds the whole process
    """

    event: int
    signal: int

    @property
    def group(self) -> bool:
        """Whether the process is stopped by a signal (state T) and not just by us."""
        return self.event == Event.STOP and self.signal != signal.SIGTRAP


def wait_status(tid: int, timeout: float | None = None) -> int:
    """The next wait status of a traced thread.

    timeout  seconds, None: for ever; StopTimeout after that. ProcessDied if the thread is no longer there.
    """
    if timeout is None:
        flags, deadline = ptrace.WALL, 0.0
    else:
        flags, deadline = ptrace.WALL | os.WNOHANG, time.monotonic() + timeout
    looks = 0
    mask: set[int | signal.Signals] | None = None
    try:
        while True:
            try:
                found, status = os.waitpid(tid, flags)
            except ChildProcessError as error:
                raise ProcessDied("the thread has ended", object=f"tid {tid}") from error
            if found:
                return status
            looks += 1
            if looks < _LOOKS:
                os.sched_yield()
            elif mask is None:
                # blocked before the next look: a stop after that look leaves its signal pending
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGCHLD)
            elif time.monotonic() > deadline:
                raise StopTimeout(f"the thread did not stop within {timeout:g} s", object=f"tid {tid}")
            else:
                signal.sigtimedwait(_SIGCHLD, _LONGEST_SLEEP)
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class Thread:
    """One traced thread.

    pid, tid    of its process, and its own, in our PID namespace; ``inner``: its own in its own one, if that is known
    stop        how it stands; None while it runs
    registers   what the *application* has in its registers, as of the stop: outside any critical section of rseq, an
                EINTR that only our stop has made turned into a restart. They stay what they are while injected code
                runs. ``arch.for_restore`` makes of them what a rebuilt thread gets.
    call        the number of the system call that it was stopped in, also if it had been stopped in it before; None if
                it was in none, or nobody knows
    sigmask     the signals that it blocks, as of the stop; bit n-1 for signal n
    rseq        its restartable-sequences area, None if it has none
    until       when it has waited long enough in that call (arch.Wait), by our CLOCK_MONOTONIC in nanoseconds; None:
                it does not wait in one, or nobody knows
    fleeting    its FP and vector registers, as of the stop, if calls made in it lose some of them; else None
    slept       what the call returned that a rebuilt thread was given to sleep in (checkpoint.sleep); None: nothing
    """

    __slots__ = ("_inner", "call", "fleeting", "pid", "registers", "rseq", "sigmask", "slept", "stop", "tid", "until")

    registers: Registers
    sigmask: int
    rseq: RseqConfig | None

    def __init__(self, pid: int, tid: int, inner: int | None = None) -> None:
        self.pid = pid
        self.tid = tid
        self.stop: Stop | None = None
        self.call: int | None = None
        self.until: int | None = None
        self.slept: int | None = None
        self.fleeting: bytes | None = None
        self._inner = inner

    def __repr__(self) -> str:
        return f"<Thread {self.tid} of {self.pid}: {self.stop or 'runs'}>"

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"pid {self.pid}" if self.tid == self.pid else f"pid {self.pid} tid {self.tid}"

    @property
    def inner_tid(self) -> int:
        """Its number in its own PID namespace."""
        if self._inner is None:
            self._inner = procfs.inner_ids(self.pid, self.tid)[0]
        return self._inner

    def seize(self, options: Option = Option(0)) -> None:  # noqa: B008 - an immutable flag
        """Become its tracer; it runs on."""
        ptrace.seize(self.tid, options)

    def interrupt(self) -> None:
        """Ask it to stop."""
        ptrace.interrupt(self.tid)

    def wait(self, timeout: float | None = None) -> Stop:
        """Its next stop. ProcessDied if it ends instead, StopTimeout after ``timeout`` seconds."""
        status = wait_status(self.tid, timeout)
        if not os.WIFSTOPPED(status):
            raise ProcessDied(_end_in_words(status), object=self.name)
        self.stop = Stop(status >> 16, os.WSTOPSIG(status))
        return self.stop

    def await_interrupt(self, timeout: float) -> None:
        """Wait for the stop that :meth:`interrupt` asked for. A signal that is due first is delivered first: the thread
        then stops at the first instruction of its handler."""
        deadline = time.monotonic() + timeout
        while True:
            stop = self.wait(max(deadline - time.monotonic(), 0))
            if stop.event == Event.STOP:
                return
            # any other stop may have cleared what was asked for (kernel/signal.c, ptrace_stop); twice is once
            self.interrupt()
            self.cont(stop.signal if stop.event == Event.SIGNAL else 0)

    def cont(self, signal_number: int = 0) -> None:
        """Let it run on, traced; in a signal-delivery stop with ``signal_number`` delivered."""
        ptrace.cont(self.tid, signal_number)
        self.stop = None

    def detach(self, signal_number: int = 0) -> None:
        """Let it run on without us."""
        ptrace.detach(self.tid, signal_number)
        self.stop = None

    def get_registers(self) -> Registers:
        """What is in its registers now: those of injected code while an injection is open."""
        return Registers.unpack(ptrace.get_register_set(self.tid, ptrace.GENERAL_SET, _GENERAL_SIZE))

    def set_registers(self, registers: Registers) -> None:
        """Replace its registers."""
        ptrace.set_register_set(self.tid, ptrace.GENERAL_SET, registers.in_set())

    def get_xstate(self) -> bytes:
        """Its FP and vector registers, in the format and size of this machine. Injected code does not use them."""
        return get_extended(self.tid) if self.fleeting is None else self.fleeting

    def set_xstate(self, data: bytes) -> None:
        """Replace its FP and vector registers. OSError if this machine's format is another."""
        set_extended(self.tid, data)

    def get_sigmask(self) -> int:
        """The signals that it blocks now."""
        return ptrace.get_signal_mask(self.tid)

    def set_sigmask(self, mask: int) -> None:
        """Replace the signals that it blocks."""
        ptrace.set_signal_mask(self.tid, mask)

    def pending(self, *, shared: bool = False) -> list[bytes]:
        """The siginfo_t of each signal that waits for it, or (``shared``) for its process."""
        return ptrace.peek_signals(self.tid, shared=shared)


_GENERAL_SIZE: Final = 512


def signal_of(info: bytes) -> int:
    """The number of the signal that a siginfo_t tells of (its first field)."""
    return int.from_bytes(info[:4], "little")


def _end_in_words(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"it was killed by signal {os.WTERMSIG(status)}"
    return f"it exited with status {os.WEXITSTATUS(status)}"
