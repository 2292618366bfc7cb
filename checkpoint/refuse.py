"""Which processes the engine does not touch: read from /proc, before anything is stopped.

The same function serves ``tcpmig check`` (as verdicts) and the stop itself (as errors).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os

from checkpoint import procfs
from checkpoint.errors import (
    AlreadyTraced,
    CgroupFrozen,
    InitProcess,
    KernelThread,
    LeaderExited,
    MayNotTrace,
    NoSuchProcess,
    OwnProcess,
    Refused,
    ZombieProcess,
)
from checkpoint.verdict import Status, Verdict

__all__ = ["refuse_process", "refuse_root", "refuse_traced", "verdicts"]

_log = logging.getLogger(__name__)

_INIT = 1
_KIND = "process"


def refuse_root(pid: int) -> None:
    """Raise the :class:`~checkpoint.errors.Refused` that says why the tree that begins at ``pid`` cannot be stopped."""
    if pid <= 0:
        raise NoSuchProcess("process numbers begin at 1", object=f"pid {pid}")
    status = procfs.read_status(pid)
    if int(status["Tgid"]) != pid:
        raise NoSuchProcess(
            f"the number is that of a thread of process {status['Tgid']}",
            object=f"pid {pid}",
            fix=f"Name the process: {status['Tgid']}.",
        )
    stat = procfs.read_stat(pid)
    if stat.kernel_thread:
        raise KernelThread(f"{stat.comm} is a thread of the kernel", object=f"pid {pid}")
    if pid == _INIT:
        raise InitProcess(f"{stat.comm} is the init of this PID namespace", object=f"pid {pid}")
    us = os.getpid()
    if pid == us:
        raise OwnProcess("the process is tcpmig itself", object=f"pid {pid}")
    if pid in procfs.parents(us):
        raise OwnProcess(f"{stat.comm} is an ancestor of tcpmig", object=f"pid {pid}")
    if stat.zombie and len(procfs.threads(pid)) == 1:
        raise ZombieProcess(f"{stat.comm} has ended", object=f"pid {pid}")
    refuse_process(pid)


def refuse_process(pid: int) -> None:
    """Raise the :class:`~checkpoint.errors.Refused` that says why this one process cannot be stopped."""
    stat = procfs.read_stat(pid)
    if stat.zombie and len(procfs.threads(pid)) > 1:
        raise LeaderExited(f"the main thread of {stat.comm} has ended, others run on", object=f"pid {pid}")
    refuse_traced(pid, pid)
    if stat.zombie:
        return
    try:
        # Opening this file makes the very check that ptrace makes (PTRACE_MODE_ATTACH, kernel/ptrace.c).
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC))
    except PermissionError as error:
        raise MayNotTrace(f"tracing {stat.comm} is not allowed ({error.strerror})", object=f"pid {pid}") from error
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchProcess("the process has just ended", object=f"pid {pid}") from error
    if (cgroup := _frozen_cgroup(pid)) is not None:
        raise CgroupFrozen(f"{stat.comm} is in the frozen cgroup {cgroup}", object=f"pid {pid}")


def refuse_traced(pid: int, tid: int) -> None:
    """AlreadyTraced if another process traces this thread."""
    status = procfs.read_status(pid, tid)
    tracer = int(status["TracerPid"])
    if tracer not in (0, os.getpid()):
        name = f"pid {pid}" if tid == pid else f"pid {pid} thread {tid}"
        raise AlreadyTraced(f"{status['Name']} is traced by process {tracer}", object=name)


def _refuse_traced_threads(pid: int) -> None:
    """A debugger may have attached to a thread that is not the first."""
    for tid in procfs.threads(pid)[1:]:
        # it has just ended
        with contextlib.suppress(NoSuchProcess):
            refuse_traced(pid, tid)


@functools.cache
def _freezers() -> tuple[tuple[str, str, str, str], ...]:
    """(controller, mount point, file, text in it that says frozen) of the cgroup hierarchies that can freeze."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            left, _, right = line.rstrip("\n").partition(" - ")
            point, (kind, _, options) = left.split()[4], right.split()[:3]
            if kind == "cgroup2":
                found.append(("", point, "cgroup.events", "frozen 1"))
            elif kind == "cgroup" and "freezer" in options.split(","):
                found.append(("freezer", point, "freezer.state", "FROZEN"))
    return tuple(found)


def _frozen_cgroup(pid: int) -> str | None:
    """The cgroup that keeps the process frozen, as far as we can see; None if none does."""
    for line in procfs.read_cgroups(pid):
        _, controllers, path = line.split(":", 2)
        for controller, point, file, text in _freezers():
            if controller not in controllers.split(","):
                continue
            try:
                with open(f"{point}{path}/{file}", encoding="ascii") as state:
                    if text in state.read():
                        return path
            except OSError as error:
                # the root cgroup has no such file, and a path outside our cgroup namespace no meaning
                _log.debug("whether %s is frozen cannot be told: %s", path, error)
    return None


def verdicts(pid: int) -> list[Verdict]:
    """One verdict for every process of the tree that begins at ``pid``; only one if the root itself is refused."""
    try:
        refuse_root(pid)
    except Refused as error:
        return [Verdict.refuse(error, _KIND)]
    found = []
    for each in procfs.tree(pid):
        try:
            refuse_process(each)
            _refuse_traced_threads(each)
            stat = procfs.read_stat(each)
        except NoSuchProcess:
            continue  # a descendant that ended while we looked
        except Refused as error:
            found.append(Verdict.refuse(error, _KIND))
            continue
        text = f"{stat.comm}, {'a zombie' if stat.zombie else f'{stat.num_threads} threads'}"
        found.append(Verdict(subject=f"pid {each}", kind=_KIND, status=Status.OK, text=text))
    return found
