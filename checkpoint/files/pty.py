"""Pseudo terminals whose master is in the tree: both ends, what waits in them, and whose controlling terminal they are.

A session's controlling terminal is inherited by birth only, so it is given to the session's leader while the tree is
grown (:mod:`checkpoint.grow`); the pair that was opened for it is taken here.  The foreground group is set by the
leader once all groups stand (:mod:`checkpoint.files.install`).

A terminal whose master stays outside is another matter: :mod:`checkpoint.files.external`.

Sources: drivers/tty/pty.c, tty_jobctrl.c, n_tty.c; fdinfo ``tty-index``.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import select
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Self

from checkpoint.errors import BadFileRecord, UnsupportedTerminal
from checkpoint.files.abi import FileFlag, Magic, filesystem_magic
from checkpoint.files.base import FdView, OpenFile, register, set_flags
from checkpoint.files.terminal import (
    PTMX,
    Terminal,
    Termios,
    TtyCall,
    give_word,
    number_of,
    open_pair,
    open_slave,
    word,
)
from checkpoint.kernel.mountinfo import read_mounts
from checkpoint.namespaces.mounts import TERMINALS
from checkpoint.namespaces.ways import way_of
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["PtyMaster", "PtySlave", "is_slave_of_tree", "masters_of"]

_OWN: Final = "/dev/tty"
_PTMX: Final = (5, 2)
_WINDOW: Final = 8  # struct winsize
_MOST_WAITING: Final = 1 << 20
_NOTHING: Final = Terminal()


def is_master(view: FdView) -> bool:
    """Whether the file is the master of a pseudo terminal."""
    found = view.stat
    return stat.S_ISCHR(found.st_mode) and (os.major(found.st_rdev), os.minor(found.st_rdev)) == _PTMX


def _slaves(view: FdView) -> list[FdView]:
    """The descriptions of the tree that are slaves of this master."""
    return [
        other
        for other in view.table.entries
        if other is not view and stat.S_ISCHR(other.stat.st_mode) and other.dup >= 0 and not is_master(other)
        if not other.flags & FileFlag.PATH and _belong(view, other)
    ]


def _belong(master: FdView, slave: FdView) -> bool:
    """Whether they are the two sides of one pseudo terminal: others that are mounted have the same numbers."""
    number = number_of(slave.dup)
    if number is None or number_of(master.dup) != number:
        return False
    return slave.link == _OWN or _instance(slave) in (None, _instance(master))


def _instance(view: FdView) -> int | None:
    """The device of the mounted pseudo terminals that a master or slave belongs to; None: it cannot be told."""
    if filesystem_magic(view.dup) == Magic.DEVPTS:
        return view.stat.st_dev
    try:
        # a node of the number of ptmx leads to those that are mounted beside it (fs/devpts/inode.c, devpts_acquire)
        return os.stat(f"{way_of(view.pid)}{os.path.dirname(view.link)}/pts").st_dev
    except OSError:
        return None


def _is_elsewhere(view: FdView) -> bool:
    """Whether a master belongs to others than those that its mount namespace shows."""
    way = way_of(view.pid)
    if not way:
        return False
    places = [one.at for one in read_mounts(view.pid) if one.kind == TERMINALS]
    return not places or _instance(view) != os.stat(way + places[0]).st_dev


def is_slave_of_tree(view: FdView) -> bool:
    """Whether the file is a terminal whose master is in the tree."""
    if not stat.S_ISCHR(view.stat.st_mode) or view.dup < 0 or view.flags & FileFlag.PATH or is_master(view):
        return False
    if number_of(view.dup) is None:
        return False
    return any(is_master(other) and _belong(other, view) for other in view.table.entries if other.dup >= 0)


def masters_of(pids: list[int]) -> set[int]:
    """The numbers of the pseudo terminals whose masters these processes have."""
    found = set()
    for pid in pids:
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except (FileNotFoundError, ProcessLookupError):
            continue
        for name in names:
            try:
                if os.readlink(f"/proc/{pid}/fd/{name}").endswith("/ptmx"):
                    with open(f"/proc/{pid}/fdinfo/{name}", encoding="ascii") as lines:
                        found |= {int(line.split()[1]) for line in lines if line.startswith("tty-index:")}
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


@register("terminal master", mode=stat.S_IFCHR, match=is_master)
@dataclass(frozen=True, slots=True, kw_only=True)
class PtyMaster(OpenFile):
    """The master side of a pseudo terminal.

    number      N of /dev/pts/N
    modes       termios
    window      struct winsize: rows, columns, pixels
    locked      the slave cannot be opened yet
    packets     reads begin with a byte of control (TIOCPKT)
    exclusive   the slave cannot be opened any more (TIOCEXCL)
    opened      somebody has had the slave open
    closed      and all have closed it
    node        (uid, gid, mode) of /dev/pts/N
    session     whose controlling terminal it is; 0: nobody's
    foreground  the process group that may read
    waiting     what waits to be read, in both directions
    """

    number: int
    modes: Termios
    window: bytes
    locked: bool = False
    packets: bool = False
    exclusive: bool = False
    opened: bool = False
    closed: bool = False
    node: tuple[int, int, int] | None = None
    session: int = 0
    foreground: int = 0
    waiting: Terminal = _NOTHING

    def validate(self) -> None:
        size = sum(map(len, (self.waiting.output, self.waiting.rest, *self.waiting.lines)))
        if len(self.window) != _WINDOW or not 0 <= self.number < 1 << 23 or size > _MOST_WAITING:
            raise ValueError("pseudo terminal out of range")
        if not (0 <= self.session < 1 << 22 and 0 <= self.foreground < 1 << 22):
            raise ValueError("session or foreground group of a pseudo terminal out of range")
        if self.node is not None and (min(self.node) < 0 or self.node[2] > 0o777):
            raise ValueError("owner or mode of a pseudo terminal out of range")

    def renumbered(self, number: Callable[[int], int]) -> Self:
        kept = self._with_parts("renumbered", number)
        return dataclasses.replace(kept, session=number(self.session), foreground=number(self.foreground))

    @classmethod
    def examine(cls, view: FdView) -> str:
        if word(view.dup, TtyCall.TIOCGETD):
            raise UnsupportedTerminal("terminal with a line discipline of its own (TIOCSETD)", object=view.object)
        if _is_elsewhere(view):
            raise UnsupportedTerminal("pseudo terminal of others (devpts) than those of its mounts", object=view.object)
        return ""

    @classmethod
    def capture(cls, view: FdView) -> Self:
        cls.examine(view)
        fd = view.dup
        slaves = _slaves(view)
        closed = not slaves and _hung_up(fd)
        locked = bool(word(fd, TtyCall.TIOCGPTLCK))
        exclusive = bool(word(fd, TtyCall.TIOCGEXCL))
        node, waiting = None, Terminal()
        if slaves:
            # a description of our own, which does not block; with TIOCEXCL root may still have it
            slave = open_slave(fd, os.O_RDWR | os.O_NONBLOCK)
            try:
                found = os.fstat(slave)
                node = found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)
                waiting = Terminal.take(fd, slave)
            finally:
                os.close(slave)
        elif closed:
            slave = open_slave(fd, os.O_RDWR | os.O_NONBLOCK)
            try:
                waiting = Terminal.take(fd, slave)
            finally:
                os.close(slave)
        return cls(
            number=number_of(fd) or 0,
            modes=Termios.of(fd),
            window=fcntl.ioctl(fd, TtyCall.TIOCGWINSZ, bytes(_WINDOW)),
            locked=locked,
            packets=bool(word(fd, TtyCall.TIOCGPKT)),
            exclusive=exclusive,
            opened=bool(slaves) or closed,
            closed=closed,
            node=node,
            session=_asked(fd, TtyCall.TIOCGSID),
            foreground=_asked(fd, TtyCall.TIOCGPGRP),
            waiting=waiting,
            **view.common(),
        )

    def check(self, host: Rebuilder) -> str:
        if not (host.path.terminals or os.path.exists(PTMX)):
            raise UnsupportedTerminal("there is no /dev/ptmx here", object=f"/dev/pts/{self.number}")
        return ""

    def rebuild(self, host: Rebuilder) -> int:
        pair = host.terminals.get(self.number)
        fd = open_pair(self.number, host.warn, host.path.ptmx) if pair is None else host.duplicate(pair.master)
        fcntl.ioctl(fd, TtyCall.TIOCSWINSZ, self.window)
        self.modes.give(fd)
        if self.opened:
            slave = open_slave(fd, os.O_RDWR | os.O_NONBLOCK)
            if self.node is not None:
                os.fchown(slave, *self.node[:2])
                os.fchmod(slave, self.node[2])
            self.waiting.put(fd, slave, self.modes)
            if self.exclusive:
                fcntl.ioctl(slave, TtyCall.TIOCEXCL)
            if self.closed:
                os.close(slave)
            else:
                # as long as it is open, the terminal does not count as hung up
                host.at_end(lambda: os.close(slave))
        if self.packets:
            give_word(fd, TtyCall.TIOCPKT, 1)
        if self.locked:
            give_word(fd, TtyCall.TIOCSPTLCK, 1)
        set_flags(fd, self.flags)
        return fd


@register("terminal", mode=stat.S_IFCHR, match=is_slave_of_tree)
@dataclass(frozen=True, slots=True, kw_only=True)
class PtySlave(OpenFile):
    """The slave side of a pseudo terminal, its master in the tree.

    number  N of /dev/pts/N
    own     it was opened as /dev/tty
    """

    number: int
    own: bool = False

    @classmethod
    def capture(cls, view: FdView) -> Self:
        return cls(number=number_of(view.dup) or 0, own=view.link == _OWN, **view.common())

    def rebuild(self, host: Rebuilder) -> int:
        for index, record in enumerate(host.files):
            if isinstance(record, PtyMaster) and record.number == self.number:
                master = host.descriptor(index)
                if record.locked:
                    give_word(master, TtyCall.TIOCSPTLCK, 0)
                fd = open_slave(master, self.access | self.flags & (os.O_NONBLOCK | FileFlag.LARGEFILE))
                if record.locked:
                    give_word(master, TtyCall.TIOCSPTLCK, 1)
                set_flags(fd, self.flags)
                return fd
        raise BadFileRecord("a terminal without its master", object=f"/dev/pts/{self.number}")


def _hung_up(master: int) -> bool:
    poll = select.poll()
    poll.register(master, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def _asked(master: int, request: TtyCall) -> int:
    """A session or group; 0 if there is none."""
    try:
        return max(0, word(master, request))
    except OSError:
        return 0
