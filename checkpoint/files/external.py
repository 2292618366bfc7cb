"""Standard streams that lead out of the tree: a terminal, or a pipe or local socket to a process that stays.

They become /dev/null, with a warning (a shell's pipeline, the journal of a service manager, the terminal that a server
was started from). Only descriptors 0, 1 and 2 are treated so; elsewhere such a file is refused by name.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from checkpoint.files.abi import FileFlag
from checkpoint.files.base import FdView, OpenFile, register, set_flags
from checkpoint.files.pipe import other_end_outside
from checkpoint.files.unixdiag import peer_outside

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["External", "is_terminal"]

#: major numbers of terminals: tty and console (4, 5), pseudo terminals (136..143), serial lines of common drivers
_TERMINALS: Final = frozenset({4, 5, *range(136, 144), 204, 229})
_PTMX: Final = (5, 2)


def is_terminal(view: FdView) -> bool:
    """Whether the file is a terminal (not the master side of one)."""
    number = os.major(view.stat.st_rdev), os.minor(view.stat.st_rdev)
    return stat.S_ISCHR(view.stat.st_mode) and number[0] in _TERMINALS and number != _PTMX


def _leaves(view: FdView) -> bool:
    if not view.is_standard_stream or view.flags & FileFlag.PATH:
        return False
    if is_terminal(view):
        return True
    if view.link.startswith("pipe:"):
        return bool(other_end_outside(view))
    return view.link.startswith("socket:") and peer_outside(view)


@register("external", match=_leaves)
@dataclass(frozen=True, slots=True, kw_only=True)
class External(OpenFile):
    """A standard stream whose other end stays behind.

    link    what it was: ``/dev/pts/3``, ``pipe:[77]``
    stream  the lowest descriptor number of it
    """

    link: str
    stream: int

    @classmethod
    def examine(cls, view: FdView) -> str:
        return f"{view.link} leads out of the tree: it becomes /dev/null at restore"

    @classmethod
    def capture(cls, view: FdView) -> Self:
        return cls(link=view.link, stream=min(fd for _, fd in view.places), **view.common())

    def rebuild(self, host: Rebuilder) -> int:
        host.warn(f"standard stream {self.stream} ({self.link}) is /dev/null now")
        # a socket or a terminal is open both ways
        fd = os.open(os.devnull, self.access | os.O_CLOEXEC)
        set_flags(fd, self.flags & ~FileFlag.DIRECT)
        return fd
