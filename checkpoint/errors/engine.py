"""Errors of the engine: which processes it does not touch, and what may fail while it works."""

from __future__ import annotations

from checkpoint.errors.tree import Refused
from tcpstate.errors import TcpmigError

__all__ = [
    "AddressGapMissing",
    "AlreadyTraced",
    "CgroupFrozen",
    "EngineFault",
    "ForeignMode",
    "InitProcess",
    "InjectionRefused",
    "InjectionTimeout",
    "KernelThread",
    "LeaderExited",
    "MatrixInUse",
    "MayNotTrace",
    "NoSuchProcess",
    "OwnProcess",
    "ProcessDied",
    "SeccompInTheWay",
    "SpawnFailed",
    "StopTimeout",
    "SyscallDispatch",
    "TrackingImpossible",
    "TreeUnsteady",
    "VforkParent",
    "ZombieProcess",
]


class NoSuchProcess(Refused):
    """There is no process with this number here: it never was, it has just ended, it lives in another PID namespace,
    or the number is that of a thread."""

    code = "TM-0301"
    fix = "Find the process with `ps`, in the PID namespace in which tcpmig runs."


class KernelThread(Refused):
    """The number is that of a thread of the kernel. It has no memory and no files of its own that could be moved."""

    code = "TM-0302"
    fix = "Name the server's process."


class InitProcess(Refused):
    """PID 1 is the init of this PID namespace. Everything else here descends from it and ends with it."""

    code = "TM-0303"
    fix = "Name the server's process; to move a whole container, run tcpmig outside it and name its init."


class OwnProcess(Refused):
    """The tree that was named contains tcpmig itself: the process is tcpmig, or one of its ancestors (the shell that
    started it, for instance). It would stop itself."""

    code = "TM-0304"
    fix = "Run tcpmig from outside that tree: another shell, or setsid."


class ZombieProcess(Refused):
    """The process has ended; only its exit status is still there, waiting for its parent to take it."""

    code = "TM-0305"
    fix = "Nothing is left to be moved. A parent that never waits for its children is a defect of the parent."


class AlreadyTraced(Refused):
    """A process can have one tracer only, and this one has one: a debugger, strace, or another tcpmig."""

    code = "TM-0306"
    fix = "End the tracer (its PID is named), then try again."


class MayNotTrace(Refused):
    """The kernel does not let us trace the process although it is there: it belongs to another user namespace or to
    another user, or a security module forbids it."""

    code = "TM-0307"
    fix = "Run tcpmig as root in the initial user namespace; check yama's ptrace_scope and the security module's log."


class LeaderExited(Refused):
    """The first thread of the process has ended while others run on (pthread_exit in main). Linux gives no way to put
    a process together again in that shape."""

    code = "TM-0308"
    fix = "Let the program's main thread live, for instance by joining the others."


class ForeignMode(Refused):
    """A thread runs 32-bit or x32 code. Its registers and system calls have another layout."""

    code = "TM-0309"
    fix = "Use a 64-bit build of the program."


class MatrixInUse(Refused):
    """A thread on aarch64 is in streaming mode or uses the matrix register of SME. A system call ends streaming mode,
    so what is in these registers would not survive being looked at."""

    code = "TM-0800"
    fix = "Try again: programs use them for moments. Or run the program without SME."


class SeccompInTheWay(Refused):
    """A seccomp filter of the process forbids calls that the injected code must make to clean up after itself. While
    tcpmig lives the filter is suspended, but this suspension ends with tcpmig: were it killed in that moment, the
    filter would kill or damage the process."""

    code = "TM-0310"
    fix = "Allow rt_sigprocmask, tgkill, close and munmap in the filter, or accept the risk explicitly."


class SyscallDispatch(Refused):
    """A thread has its system calls dispatched to a handler of its own (PR_SET_SYSCALL_USER_DISPATCH, used by Wine).
    Injected calls would go there as well."""

    code = "TM-0311"
    fix = "Move it in a moment when the emulation is not in use."


class CgroupFrozen(Refused):
    """The process is in a frozen cgroup. It stands still, but not for us: calls made inside it would not be carried out
    before somebody thaws it."""

    code = "TM-0312"
    fix = "Thaw the cgroup: write 0 to its cgroup.freeze, or THAWED to its freezer.state."


class StopTimeout(TcpmigError):
    """A thread did not stop in time: it sits in an uninterruptible wait in the kernel (a dead network file system, a
    defective disk) or in a frozen cgroup. All threads that had been stopped run again."""

    code = "TM-0501"
    fix = "See /proc/PID/task/TID/stack for what it waits for; thaw its cgroup if it is frozen."


class VforkParent(TcpmigError):
    """A thread has called vfork and is suspended until its child, which borrows its memory, calls exec or exits. Until
    then it cannot be stopped. The process runs on as it did."""

    code = "TM-0502"
    fix = "Try again; if the child never calls exec, this program cannot be moved while the child lives."


class ProcessDied(TcpmigError):
    """A process or thread that was stopped for the work ended: it was killed from outside, or by its cgroup."""

    code = "TM-0503"
    fix = "See the system log for who killed it (the OOM killer, an operator)."


class InjectionRefused(TcpmigError):
    """System calls cannot be made inside the process: it has no vdso with room at its end, or its limits or a security
    module refuse the memory that the injected code needs. The process is as it was."""

    code = "TM-0504"
    fix = "Raise its address space limit (RLIMIT_AS), or check the security module's log."


class EngineFault(TcpmigError):
    """The injected code itself received a fatal signal. The process was put back to where it stood."""

    code = "TM-0505"
    fix = "This is a defect of tcpmig: report it with the log."


class InjectionTimeout(TcpmigError):
    """A system call made inside the process did not return in time. It was interrupted, and the process was put back
    to where it stood."""

    code = "TM-0507"
    fix = "See with -v which call it was; a dead network file system is the usual cause."


class SpawnFailed(TcpmigError):
    """The process that a rebuilt one starts as could not be started."""

    code = "TM-0508"
    fix = "Check the limits on processes (RLIMIT_NPROC, pids.max) and CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN."


class AddressGapMissing(TcpmigError):
    """The rebuilt processes leave no gap of address space, common to all of them, for the code that rebuilds them."""

    code = "TM-0509"
    fix = "Report the mappings of the processes (/proc/PID/maps)."


class TrackingImpossible(TcpmigError):
    """A process's memory can be copied while it runs only if the kernel tells which pages it writes: by asynchronous
    write protection (userfaultfd, PAGEMAP_SCAN: Linux 6.7). The kernel lacks it, or refuses it to this process.
    Nothing was stopped."""

    code = "TM-0511"
    fix = "Without it the process stands still while all of its memory is copied: see --stop-and-copy."


class TreeUnsteady(TcpmigError):
    """Processes of the tree came and went, or called exec, in every round of copying its memory while it ran, so that
    no round could build on the one before. Nothing was stopped."""

    code = "TM-0512"
    fix = "Move it at a quieter time, or with --stop-and-copy."
