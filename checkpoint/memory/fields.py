"""What the kernel knows of a memory as a whole, besides its mappings.

Source: include/uapi/linux/prctl.h (struct prctl_mm_map), fs/proc/array.c (do_task_stat).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoint.arch import USER_END
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.procfs import Stat

__all__ = ["MemoryFields"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFields:
    """What the kernel knows of a memory as a whole: addresses, in the order of struct prctl_mm_map."""

    start_code: int
    end_code: int
    start_data: int
    end_data: int
    start_brk: int
    brk: int
    start_stack: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not 0 <= getattr(self, name) <= USER_END:
                raise ValueError(f"{name} cannot be {getattr(self, name):#x}")

    @classmethod
    def of(cls, stat: Stat, brk: int) -> MemoryFields:
        """From /proc/PID/stat and the answer of brk(2)."""
        return cls(
            start_code=stat.start_code,
            end_code=stat.end_code,
            start_data=stat.start_data,
            end_data=stat.end_data,
            start_brk=stat.start_brk,
            brk=brk,
            start_stack=stat.start_stack,
            arg_start=stat.arg_start,
            arg_end=stat.arg_end,
            env_start=stat.env_start,
            env_end=stat.env_end,
        )

    def words(self) -> tuple[int, ...]:
        """The addresses in their order."""
        return tuple(getattr(self, name) for name in self.__slots__)
