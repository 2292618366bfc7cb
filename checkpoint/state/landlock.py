"""Landlock domains: a rebuilt thread would be free of what it had bound itself to, so such a thread is refused.

No interface tells of a domain.  But who is in one may not look at a process outside of it (the hook of ptrace's access
checks), not even by kcmp(2), whoever he is.  So each thread is made to compare itself with a *witness*: a process of
ours with the very same user and group, in the same user namespace, no capabilities, and nothing to hide.  Everything
else allows that.

Source: security/landlock/task.c (hook_ptrace_access_check), kernel/ptrace.c (__ptrace_may_access), kernel/kcmp.c.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os

from checkpoint import procfs
from checkpoint.arch import stub_elf
from checkpoint.errors import InLandlockDomain, NoSuchProcess, SpawnFailed
from checkpoint.kernel import nsfs
from checkpoint.kernel.clone import CloneFlag
from checkpoint.kernel.kcmp import KcmpType
from checkpoint.kernel.program import executable
from checkpoint.state.base import TaskView
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.calls import Result
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.prctl import Pr, Securebit

__all__ = ["ask", "available", "make_ready", "refuse_confined"]

_log = logging.getLogger(__name__)

#: LANDLOCK_CREATE_RULESET_VERSION, include/uapi/linux/landlock.h
_VERSION = 1
#: where the witness's only page lies
_BASE = 0x1000_0000
_NAME = "tcpmig-witness"
_EXIT_FAILED = 127


@functools.cache
def available() -> bool:
    """Whether this kernel has Landlock, and it is switched on."""
    try:
        return syscall(SYS.landlock_create_ruleset, 0, 0, _VERSION) > 0
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
            _log.info("whether there is Landlock cannot be told: %s", error)
        return False


def _ids(status: dict[str, str]) -> tuple[int, int]:
    """The real user and group, by which the kernel compares."""
    return int(status["Uid"].split()[0]), int(status["Gid"].split()[0])


def make_ready(pid: int) -> None:
    """Start the witnesses of a process's threads before it is stopped. NoSuchProcess."""
    for tid in procfs.threads(pid) if available() else ():
        with contextlib.suppress(NoSuchProcess):  # this thread has just ended
            _witness_for(pid, procfs.read_status(pid, tid))


def _witness_for(pid: int, status: dict[str, str]) -> int | None:
    try:
        space = os.stat(f"/proc/{pid}/ns/user").st_ino
        foreign = space != os.stat("/proc/thread-self/ns/user").st_ino
        return _witness(os.getpid(), *_ids(status), space if foreign else 0, pid if foreign else 0)
    except (OSError, SpawnFailed) as error:
        _log.warning("whether a process is in a Landlock domain cannot be told: %s", error)
        return None


def ask(task: TaskView) -> Result | None:
    """Queue the question; None where it needs none, or nobody could be asked about."""
    if not available():
        return None
    if len(task.status["NSpid"].split()) > 1:
        # no number of its PID namespace leads to a process of ours
        _log.info("whether %s, in a PID namespace of its own, is in a Landlock domain cannot be told", task)
        return None
    witness = _witness_for(task.pid, task.status)
    if witness is None:
        return None
    inner = task.view.inner_tid(task.tid)
    return task.calls.call(SYS.kcmp, inner, witness, KcmpType.VM, 0, 0, ignore=True, label="look at another process")


def refuse_confined(task: TaskView, answer: Result | None) -> None:
    """InLandlockDomain if the thread was not allowed to look. Other modules answer EACCES, and their labels are told by
    the check."""
    if answer is None or answer.ok:
        return
    if answer.value == -errno.EPERM:
        raise InLandlockDomain("it has restricted itself by Landlock", object=str(task))
    _log.info("whether %s is in a Landlock domain cannot be told: %s", task, os.strerror(-answer.value))


_witnesses: dict[tuple[int, int, int, int], int] = {}


def _witness(parent: int, uid: int, gid: int, space: int, pid: int) -> int:
    """A process of this user and group that ends when ``parent``, which is us, does; in the user namespace with that
    number, which ``pid`` is in, if it is not ours. OSError, SpawnFailed."""
    key = parent, uid, gid, space
    if key not in _witnesses:
        _witnesses[key] = _started(parent, uid, gid, pid)
    return _witnesses[key]


def _started(parent: int, uid: int, gid: int, pid: int) -> int:
    watched = os.pidfd_open(parent)
    program = -1
    reading, writing = os.pipe()
    try:
        program = executable(_NAME, stub_elf(_BASE, watched))
        os.set_inheritable(watched, True)
        child = os.fork()
        if child == 0:
            _become(program, uid, gid, watched, pid)
        os.close(writing)
        writing = -1
        os.read(reading, 1)  # its end is closed by exec
    finally:
        for fd in (watched, program, reading, writing):
            if fd >= 0:
                os.close(fd)
    return child


def _become(program: int, uid: int, gid: int, watched: int, pid: int) -> None:
    """In the child: never returns."""
    try:
        # exec gives root no capabilities, and whoever is not root has none left, but for entering a user namespace
        bits = Securebit.NO_SETUID_FIXUP if pid else Securebit.NOROOT
        syscall(SYS.prctl, Pr.SET_SECUREBITS, bits, 0, 0, 0)
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        if pid:
            syscall(SYS.setns, nsfs.opened(pid, "user"), CloneFlag.NEWUSER)
            syscall(SYS.prctl, Pr.SET_SECUREBITS, Securebit.NOROOT, 0, 0, 0)
        syscall(SYS.close_range, watched + 1, (1 << 32) - 1, 4)  # CLOSE_RANGE_CLOEXEC: the program is run from one
        os.execve(program, [_NAME], {})
    finally:
        os._exit(_EXIT_FAILED)
