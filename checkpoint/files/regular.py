"""Regular files and directories: by their path, or with their bytes where no path leads to them any more.

Sources: fs/d_path.c (" (deleted)"), fs/open.c; /proc/PID/map_files for what is only mapped.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple, Self

from checkpoint.errors import (
    FileDiffers,
    FileMissing,
    FileNotShared,
    FileRebuildFailed,
    FileUnreachable,
    UnsupportedFile,
)
from checkpoint.files import links
from checkpoint.files.abi import REOPEN_FLAGS, FileFlag, Magic, filesystem_magic
from checkpoint.files.base import FdView, OpenFile, register
from checkpoint.files.content import DELETED, ContentKind, reopened
from checkpoint.files.identity import Evidence, build_id, digest, evidence_of, same_folder, shown
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["DeletedFile", "Directory", "PathOnly", "RegularFile", "SharedHugePages", "SharedMemory", "known_evidence"]

#: file systems whose files are made up by the kernel when they are read: size and times say nothing
_VOLATILE: Final = frozenset(
    {Magic.PROC, Magic.SYSFS, Magic.CGROUP, Magic.CGROUP2, Magic.DEBUGFS, Magic.TRACEFS, Magic.SECURITYFS}
)


#: bytes; the block of hugetlbfs is a page
_SMALLEST_HUGE_PAGE: Final = 1 << 16


def volatile(view: FdView) -> bool:
    """Whether the file is made up when it is read: nothing that is written stays."""
    # Asking every file for its file system would cost a system call each; files of sysfs have the size of a page.
    return view.stat.st_size in (0, 4096) and view.dup >= 0 and filesystem_magic(view.dup) in _VOLATILE


def is_message_queue(view: FdView) -> bool:
    """Whether it is a POSIX message queue: a regular file, as far as its type says."""
    # asked only of files of the one size that all queues have (FILENT_SIZE of ipc/mqueue.c)
    return view.stat.st_size == 80 and view.dup >= 0 and filesystem_magic(view.dup) == Magic.MQUEUE


def _not_of_huge_pages(view: FdView) -> None:
    """UnsupportedFile for a file of hugetlbfs: it is memory of this host."""
    if view.stat.st_blksize < _SMALLEST_HUGE_PAGE:
        return
    with reopened(view.magic, view.stat) as fd:
        if filesystem_magic(fd) == Magic.HUGETLBFS:
            raise UnsupportedFile("file of huge pages (hugetlbfs)", object=view.object)


class Marks(NamedTuple):
    """By what a file is told from another."""

    size: int
    mtime_ns: int
    build_id: bytes = b""

    def beside(self, here: Marks) -> str:
        """Both, for messages; ``self`` is the source's."""
        return f"here {shown(*here)}, at the source {shown(*self)}"


def _same(path: str, wanted: os.stat_result, *, follow: bool = True) -> bool:
    try:
        found = os.stat(path, follow_symlinks=follow)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)


def path_of(view: FdView, *, follow: bool = True) -> str:
    """A path that leads to the open file; FileUnreachable if there is none."""
    way = view.table.way(view.pid)
    if _same(way + view.link, view.stat, follow=follow):
        return view.link
    if view.link.endswith(DELETED):
        # The name is gone, but not the file: it has another hard link.
        gone = view.link[: -len(DELETED)]
        name = links.find(way + gone, view.stat) if view.stat.st_nlink else ""
        if name:
            return name.removeprefix(way)
        raise FileUnreachable(f"{gone} was deleted, and its other hard link is not found", object=view.object)
    raise FileUnreachable(f"{view.link} is not the file that is open", object=view.object)


