"""Errors of what a process and its threads have beside memory and files."""

from __future__ import annotations

from checkpoint.errors.tree import Refused
from tcpstate.errors import Outcome, TcpmigError

__all__ = [
    "ClocksNotContinued",
    "ConfinedBySecurityModule",
    "DirectoryGone",
    "ExtendedStateForeign",
    "InLandlockDomain",
    "KernelWorkers",
    "MachineForeign",
    "SeccompSupervised",
    "SeccompUnreadable",
    "SharedBetweenProcesses",
    "StateRefused",
    "StateUnreadable",
    "TimerOutOfReach",
    "UnsharedThread",
    "UnsupportedCpuFeature",
]


class SharedBetweenProcesses(Refused):
    """Two processes that are not threads of each other share memory or signal handlers (clone with CLONE_VM or
    CLONE_SIGHAND but without CLONE_THREAD), or share descriptors or directories (CLONE_FILES, CLONE_FS) and one of them
    is not of the tree, or what is shared is not the first thread's. A rebuilt pair would have two copies instead."""

    code = "TM-0320"
    fix = "Wait until the child has called exec (vfork, posix_spawn), or move both processes, by a common ancestor."


class UnsharedThread(Refused):
    """A thread has descriptors of its own, apart from its process's (unshare(CLONE_FILES)). Rebuilt threads share
    descriptors."""

    code = "TM-0321"
    fix = "Configure the program not to unshare them per thread."


class ConfinedBySecurityModule(Refused):
    """A security module (SELinux, AppArmor, Smack) holds the process under another label than tcpmig's. A rebuilt
    process would have tcpmig's label, with other rights."""

    code = "TM-0322"
    fix = "Run tcpmig under the label of the process, or the process unconfined."


class InLandlockDomain(Refused):
    """A thread has restricted itself by Landlock (landlock_restrict_self(2)). The kernel does not tell to what, so a
    rebuilt one would be free to do what it had given up. That it did is only seen when it stands still."""

    code = "TM-0778"
    fix = "Start the program without its sandbox, if it has an option for that, or do not move it."


class KernelWorkers(Refused):
    """The kernel runs worker threads in the process, for io_uring or vhost. What they are doing cannot be read."""

    code = "TM-0324"
    fix = "Disable io_uring in the program (or by kernel.io_uring_disabled) and restart it."


class SeccompSupervised(Refused):
    """System calls of the process are answered by another process (seccomp user notification). That process would
    answer the original only."""

    code = "TM-0325"
    fix = "Run the program without the supervising filter."


class DirectoryGone(Refused):
    """The working directory or the root directory of the process was removed, or is not below tcpmig's root. There is
    no path by which the target could find it."""

    code = "TM-0326"
    fix = "Let the program change to a directory that exists, or run tcpmig with the process's view (nsenter)."


class UnsupportedCpuFeature(Refused):
    """A thread uses a feature of the CPU whose state cannot be rebuilt yet: a shadow stack, which only the kernel can
    write, or tagged addresses."""

    code = "TM-0327"
    fix = "Start the program without the feature (glibc: GLIBC_TUNABLES, glibc.cpu.hwcaps=-SHSTK)."


class SeccompUnreadable(Refused):
    """The process has seccomp filters. To read them takes CAP_SYS_ADMIN, in a tcpmig that has no filter itself."""

    code = "TM-0328"
    fix = "Run tcpmig as root outside of any container."


class StateUnreadable(TcpmigError):
    """The kernel refused to tell a part of the state of a stopped process. The process was left running as it was."""

    code = "TM-0530"
    fix = "The message names the call and its error; see docs/reference/kernel.md for what the kernel must have."


class StateRefused(TcpmigError):
    """The kernel refused to give a rebuilt process a part of its state: a directory that is absent here, a limit, a
    missing capability. What had been built was discarded."""

    code = "TM-0531"
    fix = "The message names the call and its error: make the named thing available at the target."


class ExtendedStateForeign(TcpmigError):
    """Floating point or vector registers of a thread hold values of a kind that this CPU does not have. The program
    chose its instructions by the CPU that it was started on."""

    code = "TM-0532"
    outcome = Outcome.REFUSED
    fix = "Move to a CPU with all features of the source's; see `tcpmig check --to HOST`."


class MachineForeign(TcpmigError):
    """The registers are those of another machine architecture."""

    code = "TM-0533"
    outcome = Outcome.REFUSED
    fix = "Move between hosts of the same architecture."


class ClocksNotContinued(TcpmigError):
    """The clocks of the rebuilt processes cannot go on from where they stood, since no time namespace could be made.
    Deadlines on CLOCK_MONOTONIC would be wrong by the difference between the hosts."""

    code = "TM-0534"
    fix = "Use a kernel with CONFIG_TIME_NS, and CAP_SYS_ADMIN and CAP_SYS_TIME."


class TimerOutOfReach(TcpmigError):
    """A POSIX timer has a number so high that this kernel, which gives out numbers in ascending order, would have to
    create and delete too many timers before it."""

    code = "TM-0535"
    fix = "Move to a kernel from 6.16, which creates a timer under a wanted number."
