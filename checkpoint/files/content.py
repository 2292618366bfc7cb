"""Contents: bytes of files that live nowhere but in this tree of processes, and therefore travel with it.

A memfd, a deleted file that is still open or mapped, shared anonymous memory. The record says how to make an empty one;
the bytes follow as page frames of the space ``content``, addressed by the index of the record, so that a pre-copy can
send them again and a large one need not fit in one message.

Sources: mm/memfd.c, mm/shmem.c; lseek(2) SEEK_DATA for the holes.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import mmap
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from checkpoint.errors import BadFileRecord, FileMissing, FileRebuildFailed
from checkpoint.files.abi import Fcntl, Seal, punch_hole
from checkpoint.files.identity import BEACON
from checkpoint.namespaces.ways import real
from tcpstate.errors import KernelFeatureMissing
from tcpstate.slotted import dataclass

__all__ = ["Content", "ContentKind", "data_runs", "nonzero_runs", "punch", "put"]

#: the suffix that the kernel puts behind the name of a file without links
DELETED: Final = " (deleted)"
_NAME_MAX: Final = 255
_MFD_ALLOW_SEALING: Final = os.MFD_ALLOW_SEALING
#: asm-generic/mman-common.h; Python has it from 3.13 on
_MAP_NORESERVE: Final = 0x4000
#: linux/memfd.h, asm-generic/mman.h; the size of the pages stands in the bits from 26 on, as its logarithm
_MFD_HUGETLB: Final = 0x4
_MAP_HUGETLB: Final = 0x40000
_HUGE_SHIFT: Final = 26
_LARGEST_PAGE: Final = 30
_POOL: Final = "/sys/kernel/mm/hugepages/hugepages-{}kB"


class ContentKind(enum.Enum):
    """How an empty one is made."""

    MEMFD = "memfd"
    DELETED = "deleted file"
    SHIPPED = "shipped file"  # its bytes come to a passing name beside its place (files/shipped.py)
    SHARED = "shared anonymous memory"
    SEGMENT = "System V shared memory"  # made by files/sysv.py


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """A file that travels with the processes.

    name   of a memfd: what memfd_create was given; of a deleted file: its last path; of a shipped file: its path
    size   bytes
    mode   permission bits
    uid    owner
    gid    group
    seals  of a memfd
    huge   its pages are out of the pool of huge pages: the logarithm of their size; 0: they are not
    """

    kind: ContentKind
    name: str
    size: int
    mode: int
    uid: int
    gid: int
    seals: int = 0
    huge: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.size < 1 << 62 or not 0 <= self.mode <= 0o7777 or not 0 <= self.seals < 64:
            raise ValueError("size, mode or seals out of range")
        page = 1 << self.huge
        if self.huge and (
            self.kind not in (ContentKind.MEMFD, ContentKind.SHARED)
            or not mmap.PAGESIZE < page <= 1 << _LARGEST_PAGE
            or self.size % page
        ):
            raise ValueError("huge pages of no such size, or of no such file")
        if "\0" in self.name:
            raise ValueError("a name holds a zero byte")
        if self.kind in (ContentKind.DELETED, ContentKind.SHIPPED) and not self.name.startswith("/"):
            raise ValueError("the path of a file is not absolute")

    def check(self, path: Callable[[str], str]) -> None:
        """FileMissing if the directory of a deleted file is not here, KernelFeatureMissing if huge pages are not."""
        if self.huge and not os.path.isdir(_POOL.format((1 << self.huge) >> 10)):
            raise KernelFeatureMissing(f"huge pages of {1 << self.huge} bytes", object=self.name)
        if self.kind is ContentKind.DELETED:
            folder = os.path.dirname(path(self.name))
            if not os.path.isdir(folder):
                raise FileMissing("the directory of a deleted file that is still open is not here", object=folder)

    def make(self, path: Callable[[str], str], note: Callable[[str], None] | None = None) -> int:
        """An empty file of this size, open for reading and writing; ``path`` maps paths of the source to ours, ``note``
        is told the passing name of a shipped file before it is made."""
        try:
            if self.kind is ContentKind.MEMFD:
                fd = self._memfd()
            elif self.kind is ContentKind.SHARED:
                return self._shared()
            elif self.kind is ContentKind.SEGMENT:
                raise FileRebuildFailed("a segment that no record tells of", object=self.name)
            elif self.kind is ContentKind.SHIPPED:
                fd = _staged(real(path(self.name)), note)
                os.ftruncate(fd, self.size)
                return fd  # its owner and mode come last: until then it is nobody's business
            else:
                fd = self._deleted(path(self.name))
            os.ftruncate(fd, self.size)
            os.fchown(fd, self.uid, self.gid)
            os.fchmod(fd, self.mode)
        except OSError as error:
            raise FileRebuildFailed(
                f"{self.kind.value} of {self.size} bytes: {error.strerror}", object=self.name
            ) from error
        return fd

    def _memfd(self) -> int:
        # F_SEAL_SEAL without any other seal is what a memfd has that did not ask for sealing
        sealing = 0 if self.seals == Seal.SEAL else _MFD_ALLOW_SEALING
        huge = _MFD_HUGETLB | self.huge << _HUGE_SHIFT if self.huge else 0
        return os.memfd_create(self.name, os.MFD_CLOEXEC | sealing | huge)

    def _shared(self) -> int:
        # Memory that is mapped shared and anonymous is a file of the kernel's own ("/dev/zero (deleted)"). Made the
        # same way and reopened through map_files it stays one, also in the maps of the rebuilt process.
        if self.size == 0:
            raise FileRebuildFailed("shared anonymous memory of no size", object=self.name)
        huge = _MAP_HUGETLB | self.huge << _HUGE_SHIFT if self.huge else 0
        with mmap.mmap(-1, self.size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | huge) as area:
            return os.open(_map_file(area), os.O_RDWR | os.O_CLOEXEC)

    def _deleted(self, path: str) -> int:
        folder, name = os.path.split(path)
        # Under its own name for a moment, so that links in /proc and maps read as before; another name if that is
        # taken.
        for attempt in (path, os.path.join(folder, f"{name[:200]}.{secrets.token_hex(6)}")):
            try:
                fd = os.open(attempt, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileExistsError:
                continue
            os.unlink(attempt)
            return fd
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)

    def write(self, fd: int, offset: int, data: memoryview) -> None:
        """Put bytes in their place. OSError."""
        if self.huge:
            _write_mapped(fd, offset, data, 1 << self.huge)
            return
        while data:
            written = os.pwrite(fd, data, offset)
            data, offset = data[written:], offset + written

    def seal(self, fd: int) -> None:
        """Put the seals on, once the bytes are there and the mappings are made."""
        wanted = self.seals & ~fcntl.fcntl(fd, Fcntl.GET_SEALS) if self.kind is ContentKind.MEMFD else 0
        if wanted:
            try:
                fcntl.fcntl(fd, Fcntl.ADD_SEALS, wanted)
            except OSError as error:
                raise FileRebuildFailed(f"seals {wanted:#x}: {error.strerror}", object=self.name) from error


def _write_mapped(fd: int, offset: int, data: memoryview, page: int) -> None:
    """As pwrite(2), which files of huge pages do not have."""
    while data:
        start = offset - offset % page
        with mmap.mmap(fd, page, mmap.MAP_SHARED | _MAP_NORESERVE, mmap.PROT_WRITE, offset=start) as area:
            count = min(len(data), start + page - offset)
            area[offset - start : offset - start + count] = data[:count]
        data, offset = data[count:], offset + count


def nonzero_runs(fd: int, page: int) -> Iterator[tuple[int, int]]:
    """As :func:`data_runs`, of a file whose holes the kernel does not tell: pages of zeros count as such."""
    offset, zeros = 0, bytes(page)
    while data := os.pread(fd, page, offset):
        if data != zeros[: len(data)]:
            yield offset, len(data)
        offset += len(data)


def _staged(path: str, note: Callable[[str], None] | None) -> int:
    """An empty file of a passing name beside ``path``."""
    folder, name = os.path.split(path)
    start = f"{BEACON}{secrets.token_hex(6)}-"
    staged = os.path.join(folder, start + os.fsdecode(os.fsencode(name)[: _NAME_MAX - len(start)]))
    if note is not None:
        note(staged)
    return os.open(staged, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _map_file(area: mmap.mmap) -> str:
    """The path that opens the file behind a mapping of our own."""
    import ctypes

    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    end = start + (len(area) + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
    return f"/proc/self/map_files/{start:x}-{end:x}"


def put(
    content: Content, fd: int, runs: Sequence[tuple[int, int]], data: bytes | memoryview, *, size: int, name: str
) -> None:
    """Write the bytes of ``runs`` (offset, length), one after the other in ``data``, up to ``size``. BadFileRecord if
    they do not fit, FileRebuildFailed."""
    view = memoryview(data)
    for offset, length in runs:
        if offset < 0 or length < 0 or offset + length > size or length > len(view):
            raise BadFileRecord(f"{length} bytes at {offset} do not fit {size}", object=name)
        part, view = view[:length], view[length:]
        try:
            content.write(fd, offset, part)
        except OSError as error:
            raise FileRebuildFailed(f"writing a content: {error.strerror}", object=name) from error
    if view:
        raise BadFileRecord(f"{len(view)} bytes too many", object=name)


def punch(fd: int, runs: Iterable[tuple[int, int]], name: str) -> None:
    """Make holes of ``runs`` (offset, length). FileRebuildFailed."""
    for start, length in runs:
        try:
            punch_hole(fd, start, length)
        except OSError as error:
            raise FileRebuildFailed(f"a hole: {error.strerror}", object=name) from error


def data_runs(fd: int, offset: int = 0) -> Iterator[tuple[int, int]]:
    """(offset, length) of the parts of the file that are not holes, from ``offset`` on."""
    while True:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, offset - start


@contextlib.contextmanager
def reopened(magic: str, seen: os.stat_result) -> Iterator[int]:
    """A descriptor of its own for reading a file, whatever way it was opened by its owner. OSError; FileNotFoundError
    if it is not the file that was ``seen`` there: its owner may run, and has opened another, which may have no end, or
    be waited for."""
    with contextlib.ExitStack() as ends:
        # with O_PATH nothing is opened yet
        held = os.open(magic, os.O_PATH | os.O_CLOEXEC)
        ends.callback(os.close, held)
        if not os.path.samestat(os.fstat(held), seen):
            raise FileNotFoundError(errno.ENOENT, "another file is there now", magic)
        fd = os.open(f"/proc/self/fd/{held}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        ends.callback(os.close, fd)
        yield fd
