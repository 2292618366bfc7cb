"""The records of an image that belong to no single room: what it is an image of, and the tree itself.

FILES is :class:`checkpoint.files.table.TreeFiles`, MAPPINGS one :class:`checkpoint.memory.layout.MemoryLayout` per
process, FILES_DELTA a :class:`FilesDelta`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from checkpoint.files.base import OpenFile
from checkpoint.files.table import TreeFiles
from checkpoint.image.frames import End
from checkpoint.memory.layout import MemoryLayout
from checkpoint.state.clocks import Clocks
from checkpoint.state.table import ProcessState
from checkpoint.traces import FrozenTree
from checkpoint.tree import Task
from tcpstate import codec
from tcpstate.record import ConnectionRecord

__all__ = ["FilesDelta", "Manifest", "ProcessRecord", "TreeRecord", "prepare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What the image is of. For people, and for the check before anything is built.

    program  version of tcpmig that made it
    host     name of the host, and ``boot_id`` of its boot
    kernel   its kernel's release; nothing is decided by it
    machine  as in uname(2)
    created  seconds since 1970, UTC, by the host's clock
    roots    PIDs of the trees' roots
    pids     PIDs of all processes
    tids     numbers of all threads, leaders included: they must be free where the image is restored
    """

    program: str
    host: str
    boot_id: str
    kernel: str
    machine: str
    created: int
    roots: tuple[int, ...]
    pids: tuple[int, ...]
    tids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.roots or not set(self.roots) <= set(self.pids) <= set(self.tids):
            raise ValueError("roots, processes and threads do not agree")
        if any(not 0 < number < 1 << 22 for number in self.tids):
            raise ValueError("a PID is out of range")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRecord:
    """One process of the tree.

    task         its place in the tree
    comm         its name, for people
    exit_signal  what its parent is sent when it ends
    stop_signal  the signal that holds it in a group stop (state T); 0: it runs
    state        everything of it that is not memory and not open files; None for a zombie
    """

    task: Task
    comm: str
    exit_signal: int
    stop_signal: int = 0
    state: ProcessState | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.exit_signal <= 64 or not 0 <= self.stop_signal <= 64:
            raise ValueError("a signal is out of range")
        if (self.state is None) != (self.task.wait_code is not None):
            raise ValueError("a living process has a state, and a zombie has none")


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeRecord:
    """The processes, parents before children, and the clocks that they saw at the stop."""

    processes: tuple[ProcessRecord, ...]
    clocks: Clocks

    def __post_init__(self) -> None:
        pids = [p.task.pid for p in self.processes]
        if not pids or len(set(pids)) != len(pids):
            raise ValueError("no process, or one twice")


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesDelta:
    """Entries of FILES that are told again: sockets, as they were frozen, and what else changed since."""

    files: dict[int, OpenFile] = field(default_factory=dict)


def prepare() -> None:
    """Work out beforehand how the records of an image are written and read: 12 ms that the stop would pay else."""
    codec.prepare(Manifest, TreeRecord, TreeFiles, MemoryLayout, FilesDelta, End, ConnectionRecord, FrozenTree)
