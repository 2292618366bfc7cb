"""Files that do not follow their process, and have something else put in their place.

Standard streams that lead out of the tree (a terminal, or a pipe or local socket to a process that stays: a shell's
pipeline, the journal of a service manager) become /dev/null, with a warning. With ``--external`` the user says what any
descriptor becomes: a path at the target, or a descriptor of the `tcpmig restore` that rebuilds the process. Elsewhere
such a file is refused by name.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import stat
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from checkpoint.errors import ExternalNotHere, FileRebuildFailed
from checkpoint.files.abi import REOPEN_FLAGS, FileFlag
from checkpoint.files.base import FdView, OpenFile, register, set_flags
from checkpoint.files.pipe import other_end_outside
from checkpoint.files.policy import External as Rule
from checkpoint.files.policy import rule_for
from checkpoint.files.pty import is_slave_of_tree
from checkpoint.files.unixdiag import peer_outside
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["External", "is_terminal"]

#: major numbers of terminals: tty and console (4, 5), pseudo terminals (136..143), serial lines of common drivers
_TERMINALS: Final = frozenset({4, 5, *range(136, 144), 204, 229})
_PTMX: Final = (5, 2)
_NEW_FILE: Final = 0o600


def is_terminal(view: FdView) -> bool:
    """Whether the file is a terminal (not the master side of one)."""
    number = os.major(view.stat.st_rdev), os.minor(view.stat.st_rdev)
    return stat.S_ISCHR(view.stat.st_mode) and number[0] in _TERMINALS and number != _PTMX


def _is_replaced(view: FdView) -> bool:
    return view.table.policy.replaces(view.places) is not None or _leaves(view)


def _leaves(view: FdView) -> bool:
    if not view.is_standard_stream or view.flags & FileFlag.PATH:
        return False
    if is_terminal(view):
        return not is_slave_of_tree(view)
    if view.link.startswith("pipe:"):
        return bool(other_end_outside(view))
    return view.link.startswith("socket:") and peer_outside(view)


@register("external", match=_is_replaced)
@dataclass(frozen=True, slots=True, kw_only=True)
class External(OpenFile):
    """A file with something else in its place.

    link     what it was: ``/dev/pts/3``, ``pipe:[77]``
    stream   the lowest descriptor number of it
    path     what is opened instead, at the target
    inherit  instead of a path: the descriptor of that number of the tool that rebuilds it; -1: none
    """

    foreseeable: ClassVar[bool] = True

    link: str
    stream: int
    path: str = os.devnull
    inherit: int = -1

    def validate(self) -> None:
        if not self.path.startswith("/") or "\0" in self.path or not -1 <= self.inherit < 1 << 30:
            raise ValueError("path or descriptor of an external file out of range")

    @classmethod
    def examine(cls, view: FdView) -> str:
        rule = view.table.policy.replaces(view.places)
        if rule is None:
            return f"{view.link} leads out of the tree: it becomes /dev/null at restore"
        return f"{view.link} becomes {rule.path or 'the descriptor of that number of tcpmig restore'}"

    @classmethod
    def capture(cls, view: FdView) -> Self:
        stream = min(fd for _, fd in view.places)
        rule = view.table.policy.replaces(view.places)
        return cls(link=view.link, stream=stream, **_instead(rule), **view.common() | {"locks": ()})

    def check(self, host: Rebuilder) -> str:
        told = self._told(host)
        if told.inherit < 0:
            told._examine_path()
        elif not _inherited(told.inherit):
            raise ExternalNotHere("this descriptor was not passed to tcpmig", object=f"fd {told.inherit}")
        return ""

    def _told(self, host: Rebuilder) -> External:
        """With what the user of this host says."""
        rule = rule_for(host.external, host.places(self)) if host.external else None
        return self if rule is None or rule.closes else dataclasses.replace(self, **_instead(rule))

    def _examine_path(self) -> None:
        try:
            mode = os.stat(self.path).st_mode
        except FileNotFoundError:
            if self.access.writes and os.path.isdir(os.path.dirname(self.path)):
                return  # it will be made
            raise ExternalNotHere("there is no such file here", object=self.path) from None
        except OSError as error:
            raise ExternalNotHere(f"it cannot be looked at: {error.strerror}", object=self.path) from None
        if stat.S_ISDIR(mode) or stat.S_ISSOCK(mode):
            raise ExternalNotHere("a directory or socket cannot be put in the place of an open file", object=self.path)

    def rebuild(self, host: Rebuilder) -> int:
        told = self._told(host)
        if told.inherit >= 0:
            if not _inherited(told.inherit):
                raise ExternalNotHere("this descriptor was not passed to tcpmig", object=f"fd {told.inherit}")
            return host.duplicate(told.inherit)
        told._examine_path()
        if told.path == os.devnull and self.path == os.devnull:
            host.warn(f"standard stream {self.stream} ({self.link}) is /dev/null now")
        # a socket or a terminal is open both ways; a fifo must not wait for its other end
        flags = self.access | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        if self.access.writes and told.path != os.devnull:
            flags |= os.O_CREAT | os.O_APPEND
        try:
            fd = os.open(told.path, flags & (REOPEN_FLAGS | os.O_CLOEXEC | os.O_NOCTTY | os.O_CREAT), _NEW_FILE)
        except OSError as error:
            raise FileRebuildFailed(f"external file: {error.strerror}", object=told.path) from error
        set_flags(fd, (self.flags & ~FileFlag.DIRECT) | (flags & os.O_APPEND))
        return fd


def _instead(rule: Rule | None) -> dict[str, Any]:
    if rule is None:
        return {}
    return {"inherit": rule.fd} if rule.inherit else {"path": rule.path, "inherit": -1}


def _inherited(fd: int) -> bool:
    """Whether our own descriptor came from whoever started us: what we open ourselves is close-on-exec."""
    try:
        return not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    except OSError:
        return False
