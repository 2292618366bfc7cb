"""The kernel's interface to open files that Python's standard library lacks: constants, structures, calls.

Calls raise OSError. Sources: include/uapi/asm-generic/fcntl.h, linux/fcntl.h, linux/kcmp.h, linux/timerfd.h,
linux/memfd.h, linux/eventpoll.h, linux/magic.h, linux/inotify.h of Linux 6.18; each name says since when it exists.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import struct
from typing import ClassVar, Final

from tcpstate.kernel import batch
from tcpstate.kernel.machine import EPOLL_EVENT, O_LARGEFILE, SYS
from tcpstate.kernel.sockets import pidfd_getfd
from tcpstate.slotted import dataclass

__all__ = [
    "CAPTURED_FLAGS",
    "EPOLL_CTL_ADD",
    "EPOLL_CTL_DEL",
    "EPOLL_CTL_MOD",
    "REOPEN_FLAGS",
    "SETTABLE_FLAGS",
    "AccessMode",
    "EpollEvent",
    "EpollFlag",
    "Fcntl",
    "FileFlag",
    "Flock",
    "Ioctl",
    "Kcmp",
    "LockType",
    "Magic",
    "OwnerType",
    "Seal",
    "TimerSpec",
    "TimerfdFlag",
    "filesystem_magic",
    "kcmp",
    "kcmp_epoll",
    "pidfd_getfd",
    "punch_hole",
    "signalfd",
    "tee",
    "timerfd_create",
    "timerfd_gettime",
    "timerfd_settime",
    "unshare_filesystem",
]


class FileFlag(enum.IntFlag):
    """``f_flags`` as this machine has them. Python's os.O_LARGEFILE is 0 on 64-bit machines."""

    ACCMODE = 0o3
    NONBLOCK = 0o4000
    APPEND = 0o2000
    ASYNC = 0o20000
    DIRECT = os.O_DIRECT
    LARGEFILE = O_LARGEFILE
    DIRECTORY = os.O_DIRECTORY
    NOFOLLOW = os.O_NOFOLLOW
    NOATIME = 0o1000000
    CLOEXEC = 0o2000000
    SYNC = 0o4010000  # __O_SYNC | O_DSYNC
    PATH = 0o10000000


#: what F_SETFL can change afterwards (fs/fcntl.c, SETFL_MASK); O_ASYNC only once the owner is known
SETTABLE_FLAGS: Final = FileFlag.APPEND | FileFlag.NONBLOCK | FileFlag.DIRECT | FileFlag.NOATIME
#: what open(2) is given again: nothing that creates or truncates, whatever an image may say
REOPEN_FLAGS: Final = (
    SETTABLE_FLAGS
    | FileFlag.ACCMODE
    | FileFlag.SYNC
    | FileFlag.LARGEFILE
    | FileFlag.DIRECTORY
    | FileFlag.NOFOLLOW
    | FileFlag.PATH
)
#: what the record keeps of the flags in fdinfo: O_CLOEXEC belongs to the descriptor, not to the description
CAPTURED_FLAGS: Final = 0xFFFFFFFF & ~int(FileFlag.CLOEXEC)


class AccessMode(enum.IntEnum):
    """The two low bits of the flags."""

    READ = 0
    WRITE = 1
    BOTH = 2
    NEITHER = 3  # a special mode for ioctl only

    @classmethod
    def of(cls, flags: int) -> AccessMode:
        """The mode in ``flags``."""
        return _MODES[flags & _ACCMODE]

    @property
    def reads(self) -> bool:
        """Whether read() is allowed."""
        return self in (AccessMode.READ, AccessMode.BOTH)

    @property
    def writes(self) -> bool:
        """Whether write() is allowed."""
        return self in (AccessMode.WRITE, AccessMode.BOTH)


# asked for several times of each open file: to make an enum of a number takes a microsecond
_ACCMODE: Final = int(FileFlag.ACCMODE)
_MODES: Final = tuple(AccessMode)


