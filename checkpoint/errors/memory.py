"""Errors of memory, shared memory and System V objects, and of the vdso."""

from __future__ import annotations

from checkpoint.errors.tree import Refused
from tcpstate.errors import Outcome, TcpmigError

__all__ = [
    "AioNotMade",
    "AioRing",
    "AioUnderWay",
    "BadLayout",
    "DeviceMapping",
    "HandlerInVdso",
    "HandlerOnOtherCpu",
    "HugePageMapping",
    "IpcLeftOver",
    "IpcNotMade",
    "IpcShared",
    "IpcTaken",
    "KernelLacks",
    "MemoryUnreadable",
    "MemoryUnwritable",
    "OtherVdso",
    "SealedMapping",
    "SecretMemory",
    "SegmentTaken",
    "SysvSharedMemory",
    "UnsupportedMemory",
    "UserfaultMapping",
]


class UnsupportedMemory(Refused):
    """A mapping of the process is of a kind that cannot be made again elsewhere, or not yet: memory with protection
    keys, shadow stacks, probes, a driver's or a facility's own memory."""

    code = "TM-0370"
    fix = "Restart the program without the facility that made the mapping."


class HugePageMapping(Refused):
    """The process has mapped a file of hugetlbfs, or a System V segment of huge pages (SHM_HUGETLB): memory of this
    host that others may have as well. Anonymous memory and memfds of huge pages move, and transparent ones anyway."""

    code = "TM-0371"
    fix = "Restart the program with its use of huge pages switched off (often an option of the program)."


class DeviceMapping(Refused):
    """The process has mapped a device: registers, a driver's buffers, memory without page descriptors (DAX). What
    stands behind it is hardware of this host."""

    code = "TM-0372"
    fix = "Let the program release the device first."


class SecretMemory(Refused):
    """The process has memory from memfd_secret(2). The kernel lets nobody but the process itself read it, not even
    root."""

    code = "TM-0373"
    fix = "Let the program drop its secret memory first; its contents cannot be moved."


class UserfaultMapping(Refused):
    """The process has registered memory with userfaultfd(2): another thread or process handles its page faults. Where
    it stands in that work cannot be told from outside."""

    code = "TM-0374"
    fix = "Wait until the work that uses userfaultfd is done (a post-copy of another tool, a garbage collection)."


class AioRing(Refused):
    """The process has an asynchronous I/O context (io_setup(2)) that cannot be told whole: the kernel lends us no BPF
    iterator to see whether requests are under way, the ring is mapped only in part or protected otherwise, it was
    inherited from another process, or there are more than 64 contexts."""

    code = "TM-0375"
    fix = "Restart the program with native asynchronous I/O switched off (often an option of the program)."


class AioUnderWay(Refused):
    """Requests are under way in an asynchronous I/O context (io_submit(2)): what the kernel does for them cannot be
    moved. Transfers end by themselves, and the stop waits a moment for them; a request that waits for a file to become
    ready (IOCB_CMD_POLL) may wait for ever."""

    code = "TM-0776"
    fix = "Try again; a program that waits by IOCB_CMD_POLL has to be restarted to wait in another way."


class AioNotMade(TcpmigError):
    """An asynchronous I/O context could not be made again: fs.aio-max-nr is reached here, or this host has so many CPUs
    that the kernel makes every ring longer than this one was."""

    code = "TM-0777"
    fix = "Raise fs.aio-max-nr at the target, or choose a target with no more CPUs."


class SysvSharedMemory(Refused):
    """The process has attached a System V shared memory segment (shmat(2)) that cannot move with it: processes outside
    of the tree have it too, or it is mapped in parts (some of it unmapped, or protected differently)."""

    code = "TM-0376"
    fix = "Move all processes that have it attached together (`ipcs -mp`), or let the program use mmap."


class SegmentTaken(Refused):
    """A System V shared memory segment would be made here under the ID and key that it had; one of them is in use. Who
    has attached a segment knows it by its ID, and who looks for it by its key."""

    code = "TM-0392"
    fix = "See `ipcs -m`; end the program that has the segment, or remove it with `ipcrm -m ID`."


