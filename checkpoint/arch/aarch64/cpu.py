"""CPU features that programs choose their code by, as /proc/cpuinfo names them, aarch64: what the kernel lists is what
it tells programs of (HWCAP).

Source: arch/arm64/kernel/cpuinfo.c, Documentation/arch/arm64/elf_hwcaps.rst.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

__all__ = ["chosen_by"]

#: a timer event, and that the kernel answers when ID registers are read: no instructions
_OF_THE_KERNEL: Final = frozenset({"cpuid", "evtstrm"})


def chosen_by(flags: Iterable[str]) -> frozenset[str]:
    """Those of the features of a CPU that a program may have found."""
    return frozenset(flags) - _OF_THE_KERNEL
