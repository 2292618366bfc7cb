"""The machine code that makes system calls inside a stopped process, aarch64.

Two pieces.  **Boot** lies behind the parts of the vdso that are used, read-only, and makes one call at a time: with it
memory for the second piece is mapped.  **The engine** lies in that memory, one copy for each thread, and walks a table.

Both keep one rule: *if the tracer is killed, at whatever instruction the thread stands, the thread goes on as if it had
never been stopped*.

- One change of registers switches a thread from its own code into ours. So our code blocks the signals itself, and it
  does not touch the stack.
- It stops by sending itself the *stop signal*, one that the process ignores (SIGURG). A living tracer sees that as a
  signal-delivery stop. Without a tracer the kernel drops the signal, and the code runs on: it makes the undo calls of
  its table and goes home.
- There is no way to jump without a register on this machine, so it goes home by rt_sigreturn, with a signal frame that
  was prepared for it behind the code: registers, mask, FP. Its alternate stack is none that the kernel accepts, so the
  thread keeps its own. What SVE has beyond FP is lost in this case, and only in this case.

``BOOT`` and ``ENGINE`` are ``BOOT_SOURCE`` and ``ENGINE_SOURCE`` assembled; a unit test assembles and compares.

Source: arch/arm64/kernel/signal.c (sys_rt_sigreturn), arch/arm64/include/uapi/asm/sigcontext.h.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from checkpoint.arch.aarch64.extended import fp_of
from checkpoint.arch.aarch64.registers import SVC, Registers, by_hand
from tcpstate.kernel.machine.aarch64 import SYS, WALK_SOURCE

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
_FP_SIZE: Final = 528

#: busy mask, tgid, tid, stop signal; then struct rt_sigframe as far as it is read (its siginfo_t and flags are not)
_HEAD = struct.Struct("<4Q")
_BEFORE: Final = 128 + 16
_CONTEXT = struct.Struct("<QiiQQ120x8xQ31QQQQ8x")  # stack_t, sigmask, (padding,) fault_address, x0.., sp, pc, pstate
_FP_HEAD = struct.Struct("<IIII512sQQ")  # magic, size, fpsr, fpcr, vregs; the end record
_FP_MAGIC: Final = 0x46508001
#: ss_flags that no stack_t may have: the kernel leaves the thread's own alone
_NO_STACK: Final = 0x5A5A
_FRAME_SIZE: Final = _HEAD.size + _BEFORE + _CONTEXT.size + _FP_HEAD.size

_SIGMASK = f"""\
        mov     x0, 2                   // rt_sigprocmask(SIG_SETMASK, busy, 0, 8)
        adr     x1, f_busy
        mov     x2, 0
        mov     x3, 8
        mov     x8, {SYS.rt_sigprocmask:d}
        svc     0
"""
_STOP = f"""\
        ldr     x0, f_tgid              // tgkill(own process, own thread, stop signal)
        ldr     x1, f_tid
        ldr     x2, f_signal
        mov     x8, {SYS.tgkill:d}
        svc     0
"""
_HOME = f"""\
        adr     x0, f_sigframe
        mov     sp, x0
        mov     x8, {SYS.rt_sigreturn:d}
        svc     0
"""
_FRAME_SOURCE = f"""\
        .balign 16
frame:
f_busy: .quad   0
f_tgid: .quad   0
f_tid:  .quad   0
f_signal: .quad 0
f_sigframe: .zero {_FRAME_SIZE - _HEAD.size}
"""

#: In: x19 number, x20 to x25 arguments; x26: 0, or number of the undo call with the arguments x24, x25, or, if
#: negative, (result, x21). Out, at boot_stop: x19 result.
BOOT_SOURCE: Final = f"""\
        .text
boot:
{_SIGMASK}        mov     x8, x19
        mov     x0, x20
        mov     x1, x21
        mov     x2, x22
        mov     x3, x23
        mov     x4, x24
        mov     x5, x25
        svc     0
        mov     x19, x0
{_STOP}boot_stop:
        hint    36                      // bti j: where the engine comes in, on machines that look at it
        cbz     x26, 2f                 // here only without a tracer, or from the engine
        mov     x0, x24
        mov     x1, x25
        tbz     x26, 63, 1f
        mov     x0, x19
        mov     x1, x21
1:      mov     w8, w26
        svc     0
2:
{_HOME}{_FRAME_SOURCE}"""

#: In: x20, x21 table and its end; x22, x23 undo table and its end. Out, at engine_stop: x20 the entry that failed, or
#: the end. ``final``: where boot_stop is (0: leave the memory), address and length to be unmapped by it.
ENGINE_SOURCE: Final = f"""\
        .text