class Fcntl(enum.IntEnum):
    """Commands of fcntl(2)."""

    DUPFD_CLOEXEC = 1030
    SETFD = 2
    SETLK = 6
    SETSIG = 10
    GETSIG = 11
    SETOWN_EX = 15
    GETOWN_EX = 16
    OFD_SETLK = 37
    SETLEASE = 1024
    SETPIPE_SZ = 1031
    GETPIPE_SZ = 1032
    ADD_SEALS = 1033
    GET_SEALS = 1034


class OwnerType(enum.IntEnum):
    """Who gets the signals of an asynchronous descriptor (struct f_owner_ex)."""

    THREAD = 0
    PROCESS = 1
    GROUP = 2


class LockType(enum.IntEnum):
    """``l_type`` of struct flock."""

    READ = 0
    WRITE = 1
    NONE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Flock:
    """struct flock, 64 bit (include/uapi/asm-generic/fcntl.h). ``length`` 0 reaches to the end of the file."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<hh4xqqi4x")

    type: LockType
    start: int
    length: int

    def pack(self) -> bytes:
        """The bytes for F_SETLK and F_OFD_SETLK: positions count from the beginning of the file, l_pid is 0."""
        return self.FORMAT.pack(self.type, os.SEEK_SET, self.start, self.length, 0)


class Seal(enum.IntFlag):
    """Seals of a memfd (linux/fcntl.h)."""

    SEAL = 0x1
    SHRINK = 0x2
    GROW = 0x4
    WRITE = 0x8
    FUTURE_WRITE = 0x10  # since 5.1
    EXEC = 0x20  # since 6.3


class Ioctl(enum.IntEnum):
    """Requests of ioctl(2) on files and sockets (asm-generic/ioctls.h, sockios.h, linux/timerfd.h)."""

    TIOCOUTQ = 0x5411
    FIONREAD = 0x541B
    TFD_IOC_SET_TICKS = 0x40085400  # since 3.17, CONFIG_CHECKPOINT_RESTORE


class Magic(enum.IntEnum):
    """``f_type`` of statfs(2) for file systems whose files have no content of their own (linux/magic.h)."""

    PROC = 0x9FA0
    MQUEUE = 0x19800202  # ipc/mqueue.c
    SYSFS = 0x62656572
    CGROUP = 0x27E0EB
    CGROUP2 = 0x63677270
    DEBUGFS = 0x64626720
    TRACEFS = 0x74726163
    SECURITYFS = 0x73636673
    BPF = 0xCAFE4A11
    HUGETLBFS = 0x958458F6
    DEVPTS = 0x1CD1
    SECRETMEM = 0x5345434D
    NSFS = 0x6E736673


class Kcmp(enum.IntEnum):
    """Types of kcmp(2) (linux/kcmp.h)."""

    FILE = 0
    FILES = 2
    EPOLL_TFD = 7  # since 4.13


class EpollFlag(enum.IntFlag):
    """Events of epoll (linux/eventpoll.h)."""

    IN = 0x1
    OUT = 0x4
    ERR = 0x8
    HUP = 0x10
    EXCLUSIVE = 1 << 28
    WAKEUP = 1 << 29
    ONESHOT = 1 << 30
    ET = 1 << 31


EPOLL_CTL_ADD: Final = 1
EPOLL_CTL_DEL: Final = 2
EPOLL_CTL_MOD: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class EpollEvent:
    """struct epoll_event, which has another layout on every machine."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct(EPOLL_EVENT)

    events: int
    data: int

    def pack(self) -> bytes:
        """The bytes for epoll_ctl."""
        return self.FORMAT.pack(self.events, self.data)


class TimerfdFlag(enum.IntFlag):
    """Flags of timerfd_settime (linux/timerfd.h)."""

    ABSTIME = 1
    CANCEL_ON_SET = 2


