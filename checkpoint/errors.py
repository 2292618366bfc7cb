"""Errors of the process engine, the image and the checks before the stop. See :mod:`tcpstate.errors` for the tree."""

from __future__ import annotations

from tcpstate.errors import Outcome, TcpmigError

__all__ = [
    "AddressGapMissing",
    "AddressTaken",
    "AioNotMade",
    "AioRing",
    "AioUnderWay",
    "AlreadyTraced",
    "BacklogNotDrained",
    "BadExternal",
    "BadFileRecord",
    "BadImageRecord",
    "BadLayout",
    "BadPathMap",
    "BridgeMissing",
    "CgroupFrozen",
    "ClocksNotContinued",
    "ConfinedBySecurityModule",
    "DeviceMapping",
    "DirectoryGone",
    "EngineFault",
    "EpollTargetLost",
    "ExtendedStateForeign",
    "ExternalNotHere",
    "FileCaptureFailed",
    "FileDiffers",
    "FileMissing",
    "FileNotShared",
    "FileRebuildFailed",
    "FileUnreachable",
    "ForeignImage",
    "ForeignMode",
    "HandlerInVdso",
    "HandlerOnOtherCpu",
    "HugePageMapping",
    "IdOutsideOfMap",
    "ImageDamaged",
    "ImageError",
    "ImageIncomplete",
    "ImageLimitExceeded",
    "ImageNotWritten",
    "ImageTruncated",
    "ImageUnreadable",
    "InLandlockDomain",
    "InitProcess",
    "InjectionRefused",
    "InjectionTimeout",
    "InterfaceMissing",
    "IpcLeftOver",
    "IpcNotMade",
    "IpcShared",
    "IpcTaken",
    "KernelLacks",
    "KernelThread",
    "KernelWorkers",
    "LazyImpossible",
    "LeaderExited",
    "LocalPeer",
    "LockTaken",
    "MachineForeign",
    "MayNotTrace",
    "MemoryFilesTooLarge",
    "MemoryUnreadable",
    "MemoryUnwritable",
    "MountNotMovable",
    "NamespaceNotMade",
    "NamespaceShared",
    "NamespacesMoveAlone",
    "NestedNamespace",
    "NetworkNotMovable",
    "NoSuchProcess",
    "NotTheInit",
    "NumbersInUserNamespace",
    "OtherImageVersion",
    "OtherVdso",
    "OwnProcess",
    "OwnedFromOutside",
    "PairWithoutAddress",
    "PeerOutsideTree",
    "PendingLocalConnection",
    "PidTaken",
    "ProcessDied",
    "RebuildDiffers",
    "Refused",
    "SealedMapping",
    "SeccompInTheWay",
    "SeccompSupervised",
    "SeccompUnreadable",
    "SecretMemory",
    "SharedBetweenProcesses",
    "SharedDescriptors",
    "SharedInUserNamespace",
    "ShipWouldOverwrite",
    "SocketHeldOutside",
    "SpawnFailed",
    "StateRefused",
    "StateUnreadable",
    "StillLazy",
    "StopTimeout",
    "SupervisedElsewhere",
    "SyscallDispatch",
    "SysvSharedMemory",
    "TimerOutOfReach",
    "TooManyDescriptors",
    "TrackingImpossible",
    "TreeChanged",
    "TreeUnsteady",
    "UnitMainProcess",
    "UnitRestarts",
    "UnknownFrameKind",
    "UnreadKernelMessages",
    "UnsharedThread",
    "UnsupportedCpuFeature",
    "UnsupportedFile",
    "UnsupportedLock",
    "UnsupportedMapping",
    "UnsupportedMemory",
    "UnsupportedProtocol",
    "UnsupportedSession",
    "UnsupportedSharing",
    "UnsupportedTerminal",
    "UserfaultMapping",
    "VforkParent",
    "ZombieProcess",
]


