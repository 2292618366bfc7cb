"""memfd: a file in memory that has no path, perhaps sealed.

Source: mm/memfd.c; the link reads ``/memfd:NAME (deleted)``. Descriptions and mappings of one memfd share one content.
Its pages may be out of the pool of huge pages (MFD_HUGETLB).
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, ClassVar, Self

from checkpoint.files.abi import Magic, filesystem_magic
from checkpoint.files.base import FdView, OpenFile, register
from checkpoint.files.content import DELETED, ContentKind, reopened
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["Memfd"]

_PREFIX = "/memfd:"


@register("memfd", link=r"/memfd:.*", mode=stat.S_IFREG, match=lambda view: view.stat.st_nlink == 0)
@dataclass(frozen=True, slots=True, kw_only=True)
class Memfd(OpenFile):
    """One description of a memfd, or the one behind a mapping.

    content  index of its bytes, name, size and seals
    """

    mappable: ClassVar[bool] = True

    content: int

    @classmethod
    def capture(cls, view: FdView) -> Self:
        name = view.link[len(_PREFIX) :].removesuffix(DELETED)
        with reopened(view.magic, view.stat) as fd:
            # the block is as large as the page; but also where tmpfs has transparent huge pages
            huge = view.stat.st_blksize.bit_length() - 1 if filesystem_magic(fd) == Magic.HUGETLBFS else 0
        return cls(content=view.table.content(view, ContentKind.MEMFD, name, huge), **view.common())

    def rebuild(self, host: Rebuilder) -> int:
        fd = host.reopen(host.content(self.content), self.flags)
        host.seek(fd, self.pos)
        return fd
