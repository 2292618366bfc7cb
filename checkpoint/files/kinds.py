"""The kinds of open files, most particular first: one line each. Importing this module fills the register."""

from __future__ import annotations

from checkpoint.files import (
    device,
    epoll,
    eventfd,
    external,
    fifo,
    inotify,
    listener,
    memfd,
    pipe,
    regular,
    signalfd,
    tcpfile,
    timerfd,
    udp,
    unix,
    unsupported,
)

__all__ = [
    "device",
    "epoll",
    "eventfd",
    "external",
    "fifo",
    "inotify",
    "listener",
    "memfd",
    "pipe",
    "regular",
    "signalfd",
    "tcpfile",
    "timerfd",
    "udp",
    "unix",
    "unsupported",
]
