"""The machine code that makes system calls inside a stopped process, x86-64.

Two pieces.  **Boot** lies in the zero bytes behind the vdso's end, read-only, and makes one call at a time: with it
memory for the second piece is mapped.  **The engine** lies in that memory, one copy for each thread, and walks a table.

Both keep one rule: *if the tracer is killed, at whatever instruction the thread stands, the thread goes on as if it had
never been stopped*.

- One change of registers switches a thread from its own code into ours. So our code blocks the signals itself, and it
  touches neither the stack nor the 128 bytes below it. It works on the thread's own stack pointer: should a signal
  get through, its frame lies where the thread would have had it.
- It stops by sending itself the *stop signal*, one that the process ignores (SIGURG). A living tracer sees that as a
  signal-delivery stop. Without a tracer the kernel drops the signal, and the code runs on: it makes the undo calls of
  its table, puts back flags, stack pointer, signal mask and registers, and jumps to where the thread was stopped.
- The registers come from the *frame* behind the code, not from rt_sigreturn, which would forget the restart block.

``BOOT`` and ``ENGINE`` are ``BOOT_SOURCE`` and ``ENGINE_SOURCE`` assembled; a unit test assembles and compares.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from typing import Final

from checkpoint.arch.x86_64.registers import Registers, by_hand
from tcpstate.kernel.machine import SYS, WALK_SOURCE

__all__ = [
    "BOOT",
    "BOOT_SIZE",
    "BOOT_SOURCE",
    "BOOT_STOP",
    "ENGINE",
    "ENGINE_SIZE",
    "ENGINE_SOURCE",
    "ENGINE_STOP",
    "boot_call",
    "boot_image",
    "boot_result",
    "engine_idle",
    "engine_image",
    "engine_position",
    "engine_start",
    "frame_of",
    "telling",
]

_MASK = (1 << 64) - 1
_ALL = _MASK
_SYSCALL_LENGTH = 2

_SIGMASK = f"""\
        mov     edi, 2                  # rt_sigprocmask(SIG_SETMASK, {{0}}, 0, 8)
        lea     rsi, [rip + {{0}}]
        mov     edx, 0                  # (mov, not xor: the flags stay)
        mov     r10d, 8
        mov     eax, {SYS.rt_sigprocmask:d}
        syscall
"""

_STOP = f"""\
        mov     rdi, [rip + f_tgid]     # tgkill(own process, own thread, stop signal)
        mov     rsi, [rip + f_tid]
        mov     rdx, [rip + f_signal]
        mov     eax, {SYS.tgkill:d}
        syscall
"""

# With everything blocked no signal frame can be pushed while rsp points into the frame.  After that only mov: the flags
# are back, and survive the system call (it keeps them in r11).  Pending signals are delivered at its end.
_RESTORE = f"""\
{_SIGMASK.format("f_all")}        lea     rsp, [rip + f_flags]
        popfq
        mov     rsp, [rip + f_rsp]
{_SIGMASK.format("f_mask")}        mov     r15, [rip + f_r15]
        mov     r14, [rip + f_r14]
        mov     r13, [rip + f_r13]
        mov     r12, [rip + f_r12]
        mov     rbp, [rip + f_rbp]
        mov     rbx, [rip + f_rbx]
        mov     r11, [rip + f_r11]
        mov     r10, [rip + f_r10]
        mov     r9, [rip + f_r9]
        mov     r8, [rip + f_r8]
        mov     rax, [rip + f_rax]
        mov     rcx, [rip + f_rcx]
        mov     rdx, [rip + f_rdx]
        mov     rsi, [rip + f_rsi]
        mov     rdi, [rip + f_rdi]
        jmp     [rip + f_rip]
"""

_FRAME_NAMES: Final = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("rip", "flags", "rsp", "mask", "busy", "all", "tgid", "tid", "signal"),
)
_FRAME = struct.Struct(f"<{len(_FRAME_NAMES)}Q")
_FRAME_SOURCE = "        .balign 8\nframe:\n" + "".join(f"f_{name}: .quad 0\n" for name in _FRAME_NAMES)

#: In: rbx number, rbp r12 r13 r14 r8 r9 arguments; r15: 0, or number of the undo call with the arguments r8, r9, or, if
#: negative, (result, r12). Out, at boot_stop: rbx result.
BOOT_SOURCE: Final = f"""\
        .intel_syntax noprefix
        .text
