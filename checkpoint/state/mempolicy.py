"""On which NUMA nodes a thread's new memory is placed (set_mempolicy).

Source: Linux mm/mempolicy.c.
"""

from __future__ import annotations

from typing import Final, Self

from checkpoint.kernel.sched import MemoryPolicy
from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, register, unsigned
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["NumaPolicy"]

#: bits of the node masks passed to the kernel; it answers EINVAL to fewer than it has nodes (1024 at most)
_NODES: Final = 1024


@register("numa policy")
@dataclass(frozen=True, slots=True, kw_only=True)
class NumaPolicy(State):
    """Mode with its flags, and the nodes; mode 0: none of its own."""

    mode: int
    nodes: tuple[int, ...]

    def __post_init__(self) -> None:
        unsigned("NUMA policy", self.mode, 31)
        if any(not 0 <= node < _NODES for node in self.nodes):
            raise ValueError("there is no such NUMA node number")

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        mode, mask = task.calls.room(8), task.calls.room(_NODES // 8)
        # ENOSYS from kernels without NUMA. The kernel takes one bit fewer than it is told.
        known = task.calls.call(SYS.get_mempolicy, mode, mask, _NODES + 1, 0, 0, ignore=True)
        yield
        if not known.ok or mode.u32() == MemoryPolicy.DEFAULT:
            return cls(mode=MemoryPolicy.DEFAULT, nodes=())
        bits = int.from_bytes(mask.bytes(), "little")
        return cls(mode=mode.u32(), nodes=tuple(node for node in range(bits.bit_length()) if bits >> node & 1))

    def rebuild(self, task: TaskBuilder) -> None:
        if self.mode == MemoryPolicy.DEFAULT:
            return
        mask = task.calls.put(sum(1 << node for node in self.nodes).to_bytes(_NODES // 8, "little"))
        result = task.calls.call(SYS.set_mempolicy, self.mode, mask, _NODES + 1, ignore=True)
        nodes = ",".join(map(str, self.nodes))
        task.warn_unless(result, f"had a NUMA policy for the nodes {nodes} and cannot have it here")