class Refused(TcpmigError):
    """The check before the stop found something that cannot be moved. Every such thing is named with its PID and
    descriptor or mapping; nothing was stopped or changed. ``tcpmig check PID`` lists all of them."""

    code = "TM-0300"
    outcome = Outcome.REFUSED
    fix = "See `tcpmig check PID` for all verdicts, and what to do about each."


class UnsupportedSession(Refused):
    """A process belongs to a session or process group whose leader is alive but is neither its ancestor nor a
    sibling, so that no order of births can put it there again."""

    code = "TM-0380"
    fix = "Move the session leader's tree together with it, or restart the named process under its leader."


class UnsupportedSharing(Refused):
    """Processes share a table of descriptors, or their directories (clone with CLONE_FILES or CLONE_FS), that no order
    of births can give them again: what two processes share must come from a process that bore both, and not lead
    through a third one that shares others with somebody else. The parent between two of them may have ended."""

    code = "TM-0775"
    fix = "Move the tree that all of them belong to, or restart the named process under the one it shares with."


class BacklogNotDrained(TcpmigError):
    """Before the stop new connections are held off and the application is given a moment to accept those that wait on
    its listeners. It did not accept them in time. They would be lost, or be in a queue at the target while a process
    of this host has the other end. So the process was left running as it was."""

    code = "TM-0590"
    fix = "Try again when the application accepts connections promptly."


class TreeChanged(TcpmigError):
    """Between the check and the stop the process opened, mapped or became something that cannot be moved, or changed
    so fast that no consistent picture could be taken. It was left running as it was."""

    code = "TM-0591"
    fix = "Try again; if the same object is named again, see `tcpmig check PID`."


class RebuildDiffers(TcpmigError):
    """A rebuilt connection was read back before the commit and is not what was sent. The target's copy was discarded
    and the original goes on."""

    code = "TM-0592"
    fix = "Report it with the log: it names the item, the value sent and the value found."


class PidTaken(TcpmigError):
    """A process of the image needs its PID, and the number is in use here, as a process, a process group or a
    session."""

    code = "TM-0381"
    outcome = Outcome.REFUSED
    fix = "End the process that has the number, or restore in another PID namespace."


class ImageIncomplete(TcpmigError):
    """The image or the stream ended, or went on, without a record that is needed at that point."""

    code = "TM-0382"
    outcome = Outcome.REFUSED
    fix = "Make the image again."


class ImageError(TcpmigError):
    """An image, a file or a stream, is not usable. Nothing was built from it; every kind of failure has a class of its
    own below this one."""

    code = "TM-0401"
    outcome = Outcome.REFUSED
    fix = "Make the image again."


class ImageTruncated(ImageError):
    """The image ends before its END frame and trailer: it was copied in part, the writer ran out of space, or the
    stream was cut."""

    code = "TM-0402"
    fix = "Copy the image again and compare its size; if it came through a stream, run the command again."


class ImageDamaged(ImageError):
    """A digest, the index or a field of the layout is wrong: bytes of the image were changed after it was made."""

    code = "TM-0403"
    fix = "Copy the image again from where it was made; if it is damaged there too, make it again."


class ForeignImage(ImageError):
    """The file or stream does not begin as an image does: it is something else, or the remote command printed
    something before it."""

    code = "TM-0404"
    fix = "Check the path; for a stream, check that the remote shell prints nothing when it starts."


class OtherImageVersion(ImageError):
    """The image was made in a version of the format that this tcpmig does not read."""

    code = "TM-0405"
    fix = "Use the tcpmig that made the image, or a later one."


class UnknownFrameKind(ImageError):
    """The image has a part that this tcpmig does not know and that may not be left out: it was made by a later
    version. Without that part the processes would come back incomplete."""

    code = "TM-0406"
    fix = "Use the tcpmig that made the image, or a later one."


class ImageLimitExceeded(ImageError):
    """A length in the image is beyond the limits of the format. Such a length is never used: an image that has one is
    damaged, or made to do harm."""

    code = "TM-0407"
    fix = "Do not use the image; make it again from the processes."


