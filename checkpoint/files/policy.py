"""What the user decided about open files that cannot simply follow their process.

A policy is given to the :class:`~checkpoint.files.table.FileTable` of the source. What it decides is written into the
records: who restores the image repeats nothing.
"""

from __future__ import annotations

import enum
import posixpath
import re
from collections.abc import Iterable
from typing import Final

from checkpoint.errors import BadExternal
from checkpoint.namespaces.mounts import Mounts
from checkpoint.namespaces.ways import Ways
from tcpstate.acceptqueue import Policy as AcceptQueues
from tcpstate.slotted import dataclass

__all__ = ["NO_POLICY", "AcceptQueues", "External", "LocalPeers", "Policy", "rule_for"]

_RULE: Final = re.compile(r"(?:(?P<pid>[1-9][0-9]*):)?(?P<fd>[0-9]+)=(?P<to>.+)", re.DOTALL)
_INHERIT: Final = "inherit"
_CLOSE: Final = "close"


class LocalPeers(enum.Enum):
    """``--local-peer``: what becomes of a connection whose other end is held by a process of this host that stays.

    REFUSE  nothing is moved
    CLOSE   the moved process sees that the other end has closed: what had arrived, then the end of the stream
    RESET   it sees that the other end has reset the connection: ECONNRESET
    """

    REFUSE = "refuse"
    CLOSE = "close"
    RESET = "reset"


@dataclass(frozen=True, slots=True, kw_only=True)
class External:
    """``--external``: what becomes of the open file behind one descriptor.

    pid   the process; 0: every one
    fd    its descriptor
    path  opened in its place where the process is rebuilt; empty: none
    inherit  it becomes that descriptor of the `tcpmig restore` which rebuilds the process
    Neither path nor inherit: the process has no such descriptor any more.
    """

    pid: int
    fd: int
    path: str = ""
    inherit: bool = False

    @classmethod
    def parse(cls, text: str) -> External:
        """Of ``[PID:]FD=PATH|inherit|close``. BadExternal."""
        parts = _RULE.fullmatch(text)
        if parts is None:
            raise BadExternal("--external wants FD=PATH, FD=inherit, FD=close, or PID:FD=..", object=text)
        pid, fd, to = int(parts["pid"] or 0), int(parts["fd"]), parts["to"]
        if fd >= 1 << 30 or pid >= 1 << 22:
            raise BadExternal("there can be no such descriptor", object=text)
        if to in (_INHERIT, _CLOSE):
            return cls(pid=pid, fd=fd, inherit=to == _INHERIT)
        if not to.startswith("/") or "\0" in to:
            raise BadExternal("the path of --external must be absolute", object=text)
        return cls(pid=pid, fd=fd, path=to)

    @property
    def closes(self) -> bool:
        """Whether the descriptor is given up."""
        return not self.path and not self.inherit

    def __str__(self) -> str:
        process = f"{self.pid}:" if self.pid else ""
        return f"{process}{self.fd}={self.path or (_INHERIT if self.inherit else _CLOSE)}"


def rule_for(rules: Iterable[External], places: Iterable[tuple[int, int]]) -> External | None:
    """The rule about the open file that is at ``places`` (pid, fd); one that names the process comes first."""
    there = set(places)
    found = [rule for rule in rules if any(fd == rule.fd and rule.pid in (0, pid) for pid, fd in there)]
    return max(found, key=lambda rule: bool(rule.pid), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Decisions of the user; the default is to refuse whatever would be left behind.

    local_peer    connections to processes of this host that stay
    accept_queue  ``--accept-queue``: connections that wait to be accepted when the processes stop
    external      single descriptors
    ship        files that are open for writing travel along, unless the target has the very same ones
    shared      directories whose files are the very same at the target; None: there is no target to ask
    apart       files of those that are not
    mounts      the tree's, if they are its own: some of its file systems come along with what is in them
    """

    local_peer: LocalPeers = LocalPeers.REFUSE
    accept_queue: AcceptQueues = AcceptQueues.KEEP
    external: tuple[External, ...] = ()
    ship: bool = False
    shared: frozenset[str] | None = None
    apart: frozenset[str] = frozenset()
    mounts: Mounts | None = None

    @property
    def cuts(self) -> bool:
        """Whether what leads out of the tree is cut off, and not refused."""
        return self.local_peer is not LocalPeers.REFUSE

    def closes(self, pid: int, fd: int) -> bool:
        """Whether a process gives up a descriptor."""
        rule = rule_for(self.external, [(pid, fd)]) if self.external else None
        return rule is not None and rule.closes

    def replaces(self, places: Iterable[tuple[int, int]]) -> External | None:
        """What is put in the place of the open file that is at ``places``; None: it is moved as it is."""
        rule = rule_for(self.external, places) if self.external else None
        return None if rule is None or rule.closes else rule

    def stays_behind(self, path: str) -> bool:
        """Whether a file that is open for writing would be left behind, as far as the target has told."""
        if Ways(lambda path: path, self.mounts).carried(path):
            return False
        if self.shared is None:
            return self.ship
        return path in self.apart or posixpath.dirname(path) not in self.shared


NO_POLICY = Policy()
