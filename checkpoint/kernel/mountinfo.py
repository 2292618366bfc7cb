"""/proc/PID/mountinfo: what is mounted where, as a process sees it.

Source: Documentation/filesystems/proc.rst 3.5; fs/proc_namespace.c show_mountinfo.
"""

from __future__ import annotations

import re

from checkpoint.errors import NoSuchProcess
from tcpstate.slotted import dataclass

__all__ = ["MountInfo", "read_mounts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MountInfo:
    """One mount.

    id, parent   numbers of it, and of the mount that it is on
    device       major:minor of the file system
    root         directory of the file system that is shown
    at           where
    options      of the mount
    propagation  the optional fields: shared:N, master:N, ..
    kind         of file system
    source       as given to mount
    super        options of the file system
    """

    id: int
    parent: int
    device: str
    root: str
    at: str
    options: tuple[str, ...]
    propagation: tuple[str, ...]
    kind: str
    source: str
    super: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Equal in a copy of the mount tree."""
        return self.at, self.root, self.device, self.kind


def _plain(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text)


def parse(line: str) -> MountInfo:
    """One line."""
    left, _, right = line.rstrip("\n").partition(" - ")
    fields, (kind, source, options) = left.split(" "), right.split(" ", 2)
    return MountInfo(
        id=int(fields[0]),
        parent=int(fields[1]),
        device=fields[2],
        root=_plain(fields[3]),
        at=_plain(fields[4]),
        options=tuple(fields[5].split(",")),
        propagation=tuple(fields[6:]),
        kind=kind,
        source=_plain(source),
        super=tuple(options.split(",")),
    )


def read_mounts(pid: int | str) -> list[MountInfo]:
    """Those of a process, in the order of the kernel; ``thread-self``: ours. NoSuchProcess."""
    try:
        with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            return [parse(line) for line in file]
    except (FileNotFoundError, ProcessLookupError, OSError) as error:
        raise NoSuchProcess("the process does not exist, or has just ended", object=f"pid {pid}") from error
