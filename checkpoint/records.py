"""The records of an image that belong to no single room: what it is an image of, and the tree itself.

FILES is :class:`checkpoint.files.table.TreeFiles`, MAPPINGS one :class:`checkpoint.memory.layout.MemoryLayout` per
process, FILES_DELTA a :class:`FilesDelta`, ENDED an :class:`Ended`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import field
from typing import Final, Self

from checkpoint.arch import USER_END
from checkpoint.files.base import OpenFile
from checkpoint.files.regular import RegularFile
from checkpoint.files.retold import Retold, join, split
from checkpoint.files.table import TreeFiles
from checkpoint.files.treefiles import AheadFiles
from checkpoint.image.frames import End
from checkpoint.ipc.base import SystemV
from checkpoint.kernel import callwatch, restart_block, threaditer
from checkpoint.memory.delta import same_process
from checkpoint.memory.layout import MemoryLayout
from checkpoint.namespaces.memoryfs import Folder
from checkpoint.namespaces.spaces import NO_SPACES, Spaces
from checkpoint.namespaces.users import Users
from checkpoint.state import birth
from checkpoint.state.alike import AlikeThreads, whole
from checkpoint.state.base import State
from checkpoint.state.clocks import Clocks
from checkpoint.state.credentials import Credentials
from checkpoint.state.table import ProcessState
from checkpoint.traces import FrozenTree
from checkpoint.tree import Task
from tcpstate import codec
from tcpstate.connid import ConnId
from tcpstate.record import ConnectionRecord
from tcpstate.slotted import dataclass

__all__ = [
    "ENDED_MAX",
    "Ended",
    "FilesDelta",
    "LiveProcess",
    "LiveTree",
    "Manifest",
    "MapsDelta",
    "ProcessRecord",
    "StatesRecord",
    "TreeRecord",
    "fits",
    "prepare",
    "same_file",
]

#: connections of one :class:`Ended`, at most: as many as a host closes in the moment before a stop, and more
ENDED_MAX: Final = 65536


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
    """

    task: Task
    comm: str
    exit_signal: int
    stop_signal: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.exit_signal <= 64 or not 0 <= self.stop_signal <= 64:
            raise ValueError("a signal is out of range")

    @property
    def lives(self) -> bool:
        """Whether it has a state, memory and files: a zombie has none."""
        return self.task.wait_code is None


