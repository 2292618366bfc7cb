"""The memory of processes that still run, collected before a checkpoint's stop (pre-copy into a file).

What the target of a migration is for the rounds of :mod:`checkpoint.live`, this is for a checkpoint: it follows each
round (layouts, pages, pages that are void) and at the end knows of each page where its bytes are: in a file without a
name, beside the image, or, unchanged, in an earlier image.  Then the stop has to write only what was written since.

Pages are remembered in the order in which they came; which of them count is worked out once, at the end.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from checkpoint.errors import ImageNotWritten
from checkpoint.files.table import TreeFiles
from checkpoint.image.frames import DATA_MAX, PageRun, Space, aligned_buffer
from checkpoint.live import Remaining, Round
from checkpoint.memory import lazy
from checkpoint.memory.delta import delta, without
from checkpoint.memory.layout import MemoryLayout
from checkpoint.memory.pages import chunks
from checkpoint.memory.ranges import Range, difference, intersection, joined
from checkpoint.records import LiveTree, fits, same_file
from tcpstate.slotted import dataclass

__all__ = ["Piece", "Spool", "resolve"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Where the bytes of [start, end) are.

    place   of the first of them, in whatever ``source`` numbers; None: they are nowhere (void)
    source  0: the spool's file; n: the n-th image
    """

    start: int
    end: int
    place: int | None
    source: int = 0


#: what is known of the pages in a run: those that an earlier image has are told as its pieces
Known = Callable[[PageRun], Iterable[Piece]]


