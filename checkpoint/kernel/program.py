"""Programs that are executed from memory.

Source: memfd_create(2); include/uapi/linux/memfd.h (MFD_EXEC, since 6.3); sysctl vm.memfd_noexec.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from checkpoint.errors import SpawnFailed

__all__ = ["executable"]

_MFD_EXEC: Final = 0x10


def executable(name: str, content: bytes) -> int:
    """A descriptor of a program with that content, closed by exec. SpawnFailed, OSError."""
    fd = _memfd(name)
    try:
        os.write(fd, content)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _memfd(name: str) -> int:
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC | _MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise SpawnFailed(
                f"no program can be executed from memory: {error.strerror}", fix="Set vm.memfd_noexec to 0 or 1."
            ) from error
    return os.memfd_create(name, os.MFD_CLOEXEC)  # before 6.3 every one can be executed
