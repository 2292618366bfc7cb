"""The children of a process.

/proc tells them by thread, in a file for each.  Of a process with many threads the kernel's own notes tell first who
has any: mostly one.
"""

from __future__ import annotations

import os
from typing import Final

from checkpoint import procfs
from checkpoint.kernel import threaditer

__all__ = ["children"]

#: threads from which on it is quicker
_MANY: Final = 16


def children(pid: int) -> list[int]:
    """Those of all threads of a process, zombies too. Exact only while it is stopped. NoSuchProcess."""
    parents = _parents(pid)
    if parents is None:
        return procfs.children(pid)
    return [child for tid in sorted(parents) for child in procfs.children_of(pid, tid)]


def _parents(pid: int) -> list[int] | None:
    """The threads that have children; None: that is not told, or not worth it."""
    try:
        if os.stat(f"/proc/{pid}/task").st_nlink < _MANY:
            return None
    except OSError:
        return None
    depth = len(procfs.read_status(pid)["NSpid"].split())
    rows = threaditer.rows(pid) if depth <= 2 else None
    if not rows:
        return None
    return [row.inner if depth == 1 else row.outer for row in rows if row.bears]
