"""How the kernel is told again in which system call a thread was stopped, where its registers do not say it.

On aarch64 the kernel decides in one and the same stop whether a call is made again, or ends with EINTR since a signal's
handler runs.  Once other calls were made in the thread it has forgotten that there was a call.  It looks at x0 after
each call that a signal has interrupted.  So the thread makes one that does nothing, with the first argument of the
application's call, which the kernel keeps; is held at its end; asked to stop; and given registers in which the
application's own call ends with the result that means *again*.  It then stops as it had stopped at first.

Source: arch/arm64/kernel/signal.c (do_signal), kernel/signal.c (ptrace_stop, get_signal).
"""

from __future__ import annotations

import signal
import struct
import time
from typing import Final

from checkpoint.arch import Registers, behind_call, telling, told
from checkpoint.errors import ProcessDied, StopTimeout
from checkpoint.kernel import ptrace
from checkpoint.kernel.ptrace import Event
from checkpoint.memory.vma import VDSO, find_named
from checkpoint.thread import Thread
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS

__all__ = ["begin_again", "call_in_vdso", "tell"]

#: seconds in which a thread has come to a call that it stands before
_TIMEOUT: Final = 5.0
_ALL_SIGNALS: Final = (1 << 64) - 1
_SIGINFO_HEAD: Final = struct.Struct("<iii")  # si_signo, si_errno, si_code


def _is_call(thread: Thread) -> bool:
    """Whether a stop is that of a call (kernel/ptrace.c: the code is the signal's number), and not of a signal."""
    stop = thread.stop
    if stop is None or stop.event != Event.SIGNAL or stop.signal != signal.SIGTRAP:
        return False
    code: int = _SIGINFO_HEAD.unpack_from(ptrace.signal_info(thread.tid))[2]
    return code == signal.SIGTRAP


def begin_again(thread: Thread) -> None:
    """Let a stopped thread, which stands before a call that can wait, begin it, and stop it in there at once; a signal
    that is due is delivered first. Had the kernel a note of a sleep, it goes on with that, and tells so."""
    ptrace.cont_to_call(thread.tid)
    stop = thread.wait(_TIMEOUT)
    deliver = stop.signal if stop.event == Event.SIGNAL and not _is_call(thread) else 0
    thread.interrupt()
    thread.cont(deliver)
    thread.await_interrupt(_TIMEOUT)


def call_in_vdso(pid: int) -> int:
    """The address behind an instruction of the vdso that makes a system call. ProcessDied if there is none."""
    vdso = find_named(pid, VDSO)
    if vdso is not None:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(vdso.start)
            code = memory.read(vdso.size)
        behind = behind_call(code)
        if behind is not None:
            return vdso.start + behind
    raise ProcessDied("it has no vdso", object=f"pid {pid}")


def tell(thread: Thread, registers: Registers, at: int, mask: int) -> None:
    """Bring a thread, in which all but one signal are blocked, into the application's call, stopped.

    registers  the application's
    at         the address behind an instruction that makes a call, from where on the thread could go on by itself
    mask       the signals that it shall block then

    StopTimeout, ProcessDied.
    """
    thread.set_sigmask(_ALL_SIGNALS)
    thread.set_registers(telling(registers, at))
    deadline = time.monotonic() + _TIMEOUT
    taken = [*_to_call(thread, deadline), *_to_call(thread, deadline)]  # its beginning, its end
    thread.interrupt()  # before the registers: with them the thread must not run on without another look at signals
    thread.set_sigmask(mask)
    thread.set_registers(told(registers))
    thread.cont()
    thread.await_interrupt(_TIMEOUT)
    for number in taken:
        syscall(SYS.tgkill, thread.pid, thread.tid, number)


def _to_call(thread: Thread, deadline: float) -> list[int]:
    """To the next beginning or end of a call; the signals that were taken away meanwhile: SIGSTOP cannot be blocked."""
    taken: list[int] = []
    while True:
        ptrace.cont_to_call(thread.tid)
        stop = thread.wait(max(deadline - time.monotonic(), 0))
        if _is_call(thread):
            return taken
        if stop.event == Event.SIGNAL:
            taken.append(stop.signal)
        if time.monotonic() > deadline:
            raise StopTimeout("a call does not begin", object=thread.name)