class BadImageRecord(ImageError):
    """A part of the image is whole, its digest is right, and yet what it says cannot be: it was made by a defective or
    hostile writer, or by another version."""

    code = "TM-0408"
    fix = "Make the image again with this version of tcpmig."


class ImageUnreadable(ImageError):
    """The image file cannot be opened or read: it does not exist, permission is missing, it is no regular file, or the
    disk failed."""

    code = "TM-0409"
    fix = "Check the path and its permissions."


class ImageNotWritten(ImageError):
    """The image file could not be written: the directory does not exist, permission is missing, the disk is full or
    failed. The incomplete file was removed; a file that had the name before is unchanged."""

    code = "TM-0410"
    outcome = Outcome.FAILED
    fix = "Make room or choose another place with -o, then try again."


class ParentMissing(ImageError):
    """An incremental image does not hold the pages that had not changed since an earlier one: it names the earlier
    ones, and one of them is not where it was."""

    code = "TM-0415"
    fix = "Put the earlier images where they were, or beside this one; `tcpmig inspect FILE` names them under PARENTS."


class ParentDiffers(ImageError):
    """The file that an incremental image names as an earlier one is another image: its root digest is not the one that
    was noted."""

    code = "TM-0416"
    fix = "Put the image that was meant in its place; `tcpmig inspect FILE` shows the root digests."


# -- the engine: which processes it does not touch (TM-0301 .. 0319) ----------------------------------------------


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


# -- the engine at work (TM-0501 .. 0529) --------------------------------------------------------------------------


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


# --- open files: TM-0340..0369 are refusals before the stop, TM-0550..0569 failures while capturing or rebuilding


class UnsupportedFile(Refused):
    """A process holds an open file of a kind that cannot be rebuilt elsewhere: a device, a terminal that is not a
    standard stream, an io_uring, a raw or packet socket and the like. The verdict names the kind and the descriptor."""

    code = "TM-0340"
    fix = "Let the program close it (or not open it), then try again."


class PeerOutsideTree(Refused):
    """A pipe, fifo or local socket leads to a process that is not moved. Its other end would stay behind."""

    code = "TM-0341"
    fix = "Name the other process as well, or decide: --external FD=PATH or FD=close, --local-peer close or reset."


class SocketHeldOutside(Refused):
    """A socket of the tree is also held by a process outside of it (socket activation, an inherited listener). Moving
    it would leave a second owner behind."""

    code = "TM-0342"
    fix = "Name the other holder as well, or decide: --external FD=close, for a connection --local-peer close or reset."


class UnsupportedProtocol(Refused):
    """A socket runs something that the kernel neither shows nor lets set: MPTCP, kernel TLS, an upper-layer protocol
    (ULP), an eBPF socket filter, a protocol other than TCP, UDP and AF_UNIX."""

    code = "TM-0343"
    fix = "Configure the program not to use the protocol, then try again."


class FileUnreachable(Refused):
    """An open or mapped file has no path that leads to it: it was deleted but still has another hard link whose name is
    not known, or something is mounted over it, or it lies outside of this mount namespace's root."""

    code = "TM-0344"
    fix = "Let the program reopen the file by a name that exists (log rotation: send its reopen signal)."


class FileMissing(Refused):
    """A file or directory that the processes hold open or mapped does not exist here, or is of another type."""

    code = "TM-0345"
    fix = "Provide the file (shared file system, a copy), point to it with --map OLD=NEW, or let it travel with --ship."


class FileNotShared(Refused):
    """A process has a file open for writing, and the target has not the very same file, on a file system that both
    hosts share. What the process writes there would be missing here: the two files would silently diverge."""

    code = "TM-0353"
    fix = "Use a shared file system, let the file travel with --ship, or name another one with --map OLD=NEW."


class ShipWouldOverwrite(Refused):
    """A file that is to travel with the processes (--ship) has its place taken, by a file with another content or by
    something that is not a regular file."""

    code = "TM-0354"
    fix = "Move away what is there, let it be replaced (--overwrite), or send the file elsewhere with --map OLD=NEW."


