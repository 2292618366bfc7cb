"""Excursions: threads of a stopped process leave their own code for ours, stop there, and come home.

A thread enters by one change of registers; only then are its signals blocked from outside, so that those that are
pending stay where they are.  It stops by the *stop signal*, which the process ignores (``checkpoint/arch``).  It comes
home by its mask first and its registers last, because until the registers change it stands in code that would take it
home by itself.

A stop signal from elsewhere (SIGURG: out-of-band data, Go's scheduler) reaches us, too; it is kept, to be queued again.
The one case in which it is lost: it arrives, directed at this very thread, within the system call that stops it.
"""

from __future__ import annotations

import signal
import struct
import time
from collections.abc import Iterable
from typing import Final

from checkpoint import procfs
from checkpoint.arch import Registers, frame_of
from checkpoint.errors import EngineFault, InjectionTimeout, StopTimeout
from checkpoint.kernel import ptrace
from checkpoint.kernel.ptrace import Event
from checkpoint.kernel.signals import SiCode
from checkpoint.telling import tell
from checkpoint.thread import Thread
from checkpoint.tracee import Process

__all__ = ["Excursions", "is_stop_signal"]

# Signals whose default action is to be ignored (signal(7)), the rarest in use first; not SIGCONT, which acts at once.
_STOP_SIGNALS: Final = (signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD)
# What a fault in our own code raises; the kernel delivers these even when they are blocked.
_FAULTS: Final = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS})
_ALL_SIGNALS: Final = (1 << 64) - 1
_SIGINFO_HEAD = struct.Struct("<iii4xi")  # si_signo, si_errno, si_code, si_pid
_INTERRUPT_TIMEOUT: Final = 5.0
_BIRTHS: Final = frozenset({Event.FORK, Event.VFORK, Event.CLONE})


def is_stop_signal(thread: Thread) -> bool:
    """Whether the signal that is to be delivered is one by which code of ours, or of an earlier tool, stops."""
    number, _, code, sender = _SIGINFO_HEAD.unpack_from(ptrace.signal_info(thread.tid))
    own = procfs.inner_ids(thread.pid)[0]
    return number in _STOP_SIGNALS and code == SiCode.TKILL and sender == own


class Excursions:
    """The excursions of one process's threads.

    stop_signal  with which our code stops
    caught       the process has a handler for it (it has one for each candidate, as Go programs do): should the tool
                 die in the middle, the handler runs once more than it should
    away         tids of the threads that stand in our code, or run there
    foreign      siginfo_t of stop signals from elsewhere, by the tid to which they were directed, 0: to the process
    born         tids of threads and processes that the calls have made, in order (if the tracing options say so)
    """

    def __init__(self, process: Process) -> None:
        self.process = process
        handled = int(process.status["SigCgt"], 16)
        self._free = [number for number in _STOP_SIGNALS if not handled >> (number - 1) & 1]
        self.caught = not self._free
        self.stop_signal = int(self._free[0] if self._free else _STOP_SIGNALS[0])
        self.away: set[int] = set()
        self.foreign: dict[int, bytes] = {}
        self.born: list[int] = []
        self._at: dict[int, int] = {}  # by tid, at which stop of our code it stands

    def use_another_signal(self) -> None:
        """From now on stop with another signal, so that the first can be queued; all frames must be written again."""
        candidates = self._free or _STOP_SIGNALS
        self.stop_signal = int(next(number for number in (*candidates, *_STOP_SIGNALS) if number != self.stop_signal))

    def frame(self, thread: Thread) -> bytes:
        """What takes the thread home if the tool dies."""
        own = self.process.inner_pid, self.process.inner_tid(thread)
        return frame_of(thread.registers, thread.sigmask, self.stop_signal, *own, thread.call, thread.get_xstate)

    def start(self, thread: Thread, registers: Registers) -> None:
        """Send the thread into our code, wherever it stands."""
        thread.set_registers(registers)
        self.away.add(thread.tid)
        self._at.pop(thread.tid, None)
        thread.set_sigmask(_ALL_SIGNALS & ~(1 << (self.stop_signal - 1)))
        thread.cont()

    def finish(self, thread: Thread, at: int, timeout: float) -> Registers:
        """Wait until the thread stops at the address ``at``; its registers.

        InjectionTimeout: a call did not return; it was interrupted. EngineFault: our code is at fault. In both cases
        the thread stands still and can be taken home.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                stop = thread.wait(max(deadline - time.monotonic(), 0))
            except StopTimeout as error:
                thread.interrupt()
                thread.await_interrupt(_INTERRUPT_TIMEOUT)
                raise InjectionTimeout(f"a call did not return within {timeout:g} s", object=thread.name) from error
            if stop.event == Event.SIGNAL:
                registers = thread.get_registers()
                if self._is_ours(thread, registers, at):
                    self._at[thread.tid] = at
                    return registers
            elif stop.event in _BIRTHS:
                self.born.append(ptrace.event_message(thread.tid))
            # else the trap that a group stop leaves pending: nothing happened
            thread.cont()

    def _is_ours(self, thread: Thread, registers: Registers, at: int) -> bool:
        """Whether the signal that is to be delivered is the one by which our code stops; any other is kept."""
        info = ptrace.signal_info(thread.tid)
        number, _, code, sender = _SIGINFO_HEAD.unpack_from(info)
        if number == self.stop_signal:
            if registers.ip == at and code == SiCode.TKILL and sender == self.process.inner_pid:
                return True
            # Standard signals are not counted: one in each queue is all there can be.
            self.foreign[thread.tid if code == SiCode.TKILL else 0] = info
        elif number in _FAULTS:
            name = signal.Signals(number).name
            raise EngineFault(f"{name} at {registers.ip:#x}", object=thread.name)
        elif number == signal.SIGSTOP:
            self.process.stop_later()
        else:
            self.foreign[thread.tid if code == SiCode.TKILL else 0] = info
        return False

    def forget(self, thread: Thread) -> None:
        """It has ended."""
        self.away.discard(thread.tid)
        self._at.pop(thread.tid, None)

    def home(self, threads: Iterable[Thread]) -> None:
        """Put threads back to where they were when the process was stopped."""
        going = [thread for thread in threads if self._leave(thread)]
        for thread in going:
            thread.await_interrupt(_INTERRUPT_TIMEOUT)

    def _leave(self, thread: Thread) -> bool:
        """Whether it is on its way to another stop."""
        if thread.fleeting is not None:
            thread.set_xstate(thread.fleeting)
        at = self._at.pop(thread.tid, None)
        if at is not None and thread.registers.untold:
            tell(thread, thread.registers, at, thread.sigmask)
            self.away.discard(thread.tid)
            return False
        thread.set_sigmask(thread.sigmask)
        thread.set_registers(thread.registers)
        self.away.discard(thread.tid)
        if self.caught:
            # It stands before the delivery of the stop signal. Should the tool die now, the handler would run: go on
            # to another stop, which is before the first instruction of its own.
            thread.interrupt()
            thread.cont()
        return self.caught
