"""userfaultfd(2), for two purposes: asynchronous write protection, which nobody has to serve (tracking of writes), and
missing pages, which somebody else brings when they are touched (lazy memory).

Source: include/uapi/linux/userfaultfd.h; mm/userfaultfd.c, fs/userfaultfd.c. UFFD_FEATURE_WP_ASYNC since Linux 6.7, the
events since 4.11.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import struct

from tcpstate.slotted import dataclass

__all__ = [
    "CREATE_FLAGS",
    "CREATE_SERVED",
    "MESSAGE_SIZE",
    "Event",
    "Feature",
    "Message",
    "Mode",
    "copy",
    "enable",
    "register",
    "unregister",
    "wake",
    "zero",
]


class _Flag(enum.IntFlag):
    """Flags of the call."""

    USER_MODE_ONLY = 1
    NONBLOCK = 0o4000
    CLOEXEC = 0o2000000


#: what userfaultfd(2) is called with: asynchronous protection is lifted by the kernel itself, in its own accesses too
CREATE_FLAGS = int(_Flag.USER_MODE_ONLY | _Flag.CLOEXEC)
#: the same for pages that are brought: system calls that touch them wait, too (with USER_MODE_ONLY they fail, EFAULT);
#: and only one that does not block can be polled
CREATE_SERVED = int(_Flag.NONBLOCK | _Flag.CLOEXEC)


class Feature(enum.IntFlag):
    """UFFD_FEATURE_*."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    EVENT_UNMAP = 1 << 6
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    WP_ASYNC = 1 << 15


class Mode(enum.IntFlag):
    """UFFDIO_REGISTER_MODE_*."""

    MISSING = 1 << 0
    WP = 1 << 1


class Event(enum.IntEnum):
    """UFFD_EVENT_*: what a message tells."""

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


_API = 0xAA
_UFFDIO_API = 0xC018AA3F  # _IOWR(0xAA, 0x3F, struct uffdio_api)
_UFFDIO_REGISTER = 0xC020AA00  # _IOWR(0xAA, 0x00, struct uffdio_register)
_UFFDIO_UNREGISTER = 0x8010AA01  # _IOR(0xAA, 0x01, struct uffdio_range)
_UFFDIO_WAKE = 0x8010AA02  # _IOR(0xAA, 0x02, struct uffdio_range)
_UFFDIO_COPY = 0xC028AA03  # _IOWR(0xAA, 0x03, struct uffdio_copy)
_UFFDIO_ZEROPAGE = 0xC020AA04  # _IOWR(0xAA, 0x04, struct uffdio_zeropage)
_API_ARGUMENT = struct.Struct("<QQQ")  # api, features, ioctls
_REGISTER_ARGUMENT = struct.Struct("<QQQQ")  # start, len, mode, ioctls
_RANGE_ARGUMENT = struct.Struct("<QQ")  # start, len
_COPY_ARGUMENT = struct.Struct("<QQQQq")  # dst, src, len, mode, copy
_ZERO_ARGUMENT = struct.Struct("<QQQq")  # start, len, mode, zeropage
_MESSAGE = struct.Struct("<B7xQQQ")  # struct uffd_msg: event, and three words of the event's own
#: bytes of one message
MESSAGE_SIZE = _MESSAGE.size


@dataclass(frozen=True, slots=True)
class Message:
    """What was read from a descriptor.

    PAGEFAULT  second: the address
    FORK       first: a descriptor, in the process that has read this, of the child's memory
    REMAP      first, second: from where to where; third: bytes
    REMOVE     first, second: start and end of what was given back (MADV_DONTNEED and the like)
    UNMAP      first, second: start and end
    """

    event: Event
    first: int
    second: int
    third: int

    @classmethod
    def parse(cls, data: bytes | memoryview) -> Message | None:
        """None: there is no message. ValueError for an event that was not asked for."""
        event, first, second, third = _MESSAGE.unpack(data)
        return cls(Event(event), first, second, third) if event else None

    @property
    def descriptor(self) -> int:
        """Of FORK."""
        return self.first & 0xFFFFFFFF  # a __u32


def enable(fd: int, features: Feature) -> None:
    """The first word to a new descriptor. OSError: EINVAL if the kernel lacks one of the features; EPERM for EVENT_FORK
    without CAP_SYS_PTRACE."""
    fcntl.ioctl(fd, _UFFDIO_API, _API_ARGUMENT.pack(_API, features, 0))


def register(fd: int, start: int, end: int, mode: Mode) -> None:
    """Put the mappings in [start, end) of the process that made ``fd`` under it; again does no harm.

    OSError: EINVAL if nothing, or something unfit, is mapped there, EBUSY if another descriptor has it, ESRCH if the
    memory is gone.
    """
    fcntl.ioctl(fd, _UFFDIO_REGISTER, _REGISTER_ARGUMENT.pack(start, end - start, mode, 0))


def unregister(fd: int, start: int, end: int) -> None:
    """End that, and remove the marks of its pages. OSError: EINVAL if nothing is mapped there, ESRCH."""
    fcntl.ioctl(fd, _UFFDIO_UNREGISTER, _RANGE_ARGUMENT.pack(start, end - start))


def wake(fd: int, start: int, end: int) -> None:
    """Let who waits for pages in [start, end) try again: what is still missing is told again."""
    fcntl.ioctl(fd, _UFFDIO_WAKE, _RANGE_ARGUMENT.pack(start, end - start))


def copy(fd: int, to: int, source: int, length: int) -> int:
    """Bring missing pages, and wake who waits for them; the bytes that were brought, fewer than ``length`` if a page
    that is there already came in between.

    to      address in the process that made ``fd``, where one mapping has all ``length`` bytes
    source  address in our memory

    OSError: EEXIST if the first page is there, ENOENT if the bytes are not in one mapping of ``fd``, EAGAIN if a
    message about a change of mappings has to be read first, ESRCH if the memory is gone.
    """
    return _bring(fd, _UFFDIO_COPY, bytearray(_COPY_ARGUMENT.pack(to, source, length, 0, 0)), _COPY_ARGUMENT)


def zero(fd: int, to: int, length: int) -> int:
    """As :func:`copy`, of zeros."""
    return _bring(fd, _UFFDIO_ZEROPAGE, bytearray(_ZERO_ARGUMENT.pack(to, length, 0, 0)), _ZERO_ARGUMENT)


def _bring(fd: int, request: int, argument: bytearray, shape: struct.Struct) -> int:
    try:
        fcntl.ioctl(fd, request, argument)
    except OSError as error:
        # the kernel writes its answer also when it fails: EAGAIN stands for a part as well
        brought: int = shape.unpack(argument)[-1]
        if error.errno == errno.EAGAIN and brought > 0:
            return brought
        raise
    done: int = shape.unpack(argument)[-1]
    return done