class BadPathMap(Refused):
    """A --map is not of the form OLD=NEW with two absolute paths, or says two things of one path."""

    code = "TM-0355"
    fix = "Write --map /old/directory=/new/directory; it may be repeated."


class InterfaceMissing(Refused):
    """A socket is bound to a network interface (SO_BINDTODEVICE), or to an address that only has a meaning on one, and
    this host has no interface of that name."""

    code = "TM-0593"
    fix = "Say what it is called at the target: --map-dev OLD=NEW."


class BadExternal(Refused):
    """An --external is not of the form [PID:]FD=PATH, [PID:]FD=inherit or [PID:]FD=close, or names a descriptor that no
    process of the tree has."""

    code = "TM-0356"
    fix = "Name a descriptor that `ls -l /proc/PID/fd` shows, and an absolute path."


class ExternalNotHere(Refused):
    """What --external puts in the place of an open file is not here: there is no such path, it is of a kind that cannot
    be opened so, or a descriptor that is to be inherited was not passed to `tcpmig restore`."""

    code = "TM-0357"
    fix = "Name a file that is here, or pass the descriptor (as a shell does with 3<>FILE)."


class FileDiffers(Refused):
    """A file that the processes write to, or that they map, is not the same here: size or time of modification differ.
    The copies would silently diverge, or the program would crash in the middle of a mapped file."""

    code = "TM-0346"
    fix = "Use a shared file system, copy the file while the program rests, or point to it with --map OLD=NEW."


class PairWithoutAddress(Refused):
    """A connection has both ends in the process tree, on an address that is neither a loopback address nor among those
    that move. At the target, where nobody has the address, its segments would leave the host."""

    code = "TM-0390"
    fix = "Move the address as well (--address), or let the processes talk over 127.0.0.1 or ::1."


class EpollTargetLost(Refused):
    """An epoll instance watches a file that no descriptor of the tree leads to any more (closed here, kept open
    elsewhere). Its registration cannot be made again."""

    code = "TM-0347"
    fix = "Remove the registration (EPOLL_CTL_DEL) before closing the descriptor."


class PendingLocalConnection(Refused):
    """A listening AF_UNIX socket has connections that nobody has accepted yet, with data in them or made from outside.
    The kernel does not show what they carry."""

    code = "TM-0348"
    fix = "Wait until the program has accepted them; try again."


class SharedDescriptors(Refused):
    """A thread has a descriptor table of its own (unshare(CLONE_FILES)). Rebuilt threads share their process's."""

    code = "TM-0349"
    fix = "There is no way around it; such programs are rare (some libraries for user-level threads)."


class UnsupportedMapping(Refused):
    """A process maps something that is not ordinary memory or a file: a device, asynchronous I/O contexts, System V
    shared memory, huge pages of a file, the ring of a packet socket."""

    code = "TM-0350"
    fix = "Configure the program not to use it, then try again."


class UnsupportedLock(Refused):
    """A lease that somebody is just breaking, a delegation, or a lock whose description the kernel prints in a way that
    is not understood. Locks by flock, fcntl and OFD and leases are kept."""

    code = "TM-0351"
    fix = "Try again: the program gives up the lease, or the kernel takes it."


class UnsupportedTerminal(Refused):
    """A pseudo terminal of the tree has a line discipline other than the usual one (SLIP, PPP, ..), or the host has no
    /dev/ptmx to open one."""

    code = "TM-0513"
    fix = "End what set the discipline; mount devpts on /dev/pts."


class UnreadKernelMessages(Refused):
    """Messages of the kernel that nobody can put into a queue again wait to be read: answers and events of netlink, or
    events of fanotify."""

    code = "TM-0514"
    fix = "Try again: the program reads them, unless it is stuck."


class TooManyDescriptors(Refused):
    """The tool itself needs one descriptor per open file of the tree while it works, and its hard limit of descriptors
    (RLIMIT_NOFILE) is lower."""

    code = "TM-0352"
    fix = "Raise the limit: `ulimit -Hn`, LimitNOFILE= or /etc/security/limits.conf."


