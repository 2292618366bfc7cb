"""A PID namespace for a tree that had none: where its numbers are taken, it gets them in there.

Its first process is ours: a few machine instructions that wait for every child and end, when there is none left, with
the status of the tree's root.  The roots are its children.  It also has a mount namespace, a copy of the host's, in
which /proc shows the processes by their numbers.

Source: pid_namespaces(7), mount_namespaces(7).
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Sequence
from typing import Final

from checkpoint.arch import init_image
from checkpoint.errors import ImageIncomplete
from checkpoint.grow import Birth
from checkpoint.kernel.clone import CloneFlag
from checkpoint.kernel.mman import Map, Prot
from checkpoint.kernel.mounts import MountFlag, mount
from checkpoint.memory.vma import PAGE
from checkpoint.namespaces.entering import run_in
from checkpoint.spawn import Stub
from checkpoint.state.base import TaskBuilder
from checkpoint.state.cgroup import Cgroups
from checkpoint.tree import INIT, Task
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.prctl import Pr
from tcpstate.slotted import dataclass

__all__ = ["complete", "settle", "with_init"]

_NAME: Final = b"tcpmig-init\0"
_LAST_FD: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class _Birth:
    """A process that is no part of the image, or one that has another parent than there."""

    task: Task
    exit_signal: int


def with_init(births: Sequence[Birth]) -> list[Birth]:
    """The processes to be grown: the init, and the tree as its children. ImageIncomplete if one of them has its
    number."""
    numbers = {birth.task.pid for birth in births}
    if INIT in numbers:
        raise ImageIncomplete("a process of the image is the first of a PID namespace already")
    init = _Birth(Task(pid=INIT, ppid=0, pgid=0, sid=0), signal.SIGCHLD)
    return [init, *(birth if birth.task.ppid in numbers else _child(birth) for birth in births)]


def _child(birth: Birth) -> Birth:
    return _Birth(dataclasses.replace(birth.task, ppid=INIT), birth.exit_signal)


def settle(init: Stub) -> None:
    """The init was just born: what is around it. NamespaceNotMade."""
    calls = CallTable()
    calls.call(SYS.unshare, CloneFlag.NEWNS, label="unshare the mount namespace")
    mount(calls, "none", "/", flags=MountFlag.REC | MountFlag.PRIVATE)
    mount(calls, "proc", "/proc", "proc", MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOEXEC)
    run_in(init, calls)


def complete(init: Stub, root: int, cgroups: Cgroups, warn: Callable[[str], None]) -> None:
    """Make the program of it that it will be, at the end, and put it into the tree's cgroups: those of the tool may end
    with a login. What comes next is its release.

    root     number of the tree's root
    cgroups  the ones that it is in
    """
    task = TaskBuilder(pid=init.pid, tid=init.pid, warn=warn)
    cgroups.rebuild(task)
    task.run_outside()
    calls = CallTable()
    calls.call(SYS.close_range, 0, _LAST_FD, 0, label="close_range")
    calls.call(SYS.chdir, calls.path("/"), label="chdir")
    calls.call(SYS.prctl, Pr.SET_NAME, calls.put(_NAME), label="PR_SET_NAME")
    page = calls.call(SYS.mmap, 0, PAGE, Prot.READ | Prot.EXEC, Map.PRIVATE | Map.ANONYMOUS, -1, 0, label="mmap")
    run_in(init, calls)
    init.write(page.value, init_image(root))
    init.leave()
    leader = init.leader
    leader.set_registers(leader.registers.moved(page.value))
    leader.set_sigmask(0)
