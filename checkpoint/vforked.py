"""Processes that wait in vfork(2): once seized such a thread could neither be stopped nor let go.

Source: kernel/fork.c (wait_for_vfork_done).
"""

from __future__ import annotations

import errno

from checkpoint import offspring, procfs
from checkpoint.kernel.kcmp import KcmpType, kcmp

__all__ = ["vfork_child"]


def vfork_child(pid: int) -> int | None:
    """The child that has borrowed a process's memory while a thread of that waits in the kernel; None if there is
    none."""
    for child in offspring.children(pid):
        try:
            if kcmp(pid, child, KcmpType.VM) != 0:
                continue
        except ProcessLookupError:
            continue  # the child has ended, or we have
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EPERM):
                return None  # this kernel cannot tell; or not us, which the seizing will find
            raise
        if any(procfs.read_stat(pid, tid).state == "D" for tid in procfs.threads(pid)):
            return child
    return None
