"""Which pages of a memory are still missing, and where each of them is in the image.

An application that runs while its pages come moves, unmaps and forgets memory, and forks: a page is missing at the
address where it would be *now*, and is asked for by its *origin*, the address that the image knows.  Values only.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from checkpoint.memory.ranges import Range

__all__ = ["Missing", "Piece"]


class Piece(NamedTuple):
    """Missing pages: [start, end) now, whose first byte is at ``origin`` in the image."""

    start: int
    end: int
    origin: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


class Missing:
    """See the module's docstring. ``ranges``: ascending and disjoint, where the image has them."""

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        #: origin - address
        self._shifts: list[int] = []
        for start, end in ranges:
            self._starts.append(start)
            self._ends.append(end)
            self._shifts.append(0)
        #: every shift that there has been
        self._known = {0}
        #: bytes that are missing
        self.bytes = sum(self._ends) - sum(self._starts)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __iter__(self) -> Iterator[Piece]:
        return (self._piece(index) for index in range(len(self._starts)))

    def _piece(self, index: int) -> Piece:
        start = self._starts[index]
        return Piece(start, self._ends[index], start + self._shifts[index])

    def _span(self, start: int, end: int) -> tuple[int, int]:
        first = bisect.bisect_right(self._ends, start)
        return first, bisect.bisect_left(self._starts, end, first)

    def find(self, start: int, end: int) -> list[Piece]:
        """What of [start, end) is missing."""
        first, last = self._span(start, end)
        return [_cut(self._piece(index), start, end) for index in range(first, last)]

    def take(self, start: int, end: int) -> list[Piece]:
        """The same, and it is not missing any more: it came, or nobody will ask for it."""
        first, last = self._span(start, end)
        if first >= last:
            return []
        inside = [self._piece(index) for index in range(first, last)]
        taken = [_cut(piece, start, end) for piece in inside]
        left = [(a, b, o - a) for piece in inside for a, b, o in _around(piece, start, end)]
        self._starts[first:last] = [a for a, _, _ in left]
        self._ends[first:last] = [b for _, b, _ in left]
        self._shifts[first:last] = [s for _, _, s in left]
        self.bytes -= sum(piece.size for piece in taken)
        return taken

    def move(self, old: int, new: int, length: int) -> None:
        """mremap(2): what was at ``old`` is at ``new`` now, and nothing of what was there is left."""
        moved = self.take(old, old + length)
        self.take(new, new + length)
        for piece in moved:
            self._add(Piece(piece.start - old + new, piece.end - old + new, piece.origin))

    def _add(self, piece: Piece) -> None:
        index = bisect.bisect_left(self._starts, piece.start)
        self._starts.insert(index, piece.start)
        self._ends.insert(index, piece.end)
        self._shifts.insert(index, piece.origin - piece.start)
        self._known.add(piece.origin - piece.start)
        self.bytes += piece.size

    def copy(self) -> Missing:
        """fork(2): the child's."""
        other = Missing()
        other._starts, other._ends, other._shifts = self._starts[:], self._ends[:], self._shifts[:]
        other._known = set(self._known)
        other.bytes = self.bytes
        return other

    def after(self, address: int, limit: int) -> Piece | None:
        """The first piece from ``address`` on, at most ``limit`` bytes; from the beginning if there is none there."""
        if not self._starts:
            return None
        first = bisect.bisect_right(self._ends, address)
        if first == len(self._starts):
            first, address = 0, 0
        start = max(self._starts[first], address)
        end = min(self._ends[first], start + limit)
        return Piece(start, end, start + self._shifts[first])

    def of_origin(self, start: int, end: int) -> list[Piece]:
        """What of the image's [start, end) is missing here, wherever it is now."""
        found: list[Piece] = []
        for shift in self._known:
            found += [p for p in self.find(start - shift, end - shift) if p.origin - p.start == shift]
        return found


def _cut(piece: Piece, start: int, end: int) -> Piece:
    low, high = max(piece.start, start), min(piece.end, end)
    return Piece(low, high, piece.origin + low - piece.start)


def _around(piece: Piece, start: int, end: int) -> Iterator[Piece]:
    """What of a piece is left without [start, end)."""
    if piece.start < start:
        yield Piece(piece.start, start, piece.origin)
    if piece.end > end:
        yield Piece(end, piece.end, piece.origin + end - piece.start)