def _open(path: str, flags: int, object: str) -> int:
    try:
        return os.open(path, flags & REOPEN_FLAGS | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise FileRebuildFailed(f"open: {error.strerror}", object=object) from error


def _seek(fd: int, pos: int, object: str) -> None:
    if pos:
        try:
            os.lseek(fd, pos, os.SEEK_SET)
        except OSError as error:
            raise FileRebuildFailed(f"file position {pos}: {error.strerror}", object=object) from error


def _found(path: str, test: str, *, follow: bool = True) -> os.stat_result:
    """stat of ``path``; FileMissing if there is none or it is of another type than ``test`` (regular, directory)."""
    try:
        found = os.stat(path, follow_symlinks=follow)
    except (FileNotFoundError, NotADirectoryError):
        raise FileMissing(f"this {test} is not here", object=path) from None
    except OSError as error:
        raise FileMissing(f"this {test} cannot be looked at: {error.strerror}", object=path) from None
    right = {"regular file": stat.S_ISREG, "directory": stat.S_ISDIR}.get(test)
    if right is not None and not right(found.st_mode):
        raise FileMissing(f"not a {test}", object=path)
    return found


def _absolute(path: str) -> None:
    if not path.startswith("/") or "\0" in path:
        raise ValueError(f"{path!r} is not an absolute path")


@register("path only", match=lambda view: bool(view.flags & FileFlag.PATH))
@dataclass(frozen=True, slots=True, kw_only=True)
class PathOnly(OpenFile):
    """A file of any type opened with O_PATH: a place in the tree of names, nothing can be read or written."""

    foreseeable: ClassVar[bool] = True

    path: str

    def validate(self) -> None:
        _absolute(self.path)

    @classmethod
    def examine(cls, view: FdView) -> str:
        path_of(view, follow=not view.flags & FileFlag.NOFOLLOW)
        return ""

    @classmethod
    def capture(cls, view: FdView) -> Self:
        return cls(path=path_of(view, follow=not view.flags & FileFlag.NOFOLLOW), **view.common())

    def check(self, host: Rebuilder) -> str:
        _found(host.path(self.path), "file opened by O_PATH", follow=not self.flags & FileFlag.NOFOLLOW)
        return ""

    def rebuild(self, host: Rebuilder) -> int:
        path = host.place(self.path)
        return _open(path, self.flags | FileFlag.PATH, path)


@register(
    "shared memory",
    link=r"/dev/zero \(deleted\)",
    mode=stat.S_IFREG,
    match=lambda view: os.major(view.stat.st_dev) == 0,
)
@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMemory(OpenFile):
    """Shared anonymous memory (a shmem file of the kernel's own), behind a mapping.

    content  index of its bytes
    """

    mappable: ClassVar[bool] = True

    content: int

    @classmethod
    def capture(cls, view: FdView) -> Self:
        return cls(content=view.table.content(view, ContentKind.SHARED, view.link), **view.common())

    def rebuild(self, host: Rebuilder) -> int:
        return host.reopen(host.content(self.content), self.flags)


@register("shared huge pages", link=r"/anon_hugepage \(deleted\)", mode=stat.S_IFREG)
@dataclass(frozen=True, slots=True, kw_only=True)
class SharedHugePages(OpenFile):
    """Shared anonymous memory out of the pool of huge pages (MAP_HUGETLB), behind a mapping.

    content  index of its bytes
    """

    mappable: ClassVar[bool] = True

    content: int

    @classmethod
    def capture(cls, view: FdView) -> Self:
        huge = view.stat.st_blksize.bit_length() - 1
        return cls(content=view.table.content(view, ContentKind.SHARED, view.link, huge), **view.common())

    def rebuild(self, host: Rebuilder) -> int:
        return host.reopen(host.content(self.content), self.flags)


@register(
    "deleted file",
    link=rf"/.*{DELETED.replace('(', '[(]').replace(')', '[)]')}",
    mode=stat.S_IFREG,
    match=lambda view: (
        view.stat.st_nlink == 0
        and not view.link.startswith(("/memfd:", "/SYSV", "/[aio]", "/anon_hug", "/secretmem"))
        and not is_message_queue(view)
    ),
)
@dataclass(frozen=True, slots=True, kw_only=True)
class DeletedFile(OpenFile):
    """A regular file without a name that is still open or mapped. Its bytes travel.

    content  index of its bytes
    """

    mappable: ClassVar[bool] = True

    content: int

    @classmethod
    def examine(cls, view: FdView) -> str:
        _not_of_huge_pages(view)
        return "" if view.stat.st_size < 1 << 30 else f"deleted file of {view.stat.st_size} bytes travels along"

    @classmethod
    def capture(cls, view: FdView) -> Self:
        name = view.link[: -len(DELETED)]
        # O_NOFOLLOW (tempfile uses it) was about the path that led here; with it no file could be opened through /proc
        common = view.common() | {"flags": view.flags & ~FileFlag.NOFOLLOW}
        return cls(content=view.table.content(view, ContentKind.DELETED, name), **common)

    def rebuild(self, host: Rebuilder) -> int:
        fd = host.reopen(host.content(self.content), self.flags)
        _seek(fd, self.pos, "deleted file")
        return fd


@register(
    "file",
    link=r"/.*",
    mode=stat.S_IFREG,
    match=lambda view: (
        not view.link.startswith(("/memfd:", "/SYSV", "/[aio]", "/secretmem")) and not is_message_queue(view)
    ),
)
@dataclass(frozen=True, slots=True, kw_only=True)
class RegularFile(OpenFile):
    """A regular file that has a path.

    path      of the source
    size      bytes, when it was captured
    mtime_ns  time of modification, likewise
    inode     number, a hint that it is the very same file (shared file system)
    volatile  on a file system like /proc: size and time mean nothing
    evidence  what else tells its content, if it is only read
    """

    mappable: ClassVar[bool] = True
    foreseeable: ClassVar[bool] = True

    path: str
    size: int
    mtime_ns: int
    inode: int
    volatile: bool
    evidence: Evidence | None = None

    def validate(self) -> None:
        _absolute(self.path)

    @property
    def written(self) -> bool:
        """Whether it is open for writing (or mapped so), and what is written stays there."""
        return self.access.writes and not self.volatile

    @property
    def marks(self) -> Marks:
        """What is compared."""
        return Marks(self.size, self.mtime_ns, self.evidence.build_id if self.evidence else b"")

    @classmethod
    def examine(cls, view: FdView) -> str:
        _not_of_huge_pages(view)
        path_of(view)
        return ""

    @classmethod
    def capture(cls, view: FdView) -> Self:
        path = path_of(view)
        made_up = volatile(view)
        return cls(
            path=path,
            size=view.stat.st_size,
            mtime_ns=view.stat.st_mtime_ns,
            inode=view.stat.st_ino,
            volatile=made_up,
            evidence=view.table.evidence.get((path, view.stat.st_size, view.stat.st_mtime_ns, view.stat.st_ino)),
            **view.common(),
        )

    def prove(self, view: FdView) -> Self:
        """The record with evidence, which takes reading the file: not in the stop. OSError."""
        if self.access.writes or self.volatile:
            return self
        with reopened(view.magic, view.stat) as fd:
            return dataclasses.replace(self, evidence=evidence_of(fd, self.size))

    def check(self, host: Rebuilder) -> str:
        path = host.path(self.path)
        written = self.written or self.path in host.written
        if written and host.beacons is not None:
            return self._check_shared(host, path)
        found = _found(path, "regular file")
        if self.volatile:
            return ""
        if written:
            return self._check_left(host, path, found)
        return self._check_content(path, found)

    def _check_content(self, path: str, found: os.stat_result) -> str:
        """It is only read: another file of the same content does as well."""
        evidence = self.evidence or Evidence()
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise FileMissing(f"it cannot be read: {error.strerror}", object=path) from None
        try:
            here = Marks(found.st_size, found.st_mtime_ns, build_id(fd) if evidence.build_id else b"")
            if here.build_id != evidence.build_id:
                raise FileDiffers(f"another build of the program or library: {self.marks.beside(here)}", object=path)
            if here.size == self.size:
                if evidence.build_id or here.mtime_ns == self.mtime_ns:
                    return ""
                if evidence.digest and digest(fd, found.st_size) == evidence.digest:
                    return ""
        except OSError as error:
            raise FileMissing(f"it cannot be read: {error.strerror}", object=path) from None
        finally:
            os.close(fd)
        if found.st_ino == self.inode and found.st_size > self.size and not evidence.build_id:
            # on a file system that both hosts share, and somebody appends to it
            return f"{path} has grown: {self.marks.beside(here)}"
        raise FileDiffers(f"not the same file: {self.marks.beside(here)}", object=path)

    def _check_shared(self, host: Rebuilder, path: str) -> str:
        """It is written to, and will be written to here from now on: it has to be the very same file."""
        beacon = (host.beacons or {}).get(os.path.dirname(self.path), "")
        try:
            found = os.stat(path)
        except OSError:
            found = None
        if (
            found is not None
            and found.st_ino == self.inode
            and stat.S_ISREG(found.st_mode)
            and same_folder(path, beacon)
        ):
            return ""
        if host.ship:
            from checkpoint.files.shipped import judge_place

            warning = judge_place(host, self.path, self.size, self.mtime_ns)
            host.travelling.add(self.path)
            return warning
        here = _found(path, "regular file")
        if path != self.path:
            return self._pointed_to(path, here)
        marks = self.marks.beside(Marks(here.st_size, here.st_mtime_ns))
        raise FileNotShared(f"open for writing, and not the same file on both hosts: {marks}", object=path)

    def _pointed_to(self, path: str, found: os.stat_result) -> str:
        """``--map`` says that it goes on with this file: so be it, as far as it can."""
        marks = self.marks.beside(Marks(found.st_size, found.st_mtime_ns))
        if found.st_size < self.size and self.access.writes and not self.flags & FileFlag.APPEND:
            raise FileDiffers(f"shorter than at the source: {marks}", object=path)
        return f"{self.path} goes on as {path}, as --map says: {marks}"

    def _check_left(self, host: Rebuilder, path: str, found: os.stat_result) -> str:
        """It was written to, and has to be as the process left it."""
        here = Marks(found.st_size, found.st_mtime_ns)
        if (here.size, here.mtime_ns) == (self.size, self.mtime_ns):
            return ""
        if path != self.path:
            return self._pointed_to(path, found)
        if found.st_ino != self.inode:
            raise FileDiffers(f"not the same file: {self.marks.beside(here)}", object=path)
        if found.st_size < self.size:
            raise FileDiffers(f"shorter than at the source: {self.marks.beside(here)}", object=path)
        return f"{path} has changed: {self.marks.beside(here)}"

    def rebuild(self, host: Rebuilder) -> int:
        path = host.place(self.path)
        # the type is looked at first: opening a fifo of that name would wait for ever
        _found(path, "regular file")
        fd = _open(path, self.flags, path)
        _seek(fd, self.pos, path)
        return fd


def known_evidence(files: Iterable[OpenFile]) -> dict[tuple[str, int, int, int], Evidence]:
    """What is known of the contents of files, by what else tells which they are (FileTable.evidence)."""
    return {
        (file.path, file.size, file.mtime_ns, file.inode): file.evidence
        for file in files
        if isinstance(file, RegularFile) and file.evidence is not None
    }


@register("directory", link=r"/.*", mode=stat.S_IFDIR)
@dataclass(frozen=True, slots=True, kw_only=True)
class Directory(OpenFile):
    """An open directory. Its position is a cookie of the file system, good for the same file system.

    path  of the source
    """

    foreseeable: ClassVar[bool] = True

    path: str

    def validate(self) -> None:
        _absolute(self.path)

    @classmethod
    def examine(cls, view: FdView) -> str:
        path_of(view)
        return ""

    @classmethod
    def capture(cls, view: FdView) -> Self:
        return cls(path=path_of(view), **view.common())

    def check(self, host: Rebuilder) -> str:
        _found(host.path(self.path), "directory")
        return ""

    def rebuild(self, host: Rebuilder) -> int:
        path = host.place(self.path)
        fd = _open(path, self.flags | FileFlag.DIRECTORY, path)
        _seek(fd, self.pos, path)
        return fd
