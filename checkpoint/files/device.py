"""Character devices that hold no state: null, zero, full, random, urandom.

Source: Documentation/admin-guide/devices.txt, major 1 (memory devices).
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, ClassVar, Final, Self

from checkpoint.errors import FileMissing, FileRebuildFailed
from checkpoint.files.abi import REOPEN_FLAGS
from checkpoint.files.base import FdView, OpenFile, register
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["Device"]

#: (major, minor)
_STATELESS: Final = {(1, 3): "null", (1, 5): "zero", (1, 7): "full", (1, 8): "random", (1, 9): "urandom"}


def _number(found: os.stat_result) -> tuple[int, int]:
    return os.major(found.st_rdev), os.minor(found.st_rdev)


@register("device", mode=stat.S_IFCHR, match=lambda view: _number(view.stat) in _STATELESS)
@dataclass(frozen=True, slots=True, kw_only=True)
class Device(OpenFile):
    """An open device without state of its own.

    path   of the source
    major  device number
    minor  device number
    """

    mappable: ClassVar[bool] = True
    foreseeable: ClassVar[bool] = True

    path: str
    major: int
    minor: int

    def validate(self) -> None:
        # An image may not open other devices than these.
        if (self.major, self.minor) not in _STATELESS:
            raise ValueError(f"device {self.major}:{self.minor} cannot be rebuilt")

    @classmethod
    def capture(cls, view: FdView) -> Self:
        major, minor = _number(view.stat)
        return cls(path=view.link, major=major, minor=minor, **view.common())

    def _path(self, host: Rebuilder) -> str:
        # The node may have another path here (a chroot's own /dev); any node with the number is the same device.
        number = (self.major, self.minor)
        usual = f"/dev/{_STATELESS[number]}"
        for path in (host.place(self.path), host.path(self.path), usual):
            try:
                found = os.stat(path)
            except OSError:
                continue
            if stat.S_ISCHR(found.st_mode) and _number(found) == number:
                return path
        raise FileMissing(f"device {self.major}:{self.minor} ({usual}) is not here", object=self.path)

    def check(self, host: Rebuilder) -> str:
        self._path(host)
        return ""

    def rebuild(self, host: Rebuilder) -> int:
        path = self._path(host)
        try:
            return os.open(path, self.flags & REOPEN_FLAGS | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as error:
            raise FileRebuildFailed(f"open: {error.strerror}", object=path) from error
