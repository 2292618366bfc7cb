"""What depends on the machine's architecture in a process: one package per machine, one interface.

Registers and interrupted system calls:

``Registers``          frozen; ``pack``, ``in_set``, ``unpack``, ``ip``, ``sp``, ``call``, ``result``, ``moved``,
                       ``not_stepping``, ``untold``; ``thread_pointer`` where there are WAITS
``AUDIT_ARCH``         this machine's number for seccomp filters
``get_extended``       the other registers of a stopped thread: FP and vector registers; ``set_extended``
``fleeting``           the same, if a call made in the thread would lose some of them
``require_native``     refuses tasks of another mode
``hides_note``         in which call a thread is of which the kernel has a note that nobody can see
``in_its_call``        a stopped thread's registers with what the stop has done to its call
``going_on``           what a thread that was stopped here goes on with
``for_restore``        what a rebuilt thread gets
``restarted_call``     which call a thread is in that was stopped in it before; from ``CODE_BEFORE`` bytes of code
``known_again``        the same, from what the kernel has noted
``interrupted_in``     whether a signal handler will return into given code
``sleep_of``           the ``Sleep`` for a relative time that a thread is in, with the ``Note`` that the kernel has
``beginning``          registers that begin a call at ``CALL_AT`` in an engine
``entering``           which call a thread is about to make; ``begun``: what one returned that was interrupted at once
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
``engine_position``, ``frame_of``; and to tell the kernel what it has forgotten (``checkpoint.telling``): ``telling``,
``told``, ``behind_call``.

The functions of another kernel's vdso (``checkpoint.memory.vdso``): ``vdso_jump``, ``vdso_call``, ``vdso_stays``.

``chosen_by``: the CPU features that programs choose their code by.

The start of rebuilt processes (``checkpoint.spawn``): ``SPAWN``, ``stub_elf``, ``USER_END``; the init of a PID
namespace that is made for them: ``init_image``.

Nothing else in this package asks which machine this is.
"""

from __future__ import annotations

import mmap
import os

from checkpoint.arch.sleeps import POLLFD_SIZE, Note, Sleep
from tcpstate.errors import KernelFeatureMissing

_MACHINE = os.uname().machine
#: what addresses and sizes of this package are multiples of
_PAGE = 4096

if _MACHINE == "x86_64":
    from checkpoint.arch.x86_64.cpu import chosen_by
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
        telling,
    )
    from checkpoint.arch.x86_64.init import init_image
    from checkpoint.arch.x86_64.registers import (
        AUDIT_ARCH,
        CODE_BEFORE,
        Registers,
        behind_call,
        by_hand,
        for_restore,
        going_on,
        hides_note,
        in_its_call,
        interrupted_in,
        require_native,
        restarted_call,
        told,
    )
    from checkpoint.arch.x86_64.sleep import (
        BLOCK,
        CALL_AT,
        asleep,
        beginning,
        begun,
        entering,
        known_again,
        sleep_of,
    )
    from checkpoint.arch.x86_64.stub import SPAWN, USER_END, stub_elf
    from checkpoint.arch.x86_64.vdso import vdso_call, vdso_jump, vdso_stays
    from checkpoint.arch.x86_64.waits import KERNEL_STACK_POINTER, WAITS, may_change_time, wait_of
    from checkpoint.arch.x86_64.xstate import (
        Component,
        Frame,
        convert_frame,
        convert_xstate,
        fleeting,
        get_extended,
        same_layout,
        set_extended,
        signal_frames,
        xstate_layout,
    )
elif _MACHINE == "aarch64":
    if mmap.PAGESIZE != _PAGE:
        raise KernelFeatureMissing(
            f"pages of {mmap.PAGESIZE} bytes",
            object=_MACHINE,
            fix=f"Boot a kernel with pages of {_PAGE} bytes (CONFIG_ARM64_4K_PAGES).",
        )
    from checkpoint.arch.aarch64.cpu import chosen_by
    from checkpoint.arch.aarch64.engine import (  # type: ignore[assignment]
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
        telling,
    )
    from checkpoint.arch.aarch64.extended import (  # type: ignore[assignment]
        Component,
        Frame,
        convert_frame,
        convert_xstate,
        fleeting,
        get_extended,
        same_layout,
        set_extended,
        signal_frames,
        xstate_layout,
    )
    from checkpoint.arch.aarch64.init import init_image
    from checkpoint.arch.aarch64.registers import (  # type: ignore[assignment]
        AUDIT_ARCH,
        CODE_BEFORE,
        Registers,
        behind_call,
        by_hand,
        for_restore,
        going_on,
        hides_note,
        in_its_call,
        interrupted_in,
        require_native,
        restarted_call,
        told,
    )
    from checkpoint.arch.aarch64.sleep import (  # type: ignore[assignment]
        BLOCK,
        CALL_AT,
        asleep,
        beginning,
        begun,
        entering,
        known_again,
        sleep_of,
    )
    from checkpoint.arch.aarch64.stub import SPAWN, USER_END, stub_elf
    from checkpoint.arch.aarch64.vdso import vdso_call, vdso_jump, vdso_stays
    from checkpoint.arch.aarch64.waits import (  # type: ignore[assignment]
        KERNEL_STACK_POINTER,
        WAITS,
        may_change_time,
        wait_of,
    )
else:
    raise KernelFeatureMissing(
        f"there is no description of the machine {_MACHINE}",
        object=_MACHINE,
        fix="Run tcpmig on x86-64 or aarch64; other machines need a package in checkpoint/arch/.",
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
    "Component",
    "Frame",
    "Note",
    "Registers",
    "Sleep",
    "asleep",
    "beginning",
    "begun",
    "behind_call",
    "boot_call",
    "boot_image",
    "boot_result",
    "by_hand",
    "chosen_by",
    "convert_frame",
    "convert_xstate",
    "engine_idle",
    "engine_image",
    "engine_position",
    "engine_start",
    "entering",
    "fleeting",
    "for_restore",
    "frame_of",
    "get_extended",
    "going_on",
    "hides_note",
    "in_its_call",
    "init_image",
    "interrupted_in",
    "known_again",
    "may_change_time",
    "require_native",
    "restarted_call",
    "same_layout",
    "set_extended",
    "signal_frames",
    "sleep_of",
    "stub_elf",
    "telling",
    "told",
    "vdso_call",
    "vdso_jump",
    "vdso_stays",
    "wait_of",
    "xstate_layout",
]