@dataclass(frozen=True, slots=True, kw_only=True)
class StatesRecord:
    """Everything of the processes that is not memory and not open files, and the clocks that they saw then.

    alike  by PID, threads that are not among those of the states: each is like one of them (checkpoint.state.alike)
    apart  they are those of some processes, and others come apart; all of their memory has come before them
    """

    states: tuple[ProcessState, ...]
    clocks: Clocks
    alike: dict[int, tuple[AlikeThreads, ...]] = field(default_factory=dict)
    apart: bool = False

    def __post_init__(self) -> None:
        pids = {state.pid for state in self.states}
        if len(pids) != len(self.states):
            raise ValueError("a process has two states")
        if not self.alike.keys() <= pids:
            raise ValueError("threads of a process that has no state")

    def spelled_out(self) -> StatesRecord:
        """The same with all threads in the states, for who does not know ``alike``."""
        return StatesRecord(states=self.whole(), clocks=self.clocks, apart=self.apart)

    def whole(self) -> tuple[ProcessState, ...]:
        """The states with all threads. ValueError if those of ``alike`` cannot be."""
        return tuple(
            dataclasses.replace(state, threads=whole(state.threads, self.alike[state.pid]))
            if state.pid in self.alike
            else state
            for state in self.states
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeRecord:
    """The processes, parents before children.

    ipc     System V semaphores and message queues that they use
    spaces  namespaces that are the tree's own
    folders  what is in file systems in memory that are the tree's own
    """

    processes: tuple[ProcessRecord, ...]
    ipc: tuple[SystemV, ...] = ()
    spaces: Spaces = NO_SPACES
    folders: tuple[Folder, ...] = ()

    def __post_init__(self) -> None:
        pids = [p.task.pid for p in self.processes]
        if not pids or len(set(pids)) != len(pids):
            raise ValueError("no process, or one twice")
        if len({(type(one), one.number) for one in self.ipc}) != len(self.ipc):
            raise ValueError("a semaphore set or message queue twice")
        mounts = self.spaces.mounts
        if not {folder.at for folder in self.folders} <= {*([] if mounts is None else mounts.memory)}:
            raise ValueError("files of a file system in memory that is not mounted")

    @property
    def living(self) -> tuple[ProcessRecord, ...]:
        """Without the zombies."""
        return tuple(process for process in self.processes if process.lives)

    def states(self, told: StatesRecord) -> dict[int, ProcessState]:
        """The states of the living, by PID; of some of them, if they are told apart. ValueError if they are not the
        states of these processes."""
        states = told.whole()
        found = {state.pid: state for state in states}
        living = {process.task.pid for process in self.living}
        if not found.keys() <= living or (found.keys() != living and not told.apart):
            raise ValueError("a living process has a state, and nobody else has one")
        if self.spaces.users is not None:
            _check_ids(states, self.spaces.users)
        return found

    def move_in(self, pid: int, stack: ExitStack) -> None:
        """The new tree's root is in its namespaces: put into them what the original's had, and be there, as far as
        things are made in them, until the stack is unwound. NamespaceNotMade, OSError."""
        self.spaces.join(pid, stack)
        mounts = self.spaces.mounts
        if mounts is not None:
            for folder in self.folders:
                folder.write(f"/proc/{pid}/root", self.spaces.owner, mounts.points)


def _check_ids(states: Iterable[ProcessState], users: Users) -> None:
    for thread in itertools.chain.from_iterable(state.threads for state in states):
        one = thread.get(Credentials)
        ids, groups = one.users, one.group_ids
        every = (ids.real, ids.effective, ids.saved, ids.fs), (groups.real, groups.effective, groups.saved)
        if lacking := users.lacks(every[0], (*every[1], groups.fs), one.groups):
            raise ValueError(f"thread {thread.tid}: {lacking}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesDelta:
    """Entries of FILES that are told again: sockets, as they were frozen, and what else changed since.

    files   whole
    retold  connections that were told ahead, by what is otherwise now
    """

    files: dict[int, OpenFile] = field(default_factory=dict)
    retold: Retold | None = None

    @classmethod
    def of(cls, files: Mapping[int, OpenFile], told: Sequence[OpenFile]) -> Self:
        """Of these; ``told``: what was told ahead, if the reader knows :class:`~checkpoint.files.retold.Retold`."""
        whole, retold = split(files, told)
        return cls(files=whole, retold=retold)

    def whole(self, told: AheadFiles | None) -> dict[int, OpenFile]:
        """All of them; ``told``: what was told ahead. BadFileRecord."""
        return self.files | join(self.retold, told)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Connections on the moved addresses that nobody has open any more, and whose peers have yet to acknowledge the FIN
    (LAST_ACK, CLOSING, FIN_WAIT1): what comes for them needs no answer, least of all a reset."""

    connections: tuple[ConnId, ...]

    def __post_init__(self) -> None:
        if len(self.connections) > ENDED_MAX:
            raise ValueError(f"more than {ENDED_MAX} connections have just ended")


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveProcess:
    """A process that runs, as a round of pre-copy found it.

    task         its place in the tree
    exit_signal  what its parent is sent when it ends
    layout       its memory, without what comes only at the end; None for a zombie
    stale        (start, end) of memory that was told before and was made anew since
    threads      numbers of its threads but the first, in its PID namespace, if all of them share its directories
    first        what it must be before it has them (checkpoint.state.birth)
    """

    task: Task
    exit_signal: int
    layout: MemoryLayout | None = None
    stale: tuple[tuple[int, int], ...] = ()
    threads: tuple[int, ...] = ()
    first: tuple[State, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.exit_signal <= 64:
            raise ValueError("a signal is out of range")
        if (self.layout is None) != (self.task.wait_code is not None):
            raise ValueError("a living process has memory, and a zombie has none")
        if self.layout is not None and self.layout.pid != self.task.pid:
            raise ValueError("the memory is another process's")
        if self.layout is None and self.threads:
            raise ValueError("a zombie has no threads")
        birth.check(self.task.pid, self.first, self.threads)
        _ascending(self.stale)


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveTree:
    """The processes, running. A later one replaces it; its processes' memory stays where it is the same.

    number     of the round
    processes  parents before children
    files      those that are mapped, and nothing else
    clocks     what the processes see, ``at`` the time of the rebuilding host's CLOCK_MONOTONIC, nanoseconds (as far as
               the source could know; 0: it could not)
    spaces     namespaces that are the tree's own
    """

    number: int
    processes: tuple[LiveProcess, ...]
    files: TreeFiles
    clocks: Clocks
    at: int = 0
    spaces: Spaces = NO_SPACES

    def __post_init__(self) -> None:
        pids = [p.task.pid for p in self.processes]
        if not pids or len(set(pids)) != len(pids):
            raise ValueError("no process, or one twice")
        if not 0 <= self.at < 1 << 62:
            raise ValueError(f"a clock cannot show {self.at}")
        tids = [*pids, *(tid for process in self.processes for tid in process.threads)]
        if len(set(tids)) != len(tids):
            raise ValueError("two processes have the same thread")
        for one in self.layouts.values():
            if one.files and max(one.files) >= len(self.files.files):
                raise ValueError(f"process {one.pid} maps file {max(one.files)} of {len(self.files.files)}")

    @property
    def layouts(self) -> dict[int, MemoryLayout]:
        """The memory of the living, by PID."""
        return {one.task.pid: one.layout for one in self.processes if one.layout is not None}

    @property
    def threads(self) -> dict[int, birth.Told]:
        """The threads of the living, by PID."""
        return {one.task.pid: (one.first, one.threads) for one in self.processes if one.layout is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class MapsDelta:
    """Memory of a process that was told in a round of pre-copy, and was made anew since: (start, end), by address."""

    pid: int
    stale: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        _ascending(self.stale)


def _ascending(ranges: tuple[tuple[int, int], ...]) -> None:
    last = 0
    for start, end in ranges:
        if not last <= start < end <= USER_END:
            raise ValueError(f"a range {start:#x}-{end:#x} is empty, out of order or out of range")
        last = end


def same_file(before: OpenFile, after: OpenFile) -> bool:
    """Whether what is mapped of the one is mapped of the other: the same file by the same path, opened in the same
    way."""
    return (
        isinstance(before, RegularFile)
        and isinstance(after, RegularFile)
        and (before.path, before.inode, before.access) == (after.path, after.inode, after.access)
    )


def fits(told: LiveTree, tasks: Iterable[Task], layouts: Mapping[int, MemoryLayout], spaces: Spaces) -> bool:
    """Whether what was built from ``told`` can become these processes: the same ones, in the same places of the tree,
    with the same programs, in the same namespaces. Both sides ask this, of the same records."""
    if {one.task for one in told.processes} != set(tasks) or told.spaces != spaces:
        return False
    before = told.layouts
    return before.keys() == layouts.keys() and all(same_process(before[pid], layouts[pid]) for pid in before)


def prepare(*, read: bool) -> None:
    """Work out beforehand how the records of an image are written, and read, and how sleeps are: 12 ms that the stop
    would pay else."""
    restart_block.prepare()
    callwatch.prepare()
    threaditer.prepare()
    image = (Manifest, TreeRecord, StatesRecord, TreeFiles, MemoryLayout, MapsDelta, FilesDelta, End)
    codec.prepare(*image, LiveTree, AheadFiles, ConnectionRecord, FrozenTree, unpacked=read)
