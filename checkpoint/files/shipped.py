"""``--ship``: regular files that the processes write to, and that travel with them because the target has them not.

The content is taken in the stop, like that of a deleted file. At the target it is written beside its place under a
passing name, and appears at the release, by rename(2): until then nothing has changed that somebody else could see.
Owner, mode, time of modification and extended attributes come along. A file that is at the place already and has
another content is never replaced, unless ``--overwrite`` says so.

The original's file stays where it is: a copy that nobody writes to any more.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterable
from dataclasses import field
from typing import TYPE_CHECKING, ClassVar, Final, Self

from checkpoint.errors import FileMissing, FileNotShared, FileRebuildFailed, ShipWouldOverwrite
from checkpoint.files.base import FdView, OpenFile, register
from checkpoint.files.content import ContentKind
from checkpoint.files.identity import shown
from checkpoint.files.policy import Policy
from checkpoint.files.regular import RegularFile, path_of, volatile
from checkpoint.namespaces.ways import real
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["Shipment", "ShippedFile", "judge_place", "refuse_new"]

_log = logging.getLogger(__name__)

_PIECE: Final = 1 << 20
_LARGE: Final = 256 << 20
#: attributes that a copy cannot have, or gets by itself
_NOT_COPIED: Final = ("system.nfs4_acl", "security.selinux", "security.ima", "security.evm")


def _ships(view: FdView) -> bool:
    return view.table.ships(view) and not volatile(view)


@register("shipped file", link=r"/.*", mode=stat.S_IFREG, match=_ships)
@dataclass(frozen=True, slots=True, kw_only=True)
class ShippedFile(OpenFile):
    """A regular file that travels along. Every description of it refers to the same content.

    path        of the source
    content     index of its bytes
    mtime_ns    time of modification
    attributes  extended attributes
    """

    mappable: ClassVar[bool] = True

    path: str
    content: int
    mtime_ns: int
    attributes: dict[str, bytes] = field(default_factory=dict)

    def validate(self) -> None:
        if not self.path.startswith("/") or "\0" in self.path:
            raise ValueError(f"{self.path!r} is not an absolute path")
        if not -(1 << 63) <= self.mtime_ns < 1 << 63 or len(self.attributes) > 1000:
            raise ValueError("time or attributes of a file out of range")

    @classmethod
    def examine(cls, view: FdView) -> str:
        path_of(view)
        size = view.stat.st_size
        return f"{view.link}: its {size} bytes travel along, while the process stands still" if size > _LARGE else ""

    @classmethod
    def capture(cls, view: FdView) -> Self:
        path = path_of(view)
        return cls(
            path=path,
            content=view.table.content(view, ContentKind.SHIPPED, path),
            mtime_ns=view.stat.st_mtime_ns,
            attributes=_attributes(view.magic),
            **view.common(),
        )

    def check(self, host: Rebuilder) -> str:
        size = host.records.contents[self.content].size
        return judge_place(host, self.path, size, self.mtime_ns)

    def rebuild(self, host: Rebuilder) -> int:
        _shipment(self, host)
        fd = host.reopen(host.content(self.content), self.flags)
        host.seek(fd, self.pos)
        return fd

    def release(self, host: Rebuilder, fd: int) -> None:
        # of an earlier rebuild (Rebuilder.adopt) nothing is known but the names, and whoever adopts publishes those
        made = host.shared.get(("shipped", self.content))
        if isinstance(made, Shipment):
            made.publish()


def judge_place(host: Rebuilder, path: str, size: int, mtime_ns: int) -> str:
    """Whether a file of this size and time may be put at ``path`` of the source: a warning, or FileMissing (there is no
    such directory), ShipWouldOverwrite."""
    place = real(host.path(path))
    try:
        found = os.stat(place)
    except FileNotFoundError:
        folder = os.path.dirname(place)
        if not os.path.isdir(folder):
            raise FileMissing("the directory of a file that is to be shipped is not here", object=folder) from None
        return ""
    if not stat.S_ISREG(found.st_mode):
        raise ShipWouldOverwrite("what is here is not a regular file", object=place)
    if (found.st_size, found.st_mtime_ns) == (size, mtime_ns):
        return ""  # compared by its bytes once they have come
    marks = f"here {shown(found.st_size, found.st_mtime_ns)}, at the source {shown(size, mtime_ns)}"
    if not host.overwrite:
        raise ShipWouldOverwrite(f"another file is here: {marks}", object=place)
    return f"{place} is replaced: {marks}"


def _shipment(record: ShippedFile, host: Rebuilder) -> Shipment:
    made = host.shared.get(("shipped", record.content))
    if not isinstance(made, Shipment):
        made = Shipment(record, host)
        host.shared["shipped", record.content] = made
    return made


class Shipment:
    """One file on its way to its place."""

    def __init__(self, record: ShippedFile, host: Rebuilder) -> None:
        self._record = record
        self._host = host
        self.place = real(host.path(record.path))
        # the content is made under a passing name of its own
        self.staged = os.readlink(f"/proc/self/fd/{host.content(record.content)}")
        self._published = False
        host.shipments.append(self)
        host.on_abort(self.remove)

    def complete(self) -> None:
        """All bytes have come: the rest of what the file is, on disk. ShipWouldOverwrite if the file at its place has
        another content; FileRebuildFailed."""
        record = self._record
        content = self._host.records.contents[record.content]
        fd = self._host.content(record.content)
        try:
            if os.path.lexists(self.place) and not self._host.overwrite and not _equal(fd, self.place):
                raise ShipWouldOverwrite("the file that is here has another content", object=self.place)
            for name, value in record.attributes.items():
                self._give(fd, name, value)
            os.fchown(fd, content.uid, content.gid)
            os.fchmod(fd, content.mode)
            os.utime(fd, ns=(record.mtime_ns, record.mtime_ns))
            # the program may have been promised that it is on disk (fsync)
            os.fsync(fd)
        except OSError as error:
            raise FileRebuildFailed(f"shipped file: {error.strerror}", object=self.place) from error

    def _give(self, fd: int, name: str, value: bytes) -> None:
        try:
            os.setxattr(fd, name, value)
        except OSError as error:
            self._host.warn(f"{self.place} is without its attribute {name}: {error.strerror}")

    def publish(self) -> None:
        """To its place. The processes are past the point where giving up would help: what fails is told."""
        if self._published:
            return
        self._published = True
        try:
            os.rename(self.staged, self.place)
            folder = os.open(os.path.dirname(self.place), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            self._host.warn(f"{self.place} could not be put at its place, it is {self.staged}: {error.strerror}")

    def remove(self) -> None:
        """Nothing is left of it."""
        if not self._published:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.staged)


def _equal(fd: int, path: str) -> bool:
    """Whether the file at ``path`` is regular and has the same bytes."""
    with contextlib.ExitStack() as stack:
        other = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        stack.callback(os.close, other)
        found = os.fstat(other)
        if not stat.S_ISREG(found.st_mode) or found.st_size != os.fstat(fd).st_size:
            return False
        at = 0
        while piece := os.pread(fd, _PIECE, at):
            if os.pread(other, len(piece), at) != piece:
                return False
            at += len(piece)
    return True


def _attributes(magic: str) -> dict[str, bytes]:
    try:
        names = os.listxattr(magic)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EPERM):
            return {}
        raise
    found = {}
    for name in names:
        if name in _NOT_COPIED:
            continue
        try:
            found[name] = os.getxattr(magic, name)
        except OSError as error:
            _log.debug("attribute %s of %s: %s", name, magic, error)
    return found


def refuse_new(files: Iterable[OpenFile], policy: Policy) -> None:
    """FileNotShared for a file that was opened for writing since the target was asked, where it shares nothing with
    us."""
    if policy.shared is None:
        return
    for file in files:
        if isinstance(file, RegularFile) and file.written and policy.stays_behind(file.path):
            raise FileNotShared("opened for writing since the target was asked", object=file.path)
