"""What a thread has asked of the CPU: less speculation, no time stamp counter; and what to do on broken memory.

Source: Linux Documentation/userspace-api/spec_ctrl.rst; kernel/sys.c; mm/memory-failure.c.
"""

from __future__ import annotations

from typing import Final, Self

from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, bounded, register, unsigned
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.prctl import MceKill, Pr, Speculation, SpeculationState
from tcpstate.slotted import dataclass

__all__ = ["MachineCheckPolicy", "SpeculationControls", "TimeStampCounter"]

#: PR_TSC_ENABLE and PR_TSC_SIGSEGV
_TSC_ENABLE: Final = 1
_TSC_SIGSEGV: Final = 2
_RESTRICTED: Final = SpeculationState.DISABLE | SpeculationState.FORCE_DISABLE | SpeculationState.DISABLE_NOEXEC


@register("speculation controls")
@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationControls(State):
    """PR_GET_SPECULATION_CTRL of each kind of speculation; 0 where the kernel or the CPU knows nothing of it."""

    store_bypass: int
    indirect_branch: int
    l1d_flush: int

    def __post_init__(self) -> None:
        for value in self._values().values():
            unsigned("speculation control", value, 8)

    def _values(self) -> dict[Speculation, int]:
        return {
            Speculation.STORE_BYPASS: self.store_bypass,
            Speculation.INDIRECT_BRANCH: self.indirect_branch,
            Speculation.L1D_FLUSH: self.l1d_flush,
        }

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        results = [task.calls.call(SYS.prctl, Pr.GET_SPECULATION_CTRL, which, ignore=True) for which in Speculation]
        yield
        store_bypass, indirect_branch, l1d_flush = (r.value if r.ok else 0 for r in results)
        return cls(store_bypass=store_bypass, indirect_branch=indirect_branch, l1d_flush=l1d_flush)

    def rebuild(self, task: TaskBuilder) -> None:
        for which, value in self._values().items():
            # Only what the thread itself may change, and has restricted; the rest is the host's policy.
            wanted = value & _RESTRICTED
            if which is Speculation.L1D_FLUSH:
                wanted = value & SpeculationState.ENABLE
            if value & SpeculationState.PRCTL and wanted:
                result = task.calls.call(SYS.prctl, Pr.SET_SPECULATION_CTRL, which, wanted, ignore=True)
                task.warn_unless(result, f"had restricted its speculation ({which.name}) and cannot do so here")


@register("time stamp counter")
@dataclass(frozen=True, slots=True, kw_only=True)
class TimeStampCounter(State):
    """Whether the thread may read the CPU's time stamp counter (PR_GET_TSC); always, where it cannot be forbidden."""

    readable: bool

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        room = task.calls.room(8)
        known = task.calls.call(SYS.prctl, Pr.GET_TSC, room, ignore=True)
        yield
        return cls(readable=not known.ok or room.u32() == _TSC_ENABLE)

    def rebuild(self, task: TaskBuilder) -> None:
        if not self.readable:
            label = "forbid the time stamp counter"
            task.calls.call(SYS.prctl, Pr.SET_TSC, _TSC_SIGSEGV, label=label)


@register("machine check policy")
@dataclass(frozen=True, slots=True, kw_only=True)
class MachineCheckPolicy(State):
    """When the thread is killed for memory that broke: PR_MCE_KILL_LATE, _EARLY or _DEFAULT."""

    policy: int

    def __post_init__(self) -> None:
        bounded("machine check policy", self.policy, MceKill.LATE, MceKill.DEFAULT)

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        policy = task.calls.call(SYS.prctl, Pr.MCE_KILL_GET, ignore=True)
        yield
        return cls(policy=policy.value if policy.ok else int(MceKill.DEFAULT))

    def rebuild(self, task: TaskBuilder) -> None:
        if self.policy != MceKill.DEFAULT:
            result = task.calls.call(SYS.prctl, Pr.MCE_KILL, MceKill.SET, self.policy, ignore=True)
            task.warn_unless(result, f"cannot be given its machine check policy {self.policy}")