NS_PER_SECOND: Final = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TimerSpec:
    """struct itimerspec, in nanoseconds.

    interval  period of a periodic timer, else 0
    value     time to the first expiry; 0: disarmed
    """

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<4q")

    interval: int
    value: int

    def pack(self) -> bytes:
        """The bytes for timerfd_settime."""
        return self.FORMAT.pack(*divmod(self.interval, NS_PER_SECOND), *divmod(self.value, NS_PER_SECOND))

    @classmethod
    def unpack(cls, data: bytes) -> TimerSpec:
        """What timerfd_gettime wrote."""
        interval_s, interval_ns, value_s, value_ns = cls.FORMAT.unpack(data)
        return cls(interval=interval_s * NS_PER_SECOND + interval_ns, value=value_s * NS_PER_SECOND + value_ns)


def _syscall(number: SYS, *args: int) -> int:
    try:
        return batch.syscall(number, *args)
    except OSError as error:
        raise OSError(error.errno, f"{number.name}: {error.strerror}") from None


def kcmp(pid: int, other_pid: int, type: Kcmp, first: int, second: int) -> int:
    """0 equal, 1 less, 2 greater, in an order that holds until the next boot (kernel/kcmp.c). CONFIG_KCMP."""
    return _syscall(SYS.kcmp, pid, other_pid, type, first, second)


def kcmp_epoll(pid: int, fd: int, epoll_pid: int, epoll_fd: int, target: int, nth: int) -> bool:
    """Whether ``fd`` of ``pid`` is the file that the epoll instance watches under the number ``target``; ``nth``
    counts the entries of that number, in the order of fdinfo. False also where there is no such file."""
    # struct kcmp_epoll_slot
    slot = ctypes.create_string_buffer(struct.pack("<III", epoll_fd, target, nth))
    try:
        return _syscall(SYS.kcmp, pid, epoll_pid, Kcmp.EPOLL_TFD, fd, ctypes.addressof(slot)) == 0
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EBADF):
            return False
        raise


def timerfd_create(clock: int, flags: int) -> int:
    """A new timerfd."""
    return _syscall(SYS.timerfd_create, clock, flags)


def timerfd_settime(fd: int, flags: int, spec: TimerSpec) -> None:
    """Arm or disarm."""
    data = ctypes.create_string_buffer(spec.pack())
    _syscall(SYS.timerfd_settime, fd, flags, ctypes.addressof(data), 0)


def timerfd_gettime(fd: int) -> TimerSpec:
    """Time left and interval. The kernel first brings a periodic timer that expired unread up to date."""
    data = ctypes.create_string_buffer(TimerSpec.FORMAT.size)
    _syscall(SYS.timerfd_gettime, fd, ctypes.addressof(data))
    return TimerSpec.unpack(data.raw[: TimerSpec.FORMAT.size])


def signalfd(mask: int, flags: int) -> int:
    """A new signalfd; bit n-1 of ``mask`` is signal n."""
    data = ctypes.create_string_buffer(struct.pack("<Q", mask), 8)
    return _syscall(SYS.signalfd4, -1, ctypes.addressof(data), 8, flags)


def tee(source: int, sink: int, length: int) -> int:
    """Duplicate up to ``length`` bytes of one pipe into another, without consuming them."""
    nonblock = 2  # SPLICE_F_NONBLOCK
    return _syscall(SYS.tee, source, sink, length, nonblock)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """A hole in a file, whose size stays (fallocate(2))."""
    keep_size, punch = 1, 2  # linux/falloc.h
    _syscall(SYS.fallocate, fd, keep_size | punch, offset, length)


def unshare_filesystem() -> None:
    """Give the calling thread its own root, working directory and umask (CLONE_FS)."""
    clone_fs = 0x200
    _syscall(SYS.unshare, clone_fs)


def filesystem_magic(fd: int) -> int:
    """``f_type`` of the file system that the file lies on (statfs(2); os.statvfs does not tell)."""
    data = ctypes.create_string_buffer(120)  # struct statfs
    if batch.libc.fstatfs(fd, data):
        error = ctypes.get_errno()
        raise OSError(error, f"fstatfs: {os.strerror(error)}")
    return int(struct.unpack_from("<q", data)[0])
