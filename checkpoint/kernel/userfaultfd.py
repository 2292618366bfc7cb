"""userfaultfd(2), as far as tracking of writes needs it: asynchronous write protection, which nobody has to serve.

Source: include/uapi/linux/userfaultfd.h; mm/userfaultfd.c, fs/userfaultfd.c. UFFD_FEATURE_WP_ASYNC since Linux 6.7.
"""

from __future__ import annotations

import enum
import fcntl
import struct

__all__ = ["CREATE_FLAGS", "Feature", "Mode", "enable", "register", "unregister"]


class _Flag(enum.IntFlag):
    """Flags of the call."""

    USER_MODE_ONLY = 1
    CLOEXEC = 0o2000000


#: what userfaultfd(2) is called with: asynchronous protection is lifted by the kernel itself, in its own accesses too
CREATE_FLAGS = int(_Flag.USER_MODE_ONLY | _Flag.CLOEXEC)


class Feature(enum.IntFlag):
    """UFFD_FEATURE_*."""

    PAGEFAULT_FLAG_WP = 1 << 0
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    WP_ASYNC = 1 << 15


class Mode(enum.IntFlag):
    """UFFDIO_REGISTER_MODE_*."""

    WP = 1 << 1


_API = 0xAA
_UFFDIO_API = 0xC018AA3F  # _IOWR(0xAA, 0x3F, struct uffdio_api)
_UFFDIO_REGISTER = 0xC020AA00  # _IOWR(0xAA, 0x00, struct uffdio_register)
_UFFDIO_UNREGISTER = 0x8010AA01  # _IOR(0xAA, 0x01, struct uffdio_range)
_API_ARGUMENT = struct.Struct("<QQQ")  # api, features, ioctls
_REGISTER_ARGUMENT = struct.Struct("<QQQQ")  # start, len, mode, ioctls
_RANGE_ARGUMENT = struct.Struct("<QQ")  # start, len


def enable(fd: int, features: Feature) -> None:
    """The first word to a new descriptor. OSError: EINVAL if the kernel lacks one of the features."""
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