class Spool:
    """See the module's docstring.

    directory  where the file without a name is made: the image's
    known      tells which pages of a run an earlier image has, byte for byte
    """

    def __init__(self, directory: str, known: Known = lambda run: ()) -> None:
        self._known = known
        self._told: LiveTree | None = None
        self._layouts: dict[int, MemoryLayout] = {}
        self._logs: dict[int, list[Piece]] = {}
        self._end = 0
        try:
            self._fd = os.open(directory or ".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ImageNotWritten(f"no room for pages beside the image: {error.strerror}", object=directory) from error

    def close(self) -> None:
        """Give up the file. May be repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # -- rounds

    def take(self, told: Round) -> int:
        """One round; how many bytes it had. ImageNotWritten."""
        tree = told.tree
        if self._told is None or not fits(self._told, (one.task for one in tree.processes), tree.layouts, tree.spaces):
            self._logs.clear()
            self._layouts = dict(tree.layouts)
        else:
            files = self._told.files.files
            for one in tree.processes:
                if one.layout is not None:
                    self._void(one.task.pid, one.stale)
                    self._layouts[one.task.pid] = without(self._layouts[one.task.pid], one.stale)
                    self._change(one.layout, lambda a, b: same_file(files[a], tree.files.files[b]))
        self._told = tree
        for drop in told.drops:
            self._void(drop.id, [(start, start + length) for start, length in drop.runs])
        size = 0
        for run in told.runs:
            self._write(run)
            size += len(run.data)
        return size

    def _change(self, now: MemoryLayout, same: Callable[[int, int], bool]) -> None:
        change = delta(self._layouts[now.pid], now, same)
        self._void(now.pid, itertools.chain(change.gone, ((m.start, m.end) for m in change.fresh)))
        self._layouts[now.pid] = now

    def _void(self, pid: int, ranges: Iterable[Range]) -> None:
        self._logs.setdefault(pid, []).extend(Piece(start, end, None) for start, end in ranges)

    def _write(self, run: PageRun) -> None:
        log = self._logs.setdefault(run.id, [])
        elsewhere = list(self._known(run))
        log += elsewhere
        at = 0
        for start, length in run.runs:
            for low, high in difference([(start, start + length)], ((one.start, one.end) for one in elsewhere)):
                log.append(Piece(low, high, self._end))
                self._put(run.data[at + low - start : at + high - start])
            at += length

    def _put(self, data: memoryview) -> None:
        while data:
            try:
                count = os.pwrite(self._fd, data, self._end)
            except OSError as error:
                raise ImageNotWritten(f"no room for pages beside the image: {error.strerror}") from error
            self._end += count
            data = data[count:]

    # -- the end

    def finish(self, now: MemoryLayout, left: Remaining, files: TreeFiles) -> None:
        """The layout of a process that stood still, with the files of its tree, and what is not here of it."""
        pid, told = now.pid, [] if self._told is None else self._told.files.files
        self._void(pid, left.stale)
        self._layouts[pid] = without(self._layouts[pid], left.stale)
        self._change(now, lambda a, b: same_file(told[a], files.files[b]))
        for drop in left.drops:
            self._void(pid, [(start, start + length) for start, length in drop.runs])
        self._void(pid, left.ranges)

    def pieces(self) -> Mapping[int, list[Piece]]:
        """By process: where its pages are, by address. After :meth:`finish` of each."""
        return {pid: resolve(log) for pid, log in self._logs.items() if pid in self._layouts}

    def runs(self, pieces: Mapping[int, Sequence[Piece]], *, buffers: int = 1) -> Iterator[PageRun]:
        """Those of the pieces that are in the file; a run is valid until the ``buffers``-th after it is asked for.

        First what a lazy restore needs at once, in frames of its own: it would read many more for it otherwise.
        """
        spaces = [aligned_buffer(DATA_MAX) for _ in range(buffers)]
        turn = 0
        there = {pid: joined((one.start, one.end) for one in wanted) for pid, wanted in pieces.items()}
        soon = lazy.soon([self._layouts[pid] for pid in pieces], there)
        for pid, wanted in pieces.items():
            mine = sorted((x for x in wanted if x.source == 0 and x.place is not None), key=lambda one: one.start)
            later = list(difference(lazy.areas(self._layouts[pid]), soon[pid]))
            for runs in self._frames([(one.start, one.end) for one in mine], later):
                data = spaces[turn][: sum(length for _, length in runs)]
                turn = (turn + 1) % buffers
                at = 0
                for start, length in runs:
                    one = mine[bisect.bisect_right(mine, start, key=lambda one: one.start) - 1]
                    if one.place is None or not one.start <= start < start + length <= one.end:
                        raise RuntimeError(f"page {start:x} is nowhere")
                    self._get(one.place + start - one.start, data[at : at + length])
                    at += length
                yield PageRun(space=Space.MEMORY, id=pid, runs=runs, data=data)

    @staticmethod
    def _frames(ranges: Sequence[Range], later: Sequence[Range]) -> Iterator[tuple[tuple[int, int], ...]]:
        """The runs of frames: those of pages that do not come later, then those of all others."""
        yield from chunks(difference(ranges, later))
        yield from chunks(intersection(ranges, later))

    def _get(self, place: int, data: memoryview) -> None:
        while data:
            count = os.preadv(self._fd, [data], place)
            if not count:
                raise ImageNotWritten("the pages beside the image have become fewer")
            place += count
            data = data[count:]


def resolve(log: Sequence[Piece]) -> list[Piece]:
    """Which pieces count, by address: of those that overlap the later one does. Void ones are left out."""
    edges = sorted({edge for one in log for edge in (one.start, one.end)})
    order = sorted(range(len(log)), key=lambda number: log[number].start)
    open_: list[tuple[int, Piece]] = []
    found: list[Piece] = []
    waiting = iter(order)
    number = next(waiting, None)
    for start, end in itertools.pairwise(edges):
        while number is not None and log[number].start <= start:
            heapq.heappush(open_, (-number, log[number]))
            number = next(waiting, None)
        while open_ and open_[0][1].end <= start:
            heapq.heappop(open_)
        one = open_[0][1] if open_ else None
        if one is None or one.place is None:
            continue
        place = one.place + start - one.start
        last = found[-1] if found else None
        if (
            last is not None
            and last.place is not None
            and (last.end, last.source, last.place + last.end - last.start) == (start, one.source, place)
        ):
            found[-1] = Piece(last.start, end, last.place, one.source)
        else:
            found.append(Piece(start, end, place, one.source))
    return found