class FileCaptureFailed(TcpmigError):
    """The kernel refused to tell the state of an open file, or told it in a form that is not understood."""

    code = "TM-0550"
    fix = "The process runs on. Report it with the log: kind, descriptor and kernel version are in the message."


class FileRebuildFailed(TcpmigError):
    """An open file could not be made again here: the kernel refused, or a limit (pipe size, datagrams queued in a local
    socket, descriptors) is lower here than where the file was captured."""

    code = "TM-0551"
    fix = "Compare the named limit of the two hosts; the process runs on where it ran."


class AddressTaken(TcpmigError):
    """The address of a listening, bound or local socket of the tree is in use here by another process."""

    code = "TM-0552"
    fix = "Stop what uses the address here (ss -lntuxp shows it), then try again."


class LockTaken(TcpmigError):
    """A file lock that a process held is held by another process here."""

    code = "TM-0553"
    fix = "Stop the other program that uses the file, then try again."


class BadFileRecord(TcpmigError):
    """The records of open files contradict each other: an index out of range, an end of a pair without the other, two
    files on one descriptor. The image is damaged, or was not made by tcpmig."""

    code = "TM-0554"
    outcome = Outcome.REFUSED
    fix = "Make the image again; do not edit it by hand."


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


# -- the state of processes and threads: refusals (TM-0320 .. 0339), failures (TM-0530 .. 0549) -----------------------


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


class NestedNamespace(Refused):
    """A process of the tree is in a namespace of its own below or beside those of the tree's root. Only namespaces
    that the whole tree is in can be made again."""

    code = "TM-0720"
    fix = "Run tcpmig inside the outer namespace (nsenter), on both hosts, and name the inner tree."


class NotTheInit(Refused):
    """The process is in a PID namespace, but is not the first process in there. When that one ends, the kernel ends all
    others of the namespace: they move together or not at all."""

    code = "TM-0721"
    fix = "Name the first process of its PID namespace (`lsns -t pid` shows it), or run tcpmig inside (nsenter)."


class NamespaceShared(Refused):
    """Processes outside of the tree are in a namespace that would move with the tree: what they share with it would be
    in two places. They may have been put there by nsenter, or by a container engine."""

    code = "TM-0722"
    fix = "End those processes, or name a process that they all descend from."


class NamespacesMoveAlone(Refused):
    """Several trees were named at once, and one of them has namespaces of its own. Such a tree moves alone."""

    code = "TM-0723"
    fix = "Name that tree alone, and the others in another command."


class NamespaceNotMade(TcpmigError):
    """The kernel refused to make a namespace for the rebuilt processes, or to give it what the original's had: a limit
    of namespaces, a missing capability, or another user namespace. Nothing is left of it."""

    code = "TM-0724"
    fix = "See the named call; compare /proc/sys/user/max_*_namespaces of the two hosts, and run tcpmig as root."


class IpcLeftOver(Refused):
    """The tree has an IPC namespace of its own, and in it is something that no process has open, and that cannot be
    moved: a shared memory segment that nobody has attached, or a POSIX message queue. It would be lost."""

    code = "TM-0725"
    fix = "Remove it inside the namespace (`ipcrm`, mq_unlink), or attach the segment."


class MountNotMovable(Refused):
    """The tree has a mount namespace of its own with a mount that cannot be made again: another root file system
    (pivot_root), a disk that only the tree has mounted, an overlay of directories that the host has not by these paths,
    a file system in memory with devices in it or covered by another mount, or mounts that propagate into other
    namespaces."""

    code = "TM-0726"
    fix = "Unmount it, or run tcpmig inside the namespaces (nsenter) on both hosts."


class NetworkNotMovable(Refused):
    """The tree has a network namespace of its own with something in it that cannot be made again: an interface other
    than a veth whose outer end is on this host, or rules of a packet filter."""

    code = "TM-0727"
    fix = "Take it away inside the namespace, or run tcpmig inside (nsenter), on both hosts."


