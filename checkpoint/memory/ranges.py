"""Sets of addresses as ascending, disjoint ranges (start, end)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = ["Range", "difference", "intersection", "joined", "total"]

Range = tuple[int, int]


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The union of ranges in any order, neighbours put together."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if start >= end:
            continue
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def intersection(ranges: Iterable[Range], others: Iterable[Range]) -> Iterator[Range]:
    """What is in both; neighbours stay apart."""
    left, right = iter(ranges), iter(others)
    a, b = next(left, None), next(right, None)
    while a is not None and b is not None:
        start, end = max(a[0], b[0]), min(a[1], b[1])
        if start < end:
            yield start, end
        if a[1] < b[1]:
            a = next(left, None)
        else:
            b = next(right, None)


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
