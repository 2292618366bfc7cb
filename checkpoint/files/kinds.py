"""The table of kinds of open files. Who adds a kind writes one module, and one line here."""

from __future__ import annotations

import functools
import stat
from typing import Final

from checkpoint.errors import UnsupportedFile
from checkpoint.files.base import FdView, OpenFile, Rule, rule_of
from checkpoint.files.device import Device
from checkpoint.files.epoll import Epoll
from checkpoint.files.eventfd import EventFd
from checkpoint.files.external import External
from checkpoint.files.fanotify import Fanotify
from checkpoint.files.fifo import Fifo
from checkpoint.files.inotify import Inotify
from checkpoint.files.listener import Listener
from checkpoint.files.memfd import Memfd
from checkpoint.files.netlink import NetlinkFile
from checkpoint.files.packet import PacketFile
from checkpoint.files.pidfd import PidFd
from checkpoint.files.pipe import Pipe
from checkpoint.files.procfile import ProcFile
from checkpoint.files.pty import PtyMaster, PtySlave
from checkpoint.files.raw import RawFile
from checkpoint.files.regular import DeletedFile, Directory, PathOnly, RegularFile, SharedHugePages, SharedMemory
from checkpoint.files.shipped import ShippedFile
from checkpoint.files.signalfd import SignalFd
from checkpoint.files.sysv import SysvSegment
from checkpoint.files.tcpfile import TcpFile
from checkpoint.files.timerfd import TimerFd
from checkpoint.files.udp import UdpFile
from checkpoint.files.unix import UnixFile
from checkpoint.files.unsupported import Unsupported

__all__ = ["KINDS", "kind_for"]

#: most particular first: the first that fits takes the file
KINDS: Final[tuple[type[OpenFile], ...]] = (
    External,
    ProcFile,
    PathOnly,
    PtyMaster,
    PtySlave,
    Device,
    Pipe,
    Fifo,
    Memfd,
    SharedMemory,
    SharedHugePages,
    SysvSegment,
    DeletedFile,
    ShippedFile,
    RegularFile,
    Directory,
    EventFd,
    TimerFd,
    SignalFd,
    Epoll,
    Inotify,
    Fanotify,
    PidFd,
    Listener,
    TcpFile,
    UdpFile,
    UnixFile,
    NetlinkFile,
    PacketFile,
    RawFile,
    Unsupported,
)


@functools.cache
def _of_type(mode: int) -> tuple[tuple[type[OpenFile], Rule], ...]:
    rules = ((kind, rule_of(kind)) for kind in KINDS)
    return tuple((kind, rule) for kind, rule in rules if rule is not None and rule.mode in (None, mode))


def kind_for(view: FdView) -> type[OpenFile]:
    """The kind of an open file; UnsupportedFile if none fits."""
    link = view.link
    # a dozen rules are asked for each of what may be thousands of files
    for kind, (shape, _, match) in _of_type(stat.S_IFMT(view.stat.st_mode)):
        if (shape is None or shape.fullmatch(link)) and (match is None or match(view)):
            return kind
    raise UnsupportedFile(f"open file of a kind that is not known: {view.link}", object=view.object)
