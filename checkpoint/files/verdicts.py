"""What will become of each open file of some processes, told before anything is stopped.

Every descriptor of every process gets a verdict. Descriptors are looked at through duplicates that are closed again
at once; nothing is read from them, no state is changed. What only shows in the stop (messages in flight, the queue of
a listener) is refused there.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint.errors import FileCaptureFailed
from checkpoint.files.base import FdView, kind_name
from checkpoint.files.kinds import kind_for
from checkpoint.files.table import FileTable
from checkpoint.verdict import Status, Verdict
from tcpstate.errors import TcpmigError

__all__ = ["verdicts"]

#: what looking at something that has just gone gives
_GONE = (errno.ENOENT, errno.ESRCH, errno.EBADF)


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int


def verdicts(pids: Sequence[int]) -> list[Verdict]:
    """One verdict per descriptor of each process, and one for a table that cannot be rebuilt. Processes that end
    meanwhile are left out."""
    found: list[Verdict] = []
    with FileTable(live=True) as table:
        for pid in pids:
            try:
                table.add_process(_Process(pid))
            except (FileNotFoundError, ProcessLookupError):
                continue
            except TcpmigError as error:
                found.append(Verdict.refuse(error, "descriptor table"))
        for view in table.entries:
            found += _judge(view)
    return found


def _judge(view: FdView) -> list[Verdict]:
    """The verdicts on one description: one per descriptor that leads to it."""
    kind = "open file"
    try:
        cls = kind_for(view)
        kind = kind_name(cls)
        warning = cls.examine(view)
    except TcpmigError as error:
        one = Verdict.refuse(error, kind)
    except OSError as error:
        # closed, or its process ended, while we looked
        if error.errno in _GONE:
            return []
        failed = FileCaptureFailed(f"it cannot be looked at: {error}", object=view.object)
        one = Verdict.refuse(failed, kind)
    else:
        one = Verdict(
            subject=view.object, kind=kind, status=Status.WARN if warning else Status.OK, text=warning or view.link
        )
    return [dataclasses.replace(one, subject=f"pid {pid} fd {fd}") for pid, fd in view.places]
