"""What an IPC namespace has besides the objects in it: limits of System V objects and POSIX message queues.

The objects are those of :mod:`checkpoint.ipc`: with the namespace all of them move, whoever used them last.

Source: ipc_namespaces(7); ipc/ipc_sysctl.c, ipc/mq_sysctl.c: /proc/sys shows the settings of the reader's namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from typing import Final

from checkpoint.errors import IpcLeftOver, NamespaceNotMade
from tcpstate.errors import TcpmigError
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["IpcSettings", "left_over"]

_SYSTEM_V: Final = ("shmmax", "shmall", "shmmni", "shm_rmid_forced", "msgmax", "msgmnb", "msgmni", "sem")
_QUEUES: Final = ("queues_max", "msg_max", "msgsize_max", "msg_default", "msgsize_default")
_FILES: Final = (*(f"kernel/{name}" for name in _SYSTEM_V), *(f"fs/mqueue/{name}" for name in _QUEUES))
_VALUE: Final = re.compile(r"[0-9]{1,20}(\s+[0-9]{1,20}){0,7}")
#: include/uapi/linux/mount.h
_FSCONFIG_CMD_CREATE: Final = 6
_CLOEXEC: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class IpcSettings:
    """Values, as text, by their names below /proc/sys; a kernel without a kind has none of its."""

    values: dict[str, str]

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            if name not in _FILES or not _VALUE.fullmatch(value):
                raise ValueError(f"{name!r} is no setting of IPC, or {value!r} no value")

    @classmethod
    def read(cls) -> IpcSettings:
        """Those of the calling thread's namespace. OSError."""
        found = {}
        for name in _FILES:
            with contextlib.suppress(FileNotFoundError), open(f"/proc/sys/{name}", encoding="ascii") as file:
                found[name] = file.read().strip()
        return cls(values=found)

    def give(self) -> None:
        """To the calling thread's namespace. NamespaceNotMade."""
        now = IpcSettings.read().values
        for name, value in self.values.items():
            if now.get(name) == value:
                continue
            try:
                with open(f"/proc/sys/{name}", "w", encoding="ascii") as file:
                    file.write(value)
            except OSError as error:
                raise NamespaceNotMade(f"it cannot be set to {value}: {error.strerror}", object=name) from error


def left_over() -> Iterator[TcpmigError]:
    """What there is in the calling thread's IPC namespace, belongs to nobody, and cannot be moved: segments that nobody
    has attached, and POSIX message queues. OSError."""
    with open("/proc/sysvipc/shm", encoding="ascii") as file:
        names, *lines = (line.split() for line in file)
    for line in lines:
        segment = dict(zip(names, line, strict=False))
        if segment["nattch"] == "0":
            yield IpcLeftOver("nobody has it attached", object=f"shared memory segment {segment['shmid']}")
    for name in _message_queues():
        yield IpcLeftOver("POSIX message queues cannot be moved", object=f"/{name}")


def _message_queues() -> list[str]:
    """Their names; none where the kernel has no such queues."""
    try:
        context = syscall(SYS.fsopen, ctypes.addressof(ctypes.create_string_buffer(b"mqueue")), _CLOEXEC)
    except OSError:
        return []
    try:
        syscall(SYS.fsconfig, context, _FSCONFIG_CMD_CREATE, 0, 0, 0)
        mounted = syscall(SYS.fsmount, context, _CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        # opened anew: what fsmount gives is only a place
        folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mounted)
        try:
            return os.listdir(folder)
        finally:
            os.close(folder)
    finally:
        os.close(mounted)