class IpcShared(Refused):
    """A System V semaphore set or message queue that the tree uses is used by a living process outside of it, too. It
    exists once on a host, and would be torn in two."""

    code = "TM-0560"
    fix = "Move all processes that use it together (`ipcs -ps`, `ipcs -pq`), or end the other one."


class IpcTaken(Refused):
    """A System V semaphore set or message queue would be made here under the ID and key that it had; one of them is in
    use. Who uses one knows it by its ID, and who looks for it by its key."""

    code = "TM-0561"
    fix = "End the program that has it, or remove it with `ipcrm`."


class IpcNotMade(TcpmigError):
    """A System V semaphore set or message queue could not be made here, or not with what was in it: a limit is lower
    here (kernel.sem, kernel.msgmni, kernel.msgmax, kernel.msgmnb)."""

    code = "TM-0562"
    fix = "Compare `sysctl kernel.sem kernel.msgmni kernel.msgmax kernel.msgmnb` of the two hosts."


class SealedMapping(Refused):
    """The process, or the kernel for it, has sealed mappings against changes (mseal(2)). They could be made again, but
    a sealed vdso cannot be put in its place."""

    code = "TM-0377"
    fix = "Start the program with sealing switched off (glibc: GLIBC_TUNABLES=glibc.rtld.seal=0)."


class OtherVdso(TcpmigError):
    """The code that the source's kernel gives to every process (the vdso) cannot be made to lead to that of the
    target's kernel: it is not of the form that Linux has, or one of its functions is too short for a jump. The program
    has addresses in it."""

    code = "TM-0378"
    outcome = Outcome.REFUSED
    fix = "Move between hosts that run the same kernel."


class HandlerInVdso(TcpmigError):
    """The target runs another kernel, and a signal handler of the process will return into the middle of the code that
    the source's kernel gave to it (the vdso), which reads data that only that kernel has. The original runs on."""

    code = "TM-0740"
    outcome = Outcome.REFUSED
    fix = "Try again: at another moment no handler runs, or not there."


class HandlerOnOtherCpu(TcpmigError):
    """A thread was stopped in a signal handler, and the vector registers that the source's kernel has put on the stack
    for its return cannot be made ready for the target's CPU: it lacks some of them, or its layout needs more room than
    there is. The original runs on."""

    code = "TM-0741"
    outcome = Outcome.REFUSED
    fix = "Try again: at another moment no handler runs. Or move to a CPU with the same features."


class KernelLacks(Refused):
    """The processes use something that the target's kernel does not have, and that cannot be made there of anything
    else."""

    code = "TM-0742"
    fix = "Move to a host with a younger kernel; the message names what is used and which kernel has it first."


class BadLayout(TcpmigError):
    """The record of a process's memory cannot be built: mappings overlap, pages lie outside of them, or the kernel
    here refuses one. Nothing of it was left running."""

    code = "TM-0570"
    fix = "See the named mapping; check limits of memory and mappings (vm.max_map_count, cgroup) at the target."


class MemoryUnreadable(TcpmigError):
    """Pages of the process could not be read although they are there: memory failed, or a page fault handler
    (userfaultfd, a FUSE file system) does not answer. The process was left running as it was."""

    code = "TM-0571"
    fix = "See the kernel's log for memory errors; check `tcpmig check PID` for what handles page faults."


class MemoryUnwritable(TcpmigError):
    """Pages could not be written into the rebuilt process: memory or its cgroup's limit is exhausted, or
    ``proc_mem.force_override`` forbids writing to read-only memory."""

    code = "TM-0572"
    fix = "Make memory free at the target, or raise the cgroup's limit."


class IpcLeftOver(Refused):
    """The tree has an IPC namespace of its own, and in it is something that no process has open, and that cannot be
    moved: a shared memory segment that nobody has attached, or a POSIX message queue. It would be lost."""

    code = "TM-0725"
    fix = "Remove it inside the namespace (`ipcrm`, mq_unlink), or attach the segment."