class BridgeMissing(Refused):
    """A link of the tree's network namespace leads into a bridge, or into none, and there is no bridge of that name at
    the target."""

    code = "TM-0728"
    fix = "Name a bridge of the target: --veth NAME=BRIDGE, NAME being the link inside of the namespace."


class IdOutsideOfMap(Refused):
    """The tree has a user namespace of its own, and a process in it has a user or group ID that the namespace has no
    number for, or supplementary groups that it could not be given inside: nothing is mapped, or it came in from outside
    (nsenter). It would get another ID."""

    code = "TM-0810"
    fix = "Map the ID (newuidmap, newgidmap, `unshare --map-users`), or run tcpmig inside (nsenter), on both hosts."


class OwnedFromOutside(Refused):
    """The tree has a user namespace of its own, and another namespace of its own that does not belong to it, since it
    was made before: what root inside may do in there would be different in one that is made after."""

    code = "TM-0811"
    fix = "Make the user namespace first, or all at once, as `unshare --user --pid --mount ..` does."


class SharedInUserNamespace(Refused):
    """The tree has a user namespace of its own and no PID namespace, and two of its processes share their root and
    working directory (CLONE_FS). Each of them enters the namespace by itself, and the kernel lets none in that shares
    them."""

    code = "TM-0812"
    fix = "Start it with a PID namespace of its own, too: `unshare --user --pid --fork ..`."


class NumbersInUserNamespace(Refused):
    """A tree in a user namespace of its own was to get a PID namespace that it had not (--new-pid-namespace). That one
    would belong to the host, and processes inside could not be given their numbers in it."""

    code = "TM-0813"
    fix = "Free the numbers, or restore the image on a host where they are free."


class MemoryFilesTooLarge(Refused):
    """The tree has a mount namespace of its own with a file system in memory (tmpfs), and in it are more files, or
    larger ones, than can be read while the tree stands still."""

    code = "TM-0814"
    fix = "Remove what is not needed in it, or mount a directory of the host there instead."


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


class LocalPeer(Refused):
    """The other end of a TCP connection is held by a process of this host that is not moved. It would be left behind,
    talking to nobody."""

    code = "TM-0383"
    fix = "Name the other process as well, or decide what the moved one shall see: --local-peer close or reset."


class UnitRestarts(Refused):
    """The process belongs to a systemd service with Restart=, and is its main process as far as can be told. When the
    original ends, systemd takes it for a crash and starts a second copy, on the same files and without the address."""

    code = "TM-0384"
    fix = (
        "Give --unit-hook CMD, a program that keeps systemd from it (see docs/guide/migrating.md), or take Restart= "
        "off: a drop-in with Restart=no and `systemctl daemon-reload`."
    )


class UnitMainProcess(Refused):
    """The process is the main process of a systemd service. When it ends, systemd takes the service for stopped: it
    runs ExecStopPost=, kills what is left in the service's cgroup, and stops what is bound to the service."""

    code = "TM-0385"
    fix = "Give --unit-hook CMD, a program that deals with the unit on this host (see docs/guide/migrating.md)."


class SupervisedElsewhere(Refused):
    """The parent of the process is a program that starts its children again when they end: supervisord, runit, s6, a
    container engine. When the original ends, it starts a second copy."""

    code = "TM-0386"
    fix = "Tell the supervisor to let go of the process first, or give --unit-hook CMD, a program that does."


class StillLazy(Refused):
    """The process was restored, or moved here, with --lazy, and not all of its memory has come yet: what is missing
    cannot be copied."""

    code = "TM-0750"
    fix = "Wait until `tcpmig holds` does not show it any more; it is done in the background."


class LazyImpossible(TcpmigError):
    """The memory of a process cannot be filled while it runs (--lazy): the kernel has no userfaultfd(2) with its
    events, or does not let this program use it; or the image is from another kernel or CPU."""

    code = "TM-0751"
    fix = "Do without --lazy, or use a kernel with userfaultfd, as root with CAP_SYS_PTRACE."
