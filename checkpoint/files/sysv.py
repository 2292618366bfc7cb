"""System V shared memory that processes of the tree have attached: the segment, with its ID and key, and its bytes.

A segment lives in the kernel, not in a process.  So it moves only if nobody outside the tree has it attached; it is
made at the target under the same ID and key, and removed here when the processes are gone.  What is attached only in
part, or was split by mprotect, cannot be attached so again (:mod:`checkpoint.memory.segments`).

Source: ipc/shm.c: the inode number of a mapping is the segment's ID; /proc/sys/kernel/shm_next_id.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import stat
from typing import TYPE_CHECKING, ClassVar, Final, Self

from checkpoint.errors import FileRebuildFailed, SegmentTaken
from checkpoint.files.base import FdView, OpenFile, register
from checkpoint.files.content import ContentKind
from checkpoint.kernel import sysv
from checkpoint.memory.segments import require_alone
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["SysvSegment", "remove_deserted", "remove_noted"]

_log = logging.getLogger(__name__)

_NOTE: Final = "/proc/sysvipc/shm/"
_ID_MAX: Final = (1 << 31) - 1


@register("sysv shm", link=r"/SYSV[0-9a-f]{8} [(]deleted[)]", mode=stat.S_IFREG, match=lambda view: view.fd < 0)
@dataclass(frozen=True, slots=True, kw_only=True)
class SysvSegment(OpenFile):
    """One segment.

    number   its ID
    key      of shmget; 0: none (IPC_PRIVATE, or removed already)
    mode     permission bits, with sysv.Mode
    uid      its owner, and ``gid``
    content  index of its bytes
    """

    mappable: ClassVar[bool] = True

    number: int
    key: int
    mode: int
    uid: int
    gid: int
    content: int

    def __post_init__(self) -> None:
        OpenFile.__post_init__(self)
        if not 0 <= self.number <= _ID_MAX or not -_ID_MAX - 1 <= self.key <= _ID_MAX or not 0 <= self.mode <= 0o7777:
            raise ValueError("ID, key or mode out of range")
        if not 0 <= self.uid < 1 << 32 or not 0 <= self.gid < 1 << 32:
            raise ValueError("owner out of range")

    @classmethod
    def capture(cls, view: FdView) -> Self:
        found = require_alone(view.stat.st_ino, view.table.pids)
        return cls(
            number=view.stat.st_ino,
            key=found.key,
            mode=found.mode & 0o7777,
            uid=found.uid,
            gid=found.gid,
            content=view.table.content(view, ContentKind.SEGMENT, view.link),
            **view.common(),
        )

    def check(self, host: Rebuilder) -> str:
        if not host.own_ipc and sysv.look(self.number) is not None:
            raise SegmentTaken(f"there is a segment with the ID {self.number} here", object=self._name)
        return ""

    @property
    def _name(self) -> str:
        return f"shared memory segment {self.number}, key {self.key & 0xFFFFFFFF:#010x}"

    @property
    def note(self) -> str:
        """What :func:`remove_noted` knows it by."""
        return f"{_NOTE}{self.number}"

    def rebuild(self, host: Rebuilder) -> int:
        known = host.shared.get(("sysv shm", self.number))
        if known is None:
            host.shared["sysv shm", self.number] = self.number
            host.provide_content(self.content, self._make(host))
        # whether it may be written through this mapping is a matter of how it was attached
        return host.reopen(host.content(self.content), self.flags)

    def _make(self, host: Rebuilder) -> int:
        size = host.records.contents[self.content].size
        if host.note_path is not None and not host.own_ipc:
            host.note_path(self.note)
        try:
            if not sysv.create(self.number, self.key, size, self.mode):
                raise SegmentTaken(f"there is a segment with the ID {self.number} here", object=self._name)
        except OSError as error:
            if error.errno == errno.EEXIST:
                raise SegmentTaken("there is a segment with its key here", object=self._name) from error
            raise FileRebuildFailed(f"shmget of {size} bytes: {error.strerror}", object=self._name) from error
        host.on_abort(lambda: sysv.remove(self.number))
        sysv.change_owner(self.number, self.uid, self.gid, self.mode)
        return _opened(self.number, size)

    def release(self, host: Rebuilder, fd: int) -> None:
        if self.mode & sysv.Mode.LOCKED:
            sysv.lock(self.number)
        if self.mode & sysv.Mode.DEST:
            sysv.remove(self.number)


def _opened(number: int, size: int) -> int:
    """A descriptor of the file that the kernel keeps a segment in."""
    address = syscall(SYS.shmat, number, 0, 0)
    try:
        end = address + size + -size % mmap.PAGESIZE
        return os.open(f"/proc/self/map_files/{address:x}-{end:x}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        syscall(SYS.shmdt, address)


def remove_deserted(numbers: set[int]) -> None:
    """The processes that had these segments are gone, and their copies are elsewhere or in an image."""
    for number in numbers:
        found = sysv.look(number)
        if found is not None and not found.attached:
            with contextlib.suppress(FileNotFoundError):
                sysv.remove(number)
            _log.debug("the shared memory segment %d is removed", number)


def remove_noted(path: str) -> bool | None:
    """Remove what a :attr:`SysvSegment.note` names, if nobody has attached it; whether there was anything.

    None if the path is not such a note.
    """
    if not path.startswith(_NOTE):
        return None
    number = int(path[len(_NOTE) :])
    there = sysv.look(number) is not None
    remove_deserted({number})
    return there
