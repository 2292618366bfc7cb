"""A stopped tree in records: what the image is of, and each process's place and state."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from checkpoint.files.sysv import SysvSegment
from checkpoint.files.table import FileTable
from checkpoint.files.tcp import Original
from checkpoint.files.terminal import slave_number
from checkpoint.inject import Injection
from checkpoint.ipc.base import SystemV
from checkpoint.kernel.kcmp import KcmpType, Known
from checkpoint.namespaces.numbers import Numbers
from checkpoint.namespaces.spaces import Spaces
from checkpoint.procfs import Stat
from checkpoint.records import Manifest, ProcessRecord, StatesRecord, TreeRecord
from checkpoint.state import clocks
from checkpoint.state.likeness import Likeness
from checkpoint.state.table import capture_alike
from checkpoint.tracee import Process, Tree
from checkpoint.traces import FrozenTree, HeldListener, HeldListeners, Traced, given_up_locks, listener_name
from checkpoint.tree import Task, plan
from tcpstate.filters import own_filter, own_mark, read_filters
from tcpstate.version import VERSION

__all__ = [
    "Sharing",
    "frozen_tree",
    "held_listeners",
    "manifest",
    "process_records",
    "states_records",
    "task_of",
    "tree_record",
]

#: processes whose states are told together, if not all are
_APART: Final = 4


def manifest(tree: Tree, roots: Sequence[int], number: Numbers) -> Manifest:
    """What the image is of. ``number``: to the numbers that the tree has in its own PID namespace."""
    zombies = tuple(number(zombie.pid) for zombie in tree.zombies)
    system = os.uname()
    return Manifest(
        program=VERSION,
        host=system.nodename,
        boot_id=_boot_id(),
        kernel=system.release,
        machine=system.machine,
        created=int(time.time()),
        roots=tuple(map(number, roots)),
        pids=tuple(number(process.pid) for process in tree.processes) + zombies,
        tids=tuple(number(thread.tid) for process in tree.processes for thread in process.threads) + zombies,
    )


def process_records(tree: Tree, masters: set[int]) -> list[ProcessRecord]:
    """Every process, parents before children, zombies last; by our numbers. ``masters`` as in :func:`task_of`."""
    sharing = Sharing()
    living = [
        ProcessRecord(
            task=task_of(process.stat, masters, sharing),
            comm=process.stat.comm,
            exit_signal=process.stat.exit_signal,
            stop_signal=process.stop_signal,
        )
        for process in tree.processes
    ]
    return living + [
        ProcessRecord(task=task_of(stat, set(), sharing, stat.exit_code), comm=stat.comm, exit_signal=stat.exit_signal)
        for stat in tree.zombies
    ]


class Sharing:
    """Who shares what among processes that are asked for in the order of the tree."""

    def __init__(self) -> None:
        self._files = Known(KcmpType.FILES)
        self._directories = Known(KcmpType.FS)

    def of(self, pid: int) -> tuple[int, int]:
        """(whose descriptors, whose directories) a process has; 0: none's that was asked for before."""
        try:
            files, directories = self._files.first(pid), self._directories.first(pid)
        except ProcessLookupError:
            return 0, 0  # it runs, and has just ended
        return (0 if files == pid else files), (0 if directories == pid else directories)


def tree_record(
    processes: Sequence[ProcessRecord], roots: Sequence[int], objects: Sequence[SystemV], spaces: Spaces
) -> TreeRecord:
    """The tree: its processes and System V objects by its own numbers, its roots by ours. UnsupportedSession if it
    cannot be grown again."""
    plan([record.task for record in processes])
    folders = () if spaces.mounts is None else spaces.mounts.folders(roots[0])
    return TreeRecord(processes=tuple(processes), ipc=tuple(objects), spaces=spaces, folders=folders)


def states_records(
    processes: Sequence[Process], root: int, *, alike: bool, apart: bool = False
) -> Iterator[StatesRecord]:
    """The states of processes that stand still, each by calls that are made in it.

    root   whose clocks are told
    alike  threads that are like others may be told by what is their own
    apart  some processes at a time, else all at once

    StateUnreadable, and the errors of state that cannot be moved.
    """
    step = _APART if apart else len(processes)
    for at in range(0, len(processes), step):
        states, rows = [], {}
        for process in processes[at : at + step]:
            likeness = Likeness(process)
            with Injection(process, likeness.asked) as injection:
                state, others = capture_alike(process, injection, likeness)
            states.append(state)
            if others:
                rows[state.pid] = others
        # read after every timer: none that goes on with the time that was left is early on these clocks
        told = StatesRecord(states=tuple(states), clocks=clocks.read(root), alike=rows, apart=apart)
        yield told if alike else told.spelled_out()


def task_of(stat: Stat, masters: set[int], sharing: Sharing, wait_code: int | None = None) -> Task:
    """The place of a process in its tree. ``masters``: the numbers of the pseudo terminals that are the tree's."""
    files, directories = sharing.of(stat.pid) if wait_code is None else (0, 0)
    terminal = slave_number(stat.tty) if stat.sid == stat.pid and stat.tty else None
    return Task(
        pid=stat.pid,
        ppid=stat.ppid,
        pgid=stat.pgid,
        sid=stat.sid,
        wait_code=wait_code,
        terminal=terminal if terminal is not None and terminal in masters else -1,
        files=files,
        directories=directories,
    )


def frozen_tree(
    tree: Tree,
    connections: Sequence[Original],
    table: FileTable,
    objects: Callable[[Iterable[str]], list[str]],
) -> FrozenTree:
    """What is noted of a tree before it is kept stopped. ``objects``: adds to the notes of segments those of other
    System V objects (ipc.table.Objects.notes)."""
    return FrozenTree(
        processes=[Traced.of(process) for process in tree.processes],
        connections=list(connections),
        locks=given_up_locks(table.later, table.fresh),
        objects=objects(record.note for record in table.fresh if isinstance(record, SysvSegment)),
        more=table.ahead is not None and table.ahead.connections > 0,
    )


def held_listeners(listeners: Sequence[socket.socket], places: Sequence[list[tuple[int, int]]]) -> HeldListeners:
    """What is noted of listeners before they drop SYNs."""
    held = [
        HeldListener(places=where, name=listener_name(sock), filter=own_filter(own), mark=own_mark(sock))
        for sock, where, own in zip(listeners, places, read_filters(listeners), strict=True)
    ]
    return HeldListeners(listeners=held)


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