boot:
{_SIGMASK.format("f_busy")}        mov     rax, rbx
        mov     rdi, rbp
        mov     rsi, r12
        mov     rdx, r13
        mov     r10, r14
        syscall
        mov     rbx, rax
{_STOP}boot_stop:
        test    r15, r15                # here only without a tracer, or from the engine
        jz      2f
        mov     rdi, r8
        mov     rsi, r9
        jns     1f
        mov     rdi, rbx
        mov     rsi, r12
1:      mov     eax, r15d
        syscall
2:
{_RESTORE}{_FRAME_SOURCE}"""

#: In: r12, r13 table and its end; r14, r15 undo table and its end. Out, at engine_stop: r12 the entry that failed, or
#: the end. ``final``: where boot_stop is (0: leave the memory), address and length to be unmapped by it.
ENGINE_SOURCE: Final = f"""\
        .intel_syntax noprefix
        .text
engine:
{_SIGMASK.format("f_busy")}        lea     rbp, [rip + done]
{WALK_SOURCE}        jmp     rbp
done:
{_STOP}engine_stop:
        mov     r12, r14                # here only without a tracer
        mov     r13, r15
        lea     rbp, [rip + undone]
        jmp     walk
undone: mov     rcx, [rip + final]
        test    rcx, rcx
        jz      1f
        mov     r8, [rip + final + 8]
        mov     r9, [rip + final + 16]
        mov     r15d, {SYS.munmap:d}                # munmap: boot, outside that memory, makes it and restores
        jmp     rcx
