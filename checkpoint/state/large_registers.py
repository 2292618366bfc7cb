"""Registers that a process has to ask for before it may use them, since they make every signal frame large (AMX tiles).

Source: Linux Documentation/arch/x86/xstate.rst, arch/x86/kernel/fpu/xstate.c; arch/x86/include/uapi/asm/prctl.h (5.16).
"""

from __future__ import annotations

import enum
from typing import Final, Self

from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, register
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["LargeRegisters"]

#: machines without such registers do not have the call
_CALL: Final = SYS.__members__.get("arch_prctl")


class _Arch(enum.IntEnum):
    """ARCH_* of arch_prctl(2)."""

    GET_XCOMP_PERM = 0x1022
    REQ_XCOMP_PERM = 0x1023


class _Feature(enum.IntEnum):
    """Numbers of components of the extended state that need the permission."""

    AMX_TILES = 18


_ASKED_FOR: Final = sum(1 << feature for feature in _Feature)


@register("large registers")
@dataclass(frozen=True, slots=True, kw_only=True)
class LargeRegisters(State):
    """``granted``: components of the extended state that the process has asked for, and may use; bit n for number n."""

    granted: int

    def __post_init__(self) -> None:
        if self.granted & ~_ASKED_FOR:
            raise ValueError(f"permission for components {self.granted:#x}")

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        if _CALL is None:
            yield
            return cls(granted=0)
        mask = task.calls.room(8)
        known = task.calls.call(_CALL, _Arch.GET_XCOMP_PERM, mask, ignore=True, label="read the permitted registers")
        yield
        return cls(granted=mask.u64() & _ASKED_FOR if known.ok else 0)

    def rebuild(self, task: TaskBuilder) -> None:
        for feature in _Feature:
            if _CALL is not None and self.granted >> feature & 1:
                label = f"be permitted the registers {feature.name}, which the CPU may lack"
                task.calls.call(_CALL, _Arch.REQ_XCOMP_PERM, int(feature), label=label)
