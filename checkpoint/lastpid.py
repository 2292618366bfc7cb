"""Numbers of processes by counting, for who may not choose them (set_tid of clone3).

Source: pid_namespaces(7), /proc/sys/kernel/ns_last_pid: of the writer's PID namespace.
"""

from __future__ import annotations

import os
from typing import Final

from checkpoint import procfs
from checkpoint.errors import PidTaken

__all__ = ["TRIES", "next_is"]

#: how often to try: somebody else may have a child between the telling and the birth
TRIES: Final = 200


def next_is(number: int | None) -> None:
    """The next process or thread that is born in our PID namespace gets this number; None: any. PidTaken, OSError."""
    if number is None:
        return
    if os.path.exists(f"/proc/{number}"):
        users = procfs.users_of_number(number)
        raise PidTaken(f"the number is in use: {'; '.join(users)}", object=f"pid {number}")
    with open("/proc/sys/kernel/ns_last_pid", "w", encoding="ascii") as file:
        file.write(str(number - 1))
