"""Sets of addresses: what the quick ways give is what sets of numbers give."""

import itertools

import hypothesis
from hypothesis import strategies as st

from checkpoint.memory.pages import chunks
from checkpoint.memory.ranges import difference, intersection, joined, total

#: (start, end) in any order, some of them empty
any_ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)


@st.composite
def disjoint(draw: st.DrawFn, most: int = 60) -> list[tuple[int, int]]:
    """Ascending; neighbours may touch."""
    edges = sorted(draw(st.sets(st.integers(0, 400), max_size=2 * most)))
    found = list(zip(edges[0::2], edges[1::2], strict=False))
    touching = draw(st.sets(st.integers(0, max(0, len(found) - 2)), max_size=5))
    return [
        (start, found[at + 1][0] if at in touching and at + 1 < len(found) else end)
        for at, (start, end) in enumerate(found)
    ]


def numbers(ranges) -> set[int]:  # type: ignore[no-untyped-def]
    return {number for start, end in ranges for number in range(start, end)}


@hypothesis.given(any_ranges | disjoint())
def test_joined(ranges: list[tuple[int, int]]) -> None:
    found = joined(iter(ranges))
    assert numbers(found) == numbers(ranges)
    assert all(start < end for start, end in found)
    assert all(one[1] < other[0] for one, other in itertools.pairwise(found))
    assert total(found) == len(numbers(found))


@hypothesis.given(disjoint(), disjoint(3))
def test_intersection_and_difference(many: list[tuple[int, int]], few: list[tuple[int, int]]) -> None:
    for one, other in ((many, few), (few, many), (many, many[::2])):
        both = list(intersection(iter(one), iter(other)))
        left = list(difference(iter(one), iter(other)))
        assert numbers(both) == numbers(one) & numbers(other)
        assert numbers(left) == numbers(one) - numbers(other)
        for found in (both, left):
            assert all(start < end for start, end in found)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(found))


def test_neighbours_stay_apart_where_they_were() -> None:
    assert list(intersection([(0, 10), (10, 20)], [(5, 15)])) == [(5, 10), (10, 15)]
    assert list(intersection([(5, 15)], [(n, n + 1) for n in range(20)])) == [(n, n + 1) for n in range(5, 15)]
    assert list(difference([(0, 10), (10, 20)], [(30, 40)])) == [(0, 10), (10, 20)]


@hypothesis.given(disjoint(), st.integers(1, 50))
def test_chunks_are_full_and_give_all_in_order(ranges: list[tuple[int, int]], limit: int) -> None:
    found = list(chunks(iter(ranges), limit))
    sizes = [sum(length for _, length in group) for group in found]
    assert all(size == limit for size in sizes[:-1])
    assert all(0 < size <= limit for size in sizes)
    runs = [run for group in found for run in group]
    assert all(length > 0 for _, length in runs)
    assert [n for start, length in runs for n in range(start, start + length)] == sorted(numbers(ranges))
    # nothing is cut but at the end of a group
    assert len(runs) <= len(ranges) + len(found)
