"""What depends on the machine's architecture in a process: one package per machine, one interface.

Registers and interrupted system calls:

``Registers``          frozen; ``pack``, ``unpack``, ``ip``, ``sp``, ``thread_pointer``, ``call``, ``result``,
                       ``moved``, ``not_stepping``
``AUDIT_ARCH``         this machine's number for seccomp filters
``XSTATE_SET``         the register set (ptrace NT_*) of FP and vector registers
``require_native``     refuses tasks of another mode
``going_on``           what a thread that was stopped here goes on with
``for_restore``        what a rebuilt thread gets
``restarted_call``     which call a thread is in that was stopped in it before; from ``CODE_BEFORE`` bytes of code
``known_again``        the same, from what the kernel has noted
``interrupted_in``     whether a signal handler will return into given code
``sleep_of``           the ``Sleep`` for a relative time that a thread is in, with the ``Note`` that the kernel has
``beginning``          registers that begin a call at ``CALL_AT`` in an engine
``asleep``             what a thread goes on with that has begun it again (``BLOCK``: the kernel has a note)
``wait_of``            the ``Wait`` for a time, one of ``WAITS``, of which the kernel has none
``may_change_time``    whether such a program does not look again at the register that tells the time
``KERNEL_STACK_POINTER``  which member of struct task_struct it is
``signal_frames``      the ``Frame`` of each signal handler that runs, from a stack; ``convert_frame``: for this CPU
``same_layout``        whether such frames of another CPU are right on this one
``xstate_layout``      where this CPU has which ``Component`` of FP and vector registers
``convert_xstate``     such an area of another CPU, as this one takes it

The fail-safe code (``checkpoint.inject`` runs it): ``BOOT_SIZE``, ``BOOT_STOP``, ``ENGINE_SIZE``, ``ENGINE_STOP``,
``boot_image``, ``boot_call``, ``boot_result``, ``engine_image``, ``engine_start``, ``engine_idle``,
``engine_position``, ``frame_of``.

The functions of another kernel's vdso (``checkpoint.memory.vdso``): ``vdso_jump``, ``vdso_call``, ``vdso_stays``.

The start of rebuilt processes (``checkpoint.spawn``): ``SPAWN``, ``stub_elf``, ``USER_END``; the init of a PID
namespace that is made for them: ``init_image``.

Nothing else in this package asks which machine this is.
"""

from __future__ import annotations

import os

from tcpstate.errors import KernelFeatureMissing

_MACHINE = os.uname().machine

if _MACHINE == "x86_64":
    from checkpoint.arch.x86_64.engine import (
        BOOT_SIZE,
        BOOT_STOP,
        ENGINE_SIZE,
        ENGINE_STOP,
        boot_call,
        boot_image,
        boot_result,
        engine_idle,
        engine_image,
        engine_position,
        engine_start,
        frame_of,
    )
    from checkpoint.arch.x86_64.init import init_image
    from checkpoint.arch.x86_64.registers import (
        AUDIT_ARCH,
        CODE_BEFORE,
        XSTATE_SET,
        Registers,
        by_hand,
        for_restore,
        going_on,
        interrupted_in,
        require_native,
        restarted_call,
    )
    from checkpoint.arch.x86_64.sleep import (
        BLOCK,
        CALL_AT,
        POLLFD_SIZE,
        Note,
        Sleep,
        asleep,
        beginning,
        known_again,
        sleep_of,
    )
    from checkpoint.arch.x86_64.stub import SPAWN, USER_END, stub_elf
    from checkpoint.arch.x86_64.vdso import vdso_call, vdso_jump, vdso_stays
    from checkpoint.arch.x86_64.waits import KERNEL_STACK_POINTER, WAITS, Wait, may_change_time, wait_of
    from checkpoint.arch.x86_64.xstate import (
        Component,
        Frame,
        convert_frame,
        convert_xstate,
        same_layout,
        signal_frames,
        xstate_layout,
    )
else:
    raise KernelFeatureMissing(
        f"there is no description of the machine {_MACHINE}",
        object=_MACHINE,
        fix="Run tcpmig on x86-64; other machines need a package in checkpoint/arch/.",
    )

__all__ = [
    "AUDIT_ARCH",
    "BLOCK",
    "BOOT_SIZE",
    "BOOT_STOP",
    "CALL_AT",
    "CODE_BEFORE",
    "ENGINE_SIZE",
    "ENGINE_STOP",
    "KERNEL_STACK_POINTER",
    "POLLFD_SIZE",
    "SPAWN",
    "USER_END",
    "WAITS",
    "XSTATE_SET",
    "Component",
    "Frame",
    "Note",
    "Registers",
    "Sleep",
    "Wait",
    "asleep",
    "beginning",
    "boot_call",
    "boot_image",
    "boot_result",
    "by_hand",
    "convert_frame",
    "convert_xstate",
    "engine_idle",
    "engine_image",
    "engine_position",
    "engine_start",
    "for_restore",
    "frame_of",
    "going_on",
    "init_image",
    "interrupted_in",
    "known_again",
    "may_change_time",
    "require_native",
    "restarted_call",
    "same_layout",
    "signal_frames",
    "sleep_of",
    "stub_elf",
    "vdso_call",
    "vdso_jump",
    "vdso_stays",
    "wait_of",
    "xstate_layout",
]