1:
{_RESTORE}{_FRAME_SOURCE}final:  .quad   0, 0, 0
"""

BOOT: Final = bytes.fromhex(
    "bf02000000488d35ac010000ba0000000041ba08000000b80e0000000f054889d84889ef4c89e64c"
    "89ea4d89f20f054889c3488b3d8f010000488b3590010000488b1591010000b8ea0000000f054d85"
    "ff74134c89c74c89ce79064889df4c89e64489f80f05bf02000000488d354e010000ba0000000041"
    "ba08000000b80e0000000f05488d25150100009d488b2515010000bf02000000488d3511010000ba"
    "0000000041ba08000000b80e0000000f054c8b3d680000004c8b35690000004c8b2d6a0000004c8b"
    "256b000000488b2d6c000000488b1d6d0000004c8b1d6e0000004c8b156f0000004c8b0d70000000"
    "4c8b0571000000488b0572000000488b0d73000000488b1574000000488b3575000000488b3d7600"
    "0000ff25780000000000000000000000000000000000000000000000000000000000000000000000"
    "00000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "00000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "00000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "00000000000000000000000000000000000000000000000000000000000000000000000000000000"
)
BOOT_STOP: Final = 0x4E
ENGINE: Final = bytes.fromhex(
    "bf02000000488d3554020000ba0000000041ba08000000b80e0000000f05488d2d940000004d39ec"
    "0f8389000000498b0424498b7c2408498b742410498b5424184d8b5424204d8b4424284d8b4c2430"
    "418b4c2448f6c53f7430f6c5017403488b3ff6c5027403488b36f6c5047403488b12f6c50874034d"
    "8b12f6c51074034d8b00f6c52074034d8b090f054989442438498b4c24404885c97403488901483d"
    "01f0ffff720841f64424480174094983c450e96effffffffe5488b3db0010000488b35b101000048"
    "8b15b2010000b8ea0000000f054d89f44d89fd488d2d05000000e93effffff488b0d9a0100004885"
    "c974164c8b05960100004c8b0d9701000041bf0b000000ffe1bf02000000488d3553010000ba0000"
    "000041ba08000000b80e0000000f05488d251a0100009d488b251a010000bf02000000488d351601"
    "0000ba0000000041ba08000000b80e0000000f054c8b3d6d0000004c8b356e0000004c8b2d6f0000"
    "004c8b2570000000488b2d71000000488b1d720000004c8b1d730000004c8b15740000004c8b0d75"
    "0000004c8b0576000000488b0577000000488b0d78000000488b1579000000488b357a000000488b"
    "3d7b000000ff257d0000000f1f440000000000000000000000000000000000000000000000000000"
    "00000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "00000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "00000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "00000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "0000000000000000000000000000000000000000000000000000000000000000"
)
ENGINE_STOP: Final = 0xD5

_FINAL = struct.Struct("<3Q")
_BOOT_FRAME: Final = len(BOOT) - _FRAME.size
_ENGINE_FRAME: Final = len(ENGINE) - _FRAME.size - _FINAL.size

#: bytes that boot takes
BOOT_SIZE: Final = len(BOOT)
#: bytes that one engine takes, a multiple of 64 so that no two threads' engines share a cache line
ENGINE_SIZE: Final = len(ENGINE) + -len(ENGINE) % 64


def frame_of(
    registers: Registers,
    mask: int,
    stop_signal: int,
    tgid: int,
    tid: int,
    call: int | None,
    extended: Callable[[], bytes],
) -> bytes:
    """All that a thread needs to go on by itself.

    registers   the application's, as they shall be
    mask        its blocked signals
    tgid, tid   its numbers *in its own PID namespace*

    What else other machines need, ``call`` and ``extended``, is not needed here.
    """
    whole = by_hand(registers)
    own = [getattr(whole, "eflags" if name == "flags" else name) for name in _FRAME_NAMES[:18]]
    busy = _ALL & ~(1 << (stop_signal - 1))
    return _FRAME.pack(*own, mask, busy, _ALL, tgid, tid, stop_signal)


def boot_image(frame: bytes) -> bytes:
    """Boot with a frame."""
    return BOOT[:_BOOT_FRAME] + frame


def boot_call(
    registers: Registers,
    boot: int,
    nr: int,
    args: tuple[int, ...],
    undo: int = 0,
    undo_args: tuple[int, int] | None = None,
) -> Registers:
    """Registers with which the thread makes one call by the boot code at ``boot``, and stops.

    undo        number of the call that takes it back if the tool dies, 0 for none
    undo_args   its arguments; None: (result of the call, its second argument). Only for calls of up to four arguments.
    """
    a = [value & _MASK for value in args] + [0] * (6 - len(args))
    if undo and undo_args is None:
        undo -= 1 << 63
    elif undo_args is not None:
        a[4:] = undo_args
    return dataclasses.replace(
        registers.moved(boot),
        rbx=nr,
        rbp=a[0],
        r12=a[1],
        r13=a[2],
        r14=a[3],
        r8=a[4],
        r9=a[5],
        r15=undo & _MASK,
    )


def boot_result(registers: Registers) -> int:
    """What the call returned, of the registers at boot's stop."""
    return registers.rbx - (1 << 64) if registers.rbx >> 63 else registers.rbx


def engine_image(frame: bytes, boot: int = 0, start: int = 0, size: int = 0) -> bytes:
    """The engine with a frame, padded to ENGINE_SIZE.

    boot, start, size   where boot lies, and the memory that it is to unmap if the tool dies; 0: it stays
    """
    final = _FINAL.pack(boot + BOOT_STOP if boot else 0, start, size)
    return (ENGINE[:_ENGINE_FRAME] + frame + final).ljust(ENGINE_SIZE, b"\0")


def engine_start(registers: Registers, engine: int, table: tuple[int, int], undo: tuple[int, int]) -> Registers:
    """Registers with which the thread walks a table (first entry, end) by the engine at ``engine``, and stops."""
    return registers.walking(engine, table, undo)


def engine_idle(registers: Registers, engine: int) -> Registers:
    """Registers with which the thread stands at the engine's stop, with nothing to be undone."""
    return dataclasses.replace(registers.moved(engine + ENGINE_STOP), r14=0, r15=0)


def engine_position(registers: Registers) -> int:
    """The address of the entry that failed, or the table's end, of the registers at the engine's stop."""
    return registers.r12


def telling(registers: Registers, at: int) -> Registers:
    """Registers with which a thread that stands at a stop of boot or engine, ``at``, makes a call that does nothing.
    From there on it would go home, undoing nothing."""
    return dataclasses.replace(registers.moved(at - _SYSCALL_LENGTH), rax=int(SYS.getpid), r14=0, r15=0)
