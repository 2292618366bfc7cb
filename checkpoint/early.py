"""The memory of an image file that is collected before the stop, and what of it earlier images have already.

::

    EarlyPages(path, parent)   beside the image that will be at ``path``
    take(round)                a round of pre-copy (checkpoint.live), while the processes run
    ended(..)                  for each process, in the stop: its layout, and what is left to be written there
    write(image)               all that was collected, once the rest is in the image
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from checkpoint.files.table import TreeFiles
from checkpoint.image.chain import Chain, Parents, inherits
from checkpoint.image.frames import Kind, PageRun
from checkpoint.image.writer import ImageFile
from checkpoint.live import Remaining, Round
from checkpoint.memory.layout import MemoryLayout
from checkpoint.spool import Piece, Spool

__all__ = ["EarlyPages"]


class EarlyPages:
    """See the module's docstring. ``parent``: the image to build on, with its own; None: there is none."""

    def __init__(self, path: str, parent: Chain | None = None) -> None:
        self._parent = parent
        self._heirs = [] if parent is None else parent.heirs(path)
        self._spool = Spool(os.path.dirname(os.path.abspath(path)), self._known)
        self._ended: list[tuple[MemoryLayout, Remaining]] = []
        #: the record FILES of the image
        self.files = TreeFiles(files=[], contents=[], tables={})
        #: bytes that earlier images have
        self.inherited = 0

    def close(self) -> None:
        """Give up what was collected; the parent stays the caller's. May be repeated."""
        self._spool.close()

    def _known(self, run: PageRun) -> Iterator[Piece]:
        if self._parent is not None:
            for start, end, number in self._parent.known(run):
                # the address is the place: pieces of one image join
                yield Piece(start, end, start, (number if number >= 0 else len(self._heirs) - 1) + 1)

    def take(self, told: Round) -> int:
        """One round; how many bytes it had. ImageNotWritten."""
        return self._spool.take(told)

    def ended(self, layouts: Mapping[int, MemoryLayout], left: Mapping[int, Remaining]) -> None:
        """The processes stand still; those that are not in ``left`` are written whole."""
        self._ended = [(layouts[pid], one) for pid, one in left.items()]

    def write(self, image: ImageFile) -> None:
        """What was collected, into the image. ImageNotWritten."""
        for layout, left in self._ended:
            self._spool.finish(layout, left, self.files)
        wanted = {layout.pid for layout, _ in self._ended}
        pieces = {pid: found for pid, found in self._spool.pieces().items() if pid in wanted}
        if self._heirs and pieces:
            image.record(Kind.PARENTS, Parents(images=tuple(self._heirs)))
            for pid, found in pieces.items():
                theirs = [(one.start, one.end, one.source - 1) for one in found if one.source]
                self.inherited += sum(end - start for start, end, _ in theirs)
                for record in inherits(theirs, pid):
                    image.record(Kind.INHERITED, record)
        image.pages(self._spool.runs(pieces, buffers=image.AHEAD + 2))
