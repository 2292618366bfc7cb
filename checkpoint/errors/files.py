"""Errors of open files and sockets: refusals before the stop, failures of capture and rebuild."""

from __future__ import annotations

from checkpoint.errors.tree import Refused
from tcpstate.errors import Outcome, TcpmigError

__all__ = [
    "AddressTaken",
    "BadExternal",
    "BadFileRecord",
    "BadPathMap",
    "EpollTargetLost",
    "ExternalNotHere",
    "FileCaptureFailed",
    "FileDiffers",
    "FileMissing",
    "FileNotShared",
    "FileRebuildFailed",
    "FileUnreachable",
    "InterfaceMissing",
    "LockTaken",
    "PairWithoutAddress",
    "PeerOutsideTree",
    "PendingLocalConnection",
    "SharedDescriptors",
    "ShipWouldOverwrite",
    "SocketHeldOutside",
    "TooManyDescriptors",
    "UnreadKernelMessages",
    "UnsupportedFile",
    "UnsupportedLock",
    "UnsupportedMapping",
    "UnsupportedProtocol",
    "UnsupportedTerminal",
]


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
