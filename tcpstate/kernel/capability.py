"""Capabilities: the structures of capset(2) and the numbers that rules here depend on.

Source: include/uapi/linux/capability.h.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

__all__ = ["CAPABILITY_BITS", "Cap", "capset_data", "capset_header", "names"]

#: capabilities are numbered below this (the kernel's masks have 64 bits; CAP_LAST_CAP is 40 today)
CAPABILITY_BITS: Final = 64
_VERSION_3: Final = 0x20080522
_HEADER = struct.Struct("<Ii")
_DATA = struct.Struct("<6I")
_LOW: Final = 0xFFFFFFFF


class Cap(enum.IntEnum):
    """Capability numbers."""

    CHOWN = 0
    DAC_OVERRIDE = 1
    DAC_READ_SEARCH = 2
    FOWNER = 3
    FSETID = 4
    KILL = 5
    SETGID = 6
    SETUID = 7
    SETPCAP = 8
    LINUX_IMMUTABLE = 9
    NET_BIND_SERVICE = 10
    NET_BROADCAST = 11
    NET_ADMIN = 12
    NET_RAW = 13
    IPC_LOCK = 14
    IPC_OWNER = 15
    SYS_MODULE = 16
    SYS_RAWIO = 17
    SYS_CHROOT = 18
    SYS_PTRACE = 19
    SYS_PACCT = 20
    SYS_ADMIN = 21
    SYS_BOOT = 22
    SYS_NICE = 23
    SYS_RESOURCE = 24
    SYS_TIME = 25
    SYS_TTY_CONFIG = 26
    MKNOD = 27
    LEASE = 28
    AUDIT_WRITE = 29
    AUDIT_CONTROL = 30
    SETFCAP = 31
    MAC_OVERRIDE = 32
    MAC_ADMIN = 33
    SYSLOG = 34
    WAKE_ALARM = 35
    BLOCK_SUSPEND = 36
    AUDIT_READ = 37
    PERFMON = 38
    BPF = 39
    CHECKPOINT_RESTORE = 40


def capset_header() -> bytes:
    """struct __user_cap_header_struct for the calling thread."""
    return _HEADER.pack(_VERSION_3, 0)


def capset_data(*, effective: int, permitted: int, inheritable: int) -> bytes:
    """The two struct __user_cap_data_struct of version 3."""
    sets = (effective, permitted, inheritable)
    return _DATA.pack(*(s & _LOW for s in sets), *(s >> 32 for s in sets))


def names(mask: int) -> str:
    """The capabilities of a mask, for a message."""
    known = {int(c): f"CAP_{c.name}" for c in Cap}
    return ", ".join(known.get(bit, f"capability {bit}") for bit in range(CAPABILITY_BITS) if mask >> bit & 1)
