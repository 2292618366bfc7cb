"""Resource limits of a process.

Read from inside: from outside the limits of a process of another user need CAP_SYS_RESOURCE.  Rebuilt before the
credentials, since raising a hard limit needs the same capability, and after memory, files and threads, which a low
limit would refuse.

Source: Linux kernel/sys.c, prlimit64; include/uapi/asm-generic/resource.h.
"""

from __future__ import annotations

import resource
import struct
from typing import Final, Self

from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, register, unsigned
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["Limit", "ResourceLimits"]

#: RLIM_NLIMITS: the kernel's limits are numbered below this
RLIMIT_COUNT: Final = 16
_RLIMIT64 = struct.Struct("<QQ")
_NAMES: Final = {getattr(resource, name): name for name in dir(resource) if name.startswith("RLIMIT_")}


@dataclass(frozen=True, slots=True)
class Limit:
    """Soft and hard limit; 2**64 - 1 is "unlimited"."""

    soft: int
    hard: int

    def __post_init__(self) -> None:
        unsigned("soft limit", self.soft)
        unsigned("hard limit", self.hard)
        if self.soft > self.hard:
            raise ValueError(f"soft limit {self.soft} is above the hard limit {self.hard}")


@register("resource limits")
@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceLimits(State):
    """The limits by their numbers (RLIMIT_*)."""

    limits: tuple[Limit, ...]

    def __post_init__(self) -> None:
        if len(self.limits) > RLIMIT_COUNT:
            raise ValueError(f"{len(self.limits)} resource limits; there are {RLIMIT_COUNT}")

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        room = task.calls.room(_RLIMIT64.size * RLIMIT_COUNT)
        for number in range(RLIMIT_COUNT):
            task.calls.call(
                SYS.prlimit64, 0, number, 0, room + _RLIMIT64.size * number, label=f"read resource limit {number}"
            )
        yield
        return cls(limits=tuple(Limit(soft, hard) for soft, hard in _RLIMIT64.iter_unpack(room.bytes())))

    def rebuild(self, task: TaskBuilder) -> None:
        for number, limit in enumerate(self.limits):
            data = task.calls.put(_RLIMIT64.pack(limit.soft, limit.hard))
            what = f"set the resource limit {_NAMES.get(number, number)} to {limit.soft}, {limit.hard}"
            task.calls.call(SYS.prlimit64, 0, number, data, 0, label=what)
