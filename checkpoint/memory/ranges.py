"""Sets of addresses as ascending, disjoint ranges (start, end)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = ["Range", "difference", "intersection", "joined", "total"]

Range = tuple[int, int]


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The union of ranges in any order, neighbours put together."""
    found: list[Range] = []
    # there may be thousands of them in the stop: nothing is made but what is found
    first, last = 0, -1
    for start, end in sorted(ranges):
        if start > last:
            if first < last:
                found.append((first, last))
            first, last = start, end
        elif end > last:
            last = end
    if first < last:
        found.append((first, last))
    return found


def intersection(ranges: Iterable[Range], others: Iterable[Range]) -> Iterator[Range]:
    """What is in both; neighbours stay apart."""
    left, right = iter(ranges), iter(others)
    try:
        a, b = next(left)
        c, d = next(right)
        while True:
            start, end = a if a > c else c, b if b < d else d
            if start < end:
                yield start, end
            if b < d:
                a, b = next(left)
            else:
                c, d = next(right)
    except StopIteration:
        return


def difference(ranges: Iterable[Range], others: Iterable[Range]) -> Iterator[Range]:
    """What is in ``ranges`` and not in ``others``."""
    holes = list(others)
    at = 0
    for start, end in ranges:
        while at < len(holes) and holes[at][1] <= start:
            at += 1
        hole = at
        while hole < len(holes) and holes[hole][0] < end:
            if start < holes[hole][0]:
                yield start, holes[hole][0]
            start = max(start, holes[hole][1])
            hole += 1
        if start < end:
            yield start, end


def total(ranges: Iterable[Range]) -> int:
    """How many addresses there are in disjoint ranges."""
    return sum(end - start for start, end in ranges)
