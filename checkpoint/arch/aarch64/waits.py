"""System calls that wait for a relative time and of which the kernel keeps no note: on aarch64 each begins anew with
its whole time.

To begin one with what was left takes a register that the program does not look at any more, and the code that would
tell is read on x86-64 only.  What waits by ppoll and pselect6 is not concerned: the kernel writes down what is left.

Source: fs/eventpoll.c, kernel/signal.c (do_sigtimedwait), ipc/sem.c, fs/aio.c; arch/arm64/include/asm/processor.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from checkpoint.arch.aarch64.registers import Registers

__all__ = ["KERNEL_STACK_POINTER", "WAITS", "may_change_time", "wait_of"]

#: where struct task_struct has the stack pointer of a thread that the kernel has switched away from
KERNEL_STACK_POINTER: Final = "thread.cpu_context.sp"
#: the calls that can begin with what was left, by number
WAITS: Final[frozenset[int]] = frozenset()


def may_change_time(read: Callable[[int, int], bytes], number: int, ip: int) -> bool:
    """Whether a program that is in a call does not look again at the register that tells the time: nobody knows."""
    return False


def wait_of(registers: Registers) -> None:
    """The wait of :data:`WAITS` that a stopped thread is in: none."""
