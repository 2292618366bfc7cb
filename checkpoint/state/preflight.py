"""What of a process's state cannot be moved, found in /proc before anything is stopped.

What only a stopped thread shows is refused when it is captured (a seccomp filter with user notification) or by the
engine (32-bit code, dispatched system calls, a Landlock domain).  Not seen at all, and not moved: keys, audit IDs.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from checkpoint import procfs
from checkpoint.errors import (
    ConfinedBySecurityModule,
    DirectoryGone,
    ForeignMode,
    KernelWorkers,
    NoSuchProcess,
    Refused,
    SeccompInTheWay,
    SeccompUnreadable,
    SharedBetweenProcesses,
    UnsharedThread,
    UnsupportedCpuFeature,
)
from checkpoint.kernel.kcmp import KcmpType, kcmp
from checkpoint.kernel.seccomp import Mode
from checkpoint.state.filesystem import directory
from checkpoint.verdict import Status, Verdict
from tcpstate.errors import KernelFeatureMissing, TcpmigError
from tcpstate.kernel.capability import Cap

__all__ = ["verdicts"]

_KIND: Final = "state"
#: include/linux/sched.h, field 9 of stat: threads of the kernel that live inside a process
_PF_IO_WORKER: Final = 0x00000010
_PF_USER_WORKER: Final = 0x00004000
#: include/uapi/linux/elf.h
_ELF_CLASS_AT: Final = 4
_ELFCLASS64: Final = 2
_ALL_ADDRESS_BITS: Final = (1 << 64) - 1
#: seconds that a check waits for a process that stands in vfork
_VFORK_PATIENCE: Final = 1.0


def verdicts(pid: int, *, members: Iterable[int] = ()) -> list[Verdict]:
    """What becomes of the state of one process; one verdict, OK, if all of it can be moved.

    members  the processes that move along: with them it may share descriptors and directories

    NoSuchProcess if it ends meanwhile. (Its namespaces are judged by :mod:`checkpoint.namespaces.verdicts`.)
    """
    found: list[Verdict] = []
    for check in _CHECKS:
        found += check(pid)
    found += _sharing(pid, frozenset(members))
    return found or [Verdict(subject=f"pid {pid}", kind=_KIND)]


def _refuse(error: TcpmigError, kind: str) -> Verdict:
    return Verdict.refuse(error, kind)


def _mode(pid: int) -> Iterator[Verdict]:
    try:
        with open(f"/proc/{pid}/exe", "rb") as file:
            head = file.read(_ELF_CLASS_AT + 1)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchProcess("the process does not exist, or has just ended", object=f"pid {pid}") from error
    if head[_ELF_CLASS_AT:] != bytes([_ELFCLASS64]):
        yield _refuse(ForeignMode("its program is not a 64-bit one", object=f"pid {pid}"), "program")


def _label(pid: int) -> Iterator[Verdict]:
    theirs, ours = _security_label(pid), _security_label(os.getpid())
    if theirs != ours:
        error = ConfinedBySecurityModule(f"it runs under the label {theirs}, tcpmig under {ours}", object=f"pid {pid}")
        yield _refuse(error, "security label")


def _security_label(pid: int) -> str:
    """The label, or empty where no security module gives one."""
    try:
        with open(f"/proc/{pid}/attr/current", encoding="utf-8", errors="surrogateescape") as file:
            return file.read().rstrip("\0\n")
    except (FileNotFoundError, ProcessLookupError) as error:
        if os.path.exists(f"/proc/{pid}"):
            return ""
        raise NoSuchProcess("the process does not exist, or has just ended", object=f"pid {pid}") from error
    except OSError:
        return ""  # EINVAL: no such module


def _threads(pid: int) -> Iterator[Verdict]:
    for tid in procfs.threads(pid):
        name = f"pid {pid}" if tid == pid else f"pid {pid} thread {tid}"
        try:
            stat, status = procfs.read_stat(pid, tid), procfs.read_status(pid, tid)
        except NoSuchProcess:
            if tid == pid:
                raise
            continue  # this thread has just ended
        if stat.flags & (_PF_IO_WORKER | _PF_USER_WORKER):
            error: Refused = KernelWorkers(f"the kernel runs the worker {stat.comm} in it", object=name)
            yield _refuse(error, "kernel worker")
            continue
        if any(key.endswith("_Thread_features") and "shstk" in value for key, value in status.items()):
            yield _refuse(UnsupportedCpuFeature("it has a shadow stack", object=name), "shadow stack")
        yield from _seccomp(name, status)
        yield from _shared_with_leader(pid, tid, name)
    mask = procfs.read_status(pid).get("untag_mask")
    if mask is not None and int(mask, 16) != _ALL_ADDRESS_BITS:
        yield _refuse(UnsupportedCpuFeature("it uses tagged addresses", object=f"pid {pid}"), "tagged addresses")


def _seccomp(name: str, status: dict[str, str]) -> Iterator[Verdict]:
    mode = int(status["Seccomp"])
    if mode == Mode.STRICT:
        # what injected code does when the tool is killed is not read, write, exit or sigreturn
        yield _refuse(SeccompInTheWay("it is in seccomp's strict mode", object=name), "seccomp")
    if mode != Mode.FILTER:
        return
    own = procfs.read_status(os.getpid())
    if int(own["Seccomp"]) != Mode.DISABLED:
        yield _refuse(SeccompUnreadable("its filters are hidden from us, who have one", object=name), "seccomp")
    elif not int(own["CapEff"], 16) >> Cap.SYS_ADMIN & 1:
        yield _refuse(SeccompUnreadable("its filters are hidden without CAP_SYS_ADMIN", object=name), "seccomp")


def _shared_with_leader(pid: int, tid: int, name: str) -> Iterator[Verdict]:
    # one that is about to end has given its descriptors up already
    if tid != pid and not _same(pid, tid, KcmpType.FILES, gone=True) and procfs.lives(pid, tid):
        yield _refuse(UnsharedThread("it has descriptors of its own", object=name), "unshared descriptors")


def _sharing(pid: int, members: frozenset[int]) -> Iterator[Verdict]:
    """What it shares with another process, but for what can be kept: the first threads' descriptors and directories,
    within the tree."""
    others = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != pid]
    for other in others:
        if _same(pid, other, KcmpType.VM, gone=False):
            child = _after_vfork(pid, other)
            if child:
                text = f"process {child} has borrowed its parent's memory, and the parent waits for its exec (vfork)"
                yield _refuse(SharedBetweenProcesses(text, object=f"pid {pid}"), "shared memory")
            elif _same(pid, other, KcmpType.VM, gone=False):
                yield _shared(pid, other, "memory")
    apart = [tid for tid in _tasks(pid) if tid != pid and not _same(pid, tid, KcmpType.FS, gone=True)]
    for what, words in ((KcmpType.FILES, "descriptors"), (KcmpType.FS, "directories")):
        for other in others:
            together = _same(pid, other, what, gone=False)
            pairs = _pairs(pid, other, apart, together)
            if (together and other not in members) or any(_same(one, task, what, gone=False) for one, task in pairs):
                yield _shared(pid, other, words)


def _after_vfork(pid: int, other: int) -> int:
    """Wait, not for long, while one of the two stands in vfork until the other calls exec or ends: programs that start
    others do so all the time. That other one, if it is still so; else 0."""
    deadline = time.monotonic() + _VFORK_PATIENCE
    while (child := _lent_to(pid, other)) and _same(pid, other, KcmpType.VM, gone=False):
        if time.monotonic() > deadline:
            return child
        time.sleep(_VFORK_PATIENCE / 100)
    return 0


def _lent_to(pid: int, other: int) -> int:
    for parent, child in ((pid, other), (other, pid)):
        with contextlib.suppress(NoSuchProcess):
            if procfs.read_stat(child).ppid == parent:
                states = {procfs.read_stat(parent, tid).state for tid in procfs.threads(parent)}
                return child if "D" in states else 0
    return 0


def _pairs(pid: int, other: int, apart: list[int], together: bool) -> Iterator[tuple[int, int]]:
    """The threads of two processes that may share nothing; ``together``: the first ones do."""
    for task in _tasks(other):
        if task != other and not together:
            yield pid, task
        for one in apart:
            yield one, task


def _tasks(pid: int) -> list[int]:
    try:
        return procfs.threads(pid)
    except NoSuchProcess:
        return []


def _shared(pid: int, other: int, words: str) -> Verdict:
    error = SharedBetweenProcesses(f"it shares its {words} with process {other}", object=f"pid {pid}")
    return _refuse(error, f"shared {words}")


def _same(first: int, second: int, what: KcmpType, *, gone: bool) -> bool:
    """Whether two tasks share a thing; ``gone``: the answer for a task that has just ended.

    A task that we may not trace is in another user namespace, and shares nothing with one that we may.
    """
    try:
        return kcmp(first, second, what) == 0
    except ProcessLookupError:
        return gone
    except PermissionError:
        return False


def _directories(pid: int) -> Iterator[Verdict]:
    for which in ("cwd", "root"):
        try:
            directory(pid, which)
        except DirectoryGone as error:
            yield _refuse(error, which)


def _cgroups(pid: int) -> Iterator[Verdict]:
    groups = set()
    for tid in procfs.threads(pid):
        try:
            with open(f"/proc/{pid}/task/{tid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
                groups.add(file.read())
        except (FileNotFoundError, ProcessLookupError):
            continue  # this thread has just ended
    if len(groups) > 1:
        yield Verdict(
            subject=f"pid {pid}",
            kind="cgroup",
            status=Status.WARN,
            text="its threads are in different cgroups; all of them will be in the first thread's",
        )


def _timers(pid: int) -> Iterator[Verdict]:
    if not os.path.exists(f"/proc/{pid}/timers"):
        error = KernelFeatureMissing(
            "the kernel does not tell the timers of a process (CONFIG_CHECKPOINT_RESTORE)", object=f"pid {pid}"
        )
        yield _refuse(error, "posix timers")


_CHECKS: Final[tuple[Callable[[int], Iterator[Verdict]], ...]] = (
    _mode,
    _label,
    _threads,
    _directories,
    _cgroups,
    _timers,
)
