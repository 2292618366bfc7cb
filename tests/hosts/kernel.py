"""The few system calls that Python 3.11 does not wrap: unshare, setns, mount, sethostname.

Source: Linux uapi linux/sched.h, linux/mount.h; man 2 unshare, setns, mount.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "Clone",
    "MountFlag",
    "in_namespace",
    "mount",
    "new_netns",
    "set_hostname",
    "setns",
    "unshare",
    "write_sysctl",
]

_libc = ctypes.CDLL(None, use_errno=True)


class Clone(enum.IntFlag):
    """CLONE_NEW*: the kinds of namespaces (uapi linux/sched.h)."""

    NEWTIME = 0x00000080
    NEWNS = 0x00020000
    NEWUTS = 0x04000000
    NEWIPC = 0x08000000
    NEWPID = 0x20000000
    NEWNET = 0x40000000


class MountFlag(enum.IntFlag):
    """MS_*: flags of mount(2) (uapi linux/mount.h)."""

    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    BIND = 4096
    MOVE = 8192
    REC = 16384
    PRIVATE = 1 << 18


def _checked(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: Clone) -> None:
    """New namespaces for the calling thread (PID and time: for the children that it makes from now on)."""
    _checked(_libc.unshare(ctypes.c_int(int(flags))), f"unshare({flags!r})")


def setns(descriptor: int, kind: Clone) -> None:
    """The calling thread enters the namespace that `descriptor` refers to."""
    _checked(_libc.setns(descriptor, ctypes.c_int(int(kind))), f"setns({kind!r})")


def mount(source: str, at: str, kind: str = "", flags: MountFlag | int = 0, data: str = "") -> None:
    """mount(2). Raises OSError that names the mount point."""
    result = _libc.mount(
        source.encode(), at.encode(), kind.encode() or None, ctypes.c_ulong(int(flags)), data.encode() or None
    )
    _checked(result, f"mount {kind or source} on {at}")


def set_hostname(name: str) -> None:
    """The host name of the calling thread's UTS namespace."""
    encoded = name.encode()
    _checked(_libc.sethostname(encoded, ctypes.c_size_t(len(encoded))), "sethostname")


@contextlib.contextmanager
def in_namespace(descriptor: int, kind: Clone = Clone.NEWNET) -> Iterator[None]:
    """Within the block the calling thread is in that network (or UTS, IPC) namespace, and so are new children."""
    name = {Clone.NEWNET: "net", Clone.NEWUTS: "uts", Clone.NEWIPC: "ipc"}[kind]
    home = os.open(f"/proc/thread-self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(descriptor, kind)
        try:
            yield
        finally:
            setns(home, kind)
    finally:
        os.close(home)


def new_netns() -> int:
    """A descriptor of a new network namespace with lo up; the namespace ends with the last descriptor and process."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        unshare(Clone.NEWNET)
        try:
            descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            setns(home, Clone.NEWNET)
    finally:
        os.close(home)
    return descriptor


def write_sysctl(name: str, value: object) -> None:
    """Write one sysctl as the calling thread sees it (its network and PID namespace): ``net/ipv4/ip_forward``."""
    Path("/proc/sys", name).write_text(f"{value}\n")
