"""epoll: a set of watched files.

Source: fs/eventpoll.c; fdinfo lines ``tfd: N events: MASK data: X pos:P ino:I sdev:D`` (all but N hexadecimal). An
entry's key is the pair (file, number that it had when it was added). The number may lead elsewhere by now: the
descriptor was duplicated and the first one closed. kcmp(KCMP_EPOLL_TFD) tells which file is meant.

The registrations are not made here but by calls injected in the new process (:mod:`checkpoint.files.install`): there
the number is right, and a signalfd is watched for the right process.
"""

from __future__ import annotations

import dataclasses
import os
import re
import select
import stat
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from checkpoint.errors import BadFileRecord, EpollTargetLost, FileCaptureFailed
from checkpoint.files.abi import EpollFlag, kcmp_epoll
from checkpoint.files.base import FdView, OpenFile, register, set_flags
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["EPOLL_LINK", "Entry", "Epoll", "EpollWatch", "entry_of", "fired"]

EPOLL_LINK: Final = "anon_inode:[eventpoll]"
_LINE: Final = re.compile(
    r"tfd:\s*(\d+)\s+events:\s*([0-9a-f]+)\s+data:\s*([0-9a-f]+)\s+pos:-?\w+\s+ino:([0-9a-f]+)\s+sdev:([0-9a-f]+)"
)
#: what stays of an entry that has fired (EP_PRIVATE_BITS of fs/eventpoll.c)
_PRIVATE: Final = int(EpollFlag.EXCLUSIVE | EpollFlag.WAKEUP | EpollFlag.ONESHOT | EpollFlag.ET)
_ONESHOT: Final = int(EpollFlag.ONESHOT)
#: the minor number's bits in the kernel's dev_t
_MINOR_BITS: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class EpollWatch:
    """One entry of an epoll instance.

    number  descriptor number under which the file was added
    pid     process in which it is added again
    file    index of the watched file
    events  mask; one without any event is a one-shot entry that has fired
    data    the 64 bits that epoll_wait hands back
    """

    number: int
    pid: int
    file: int
    events: int
    data: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < 1 << 30 or self.file < 0 or self.pid <= 0:
            raise ValueError("number, process or file of an epoll entry out of range")
        if not 0 <= self.events < 1 << 32 or not 0 <= self.data < 1 << 64:
            raise ValueError("events or data of an epoll entry out of range")

    def renumbered(self, number: Callable[[int], int]) -> EpollWatch:
        """In the process as another PID namespace numbers it."""
        return dataclasses.replace(self, pid=number(self.pid))


def fired(watch: EpollWatch) -> bool:
    """Whether it is a one-shot entry that has fired."""
    return bool(watch.events & _ONESHOT) and not watch.events & ~_PRIVATE


@register("epoll", link=re.escape(EPOLL_LINK))
@dataclass(frozen=True, slots=True, kw_only=True)
class Epoll(OpenFile):
    """One open epoll instance. Each of its watches is added again in the process that it names.

    told     it stands already, made before the stop with what that entry of AheadFiles.epolls watches; -1: it does not
    dropped  numbers of those watches that it has not any more; ``watches`` are those that it has besides
    """

    watches: tuple[EpollWatch, ...]
    told: int = -1
    dropped: tuple[int, ...] = ()

    @classmethod
    def examine(cls, view: FdView) -> str:
        if not view.table.live:
            _watches(view)
        return ""

    @classmethod
    def capture(cls, view: FdView) -> Self:
        if view.table.live:
            view.refresh()
        ahead = view.table.ahead
        kept = None if ahead is None else ahead.epolls.capture(view, ahead.gone)
        if kept is not None:
            return cls(watches=kept.watches, told=kept.told, dropped=kept.dropped, **view.common())
        if "pos" not in view.info:
            view.refresh()  # what was told of it was to be enough
        return cls(watches=tuple(_watches(view)), **view.common())

    def rebuild(self, host: Rebuilder) -> int:
        if self.told >= 0:
            if host.ahead is None:
                raise BadFileRecord("an epoll instance goes on from one that was not told", object="epoll")
            fd = host.ahead.take_epoll(self.told)
            set_flags(fd, self.flags)
            return fd
        instance = select.epoll()
        fd = host.duplicate(instance.fileno())
        instance.close()
        set_flags(fd, self.flags)
        return fd


class Entry(NamedTuple):
    """A line of fdinfo: one entry, and the inode and device of the file."""

    number: int
    events: int
    data: int
    inode: int
    sdev: int


def entry_of(line: str) -> Entry | None:
    """What a line ``tfd: ..`` says; None if it is another, or cannot be understood."""
    parts = _LINE.match(line)
    return None if parts is None else Entry(int(parts[1]), *(int(part, 16) for part in parts.groups()[1:]))


def device_of(entry: Entry) -> tuple[int, int]:
    """Major and minor number of the watched file's device."""
    return entry.sdev >> _MINOR_BITS, entry.sdev & ((1 << _MINOR_BITS) - 1)


def _watches(view: FdView) -> list[EpollWatch]:
    found: list[EpollWatch] = []
    seen: Counter[int] = Counter()
    for line in view.lines:
        if not line.startswith("tfd:"):
            continue
        entry = entry_of(line)
        if entry is None:
            raise FileCaptureFailed(f"epoll entry not understood: {line}", object=view.object)
        number = entry.number
        if any((pid, number) in view.table.closed for pid, _ in view.places):
            continue  # given up; the kernel takes the entry away with the last descriptor
        pid, index = _target(view, entry, seen[number])
        found.append(EpollWatch(number=number, pid=pid, file=index, events=entry.events, data=entry.data))
        seen[number] += 1
    return found


def _target(view: FdView, told: Entry, nth: int) -> tuple[int, int]:
    """(process, index) of the file that an entry watches."""
    table, number, inode, device = view.table, told.number, told.inode, device_of(told)
    # Nearly always: the same number, in a process that has the instance.
    for pid, _ in view.places:
        place = table.tables.get(pid, {}).get(number)
        if place is None:
            continue
        # A socket has one description, so its inode tells.  The kernel would walk the instance from its beginning, for
        # each of thousands of connections (fs/eventpoll.c ep_find_tfd).
        entry = table.entries[place[0]]
        same_socket = stat.S_ISSOCK(entry.stat.st_mode) and (entry.stat.st_ino, _device(entry)) == (inode, device)
        if same_socket or kcmp_epoll(pid, number, view.pid, view.fd, number, nth):
            return pid, place[0]
    pid = view.places[0][0] if view.places else view.pid
    for index, other in enumerate(table.entries):
        if other.fd < 0 or other.stat.st_ino != inode or _device(other) != device:
            continue
        if kcmp_epoll(other.pid, other.fd, view.pid, view.fd, number, nth):
            return pid, index
    raise EpollTargetLost(
        f"an epoll instance watches a file (number {number}) that no descriptor leads to", object=view.object
    )


def _device(view: FdView) -> tuple[int, int]:
    return os.major(view.stat.st_dev), os.minor(view.stat.st_dev)
