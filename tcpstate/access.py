"""Who may look at a connection, and change it: its owner's user, or who has CAP_NET_ADMIN (paper, 5.1 and 5.6)."""

from __future__ import annotations

import os
from pathlib import Path

from tcpstate.errors import NotPermitted
from tcpstate.kernel.capability import Cap

__all__ = ["capable", "check_user"]


def capable(cap: Cap) -> bool:
    """Whether this thread has the capability in its effective set."""
    for line in Path("/proc/thread-self/status").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) >> cap & 1)
    return False


def check_user(uid: int, name: str) -> None:
    """NotPermitted if this thread's user is neither ``uid`` nor privileged. The kernel's own checks come on top."""
    if os.geteuid() == uid or capable(Cap.NET_ADMIN):
        return
    raise NotPermitted(
        f"the connection belongs to user {uid}, not to user {os.geteuid()}",
        object=name,
        fix="Run as the user whose connection it is, or as root.",
    )