engine:
{_SIGMASK}        adr     x24, done
{WALK_SOURCE}        br      x24
done:
{_STOP}engine_stop:
        mov     x20, x22                // here only without a tracer
        mov     x21, x23
        adr     x24, undone
        b       walk
undone: ldr     x9, final
        cbz     x9, 1f
        ldr     x24, final + 8
        ldr     x25, final + 16
        mov     x26, {SYS.munmap:d}                // munmap: boot, outside that memory, makes it and goes home
        br      x9
1:
{_HOME}{_FRAME_SOURCE}final:  .quad   0, 0, 0
"""

BOOT: Final = bytes.fromhex(
    "400080d261040010020080d2030180d2e81080d2010000d4e80313aae00314aae10315aae20316aa"
    "e30317aae40318aae50319aa010000d4f30300aae00200580103005822030058681080d2010000d4"
    "9f2403d51a0100b4e00318aae10319aa7a00f8b6e00313aae10315aae8031a2a010000d4e0010010"
    "1f000091681180d2010000d41f2003d51f2003d51f2003d5"
) + bytes(_FRAME_SIZE)
BOOT_STOP: Final = 0x50
ENGINE: Final = bytes.fromhex(
    "400080d2e1060010020080d2030180d2e81080d2010000d4f80300109f0215eb82030054880240a9"
    "810a41a9831242a9851a40f9892640f949004036000040f949004836210040f949005036420040f9"
    "49005836630040f949006036840040f949006836a50040f9010000d48a2240f9801e00f94a0000b4"
    "400100f91ffc3fb1430000546900003694420191e4ffff1700031fd6a0020058c1020058e2020058"
    "681080d2010000d4f40316aaf50317aa58000010daffff17c9250058a90000b4d8250058f9250058"
    "fa1a80d220011fd6800100101f000091681180d2010000d4"
) + bytes(_FRAME_SIZE + 24)
ENGINE_STOP: Final = 0xA8

_FINAL = struct.Struct("<3Q")
_BOOT_FRAME: Final = len(BOOT) - _FRAME_SIZE
_ENGINE_FRAME: Final = len(ENGINE) - _FRAME_SIZE - _FINAL.size

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
    call        in which system call it was stopped, if that is known
    extended    asked for its other registers
    """
    registers = by_hand(registers, call)
    fp = fp_of(extended())
    busy = _ALL & ~(1 << (stop_signal - 1))
    fpsr, fpcr = struct.unpack_from("<II", fp, 512)
    return b"".join(
        (
            _HEAD.pack(busy, tgid, tid, stop_signal),
            bytes(_BEFORE),
            _CONTEXT.pack(0, _NO_STACK, 0, 0, mask, 0, *registers.x, registers.sp, registers.pc, registers.pstate),
            _FP_HEAD.pack(_FP_MAGIC, _FP_SIZE, fpsr, fpcr, fp[:512], 0, 0),
        )
    )


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
    values = {19: nr, **{20 + number: value for number, value in enumerate(a)}, 26: undo & _MASK}
    return registers.moved(boot).with_x(values)


def boot_result(registers: Registers) -> int:
    """What the call returned, of the registers at boot's stop."""
    result = registers.x[19]
    return result - (1 << 64) if result >> 63 else result


def engine_image(frame: bytes, boot: int = 0, start: int = 0, size: int = 0) -> bytes:
    """The engine with a frame, padded to ENGINE_SIZE.

    boot, start, size   where boot lies, and the memory that it is to unmap if the tool dies; 0: it stays
    """
    final = _FINAL.pack(boot + BOOT_STOP if boot else 0, start, size)
    return (ENGINE[:_ENGINE_FRAME] + frame + final).ljust(ENGINE_SIZE, b"\0")


def engine_start(registers: Registers, engine: int, table: tuple[int, int], undo: tuple[int, int]) -> Registers:
    """Registers with which the thread walks a table (first entry, end) by the engine at ``engine``, and stops."""
    return registers.moved(engine).with_x({20: table[0], 21: table[1], 22: undo[0], 23: undo[1]})


def engine_idle(registers: Registers, engine: int) -> Registers:
    """Registers with which the thread stands at the engine's stop, with nothing to be undone."""
    return registers.moved(engine + ENGINE_STOP).with_x({22: 0, 23: 0})


def engine_position(registers: Registers) -> int:
    """The address of the entry that failed, or the table's end, of the registers at the engine's stop."""
    return registers.x[20]


def telling(registers: Registers, at: int) -> Registers:
    """Registers with which a thread that stands at a stop of boot or engine, ``at``, makes a call that does nothing, so
    that the kernel remembers the first argument of the application's. From there on it would go home, undoing nothing.
    """
    return registers.moved(at - len(SVC)).with_x({8: int(SYS.getpid), 22: 0, 23: 0, 26: 0})
