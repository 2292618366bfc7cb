"""Sets of addresses as ranges, against sets of addresses."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from checkpoint.memory.ranges import Range, difference, intersection, joined, total

#: any ranges, also empty ones, in any order
RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6)).map(lambda one: (one[0], one[0] + one[1])))
#: ascending and disjoint, neighbours apart or side by side
SETS = (
    st.lists(st.integers(0, 60), unique=True, max_size=16)
    .map(sorted)
    .map(lambda cuts: list(zip(cuts[::2], cuts[1::2], strict=False)))
)


def addresses(ranges: Iterable[Range]) -> set[int]:
    return {address for start, end in ranges for address in range(start, end)}


def ascending(ranges: list[Range]) -> bool:
    return all(start < end for start, end in ranges) and all(
        before[1] <= after[0] for before, after in itertools.pairwise(ranges)
    )


@given(RANGES)
def test_the_union_has_no_neighbours(ranges: list[Range]) -> None:
    found = joined(ranges)
    assert addresses(found) == addresses(ranges)
    assert all(start < end for start, end in found)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(found))
    assert total(found) == len(addresses(ranges))


@given(SETS, SETS)
def test_what_is_in_both(ranges: list[Range], others: list[Range]) -> None:
    found = list(intersection(ranges, others))
    assert ascending(found)
    assert addresses(found) == addresses(ranges) & addresses(others)


@given(SETS, SETS)
def test_what_is_in_one_only(ranges: list[Range], others: list[Range]) -> None:
    found = list(difference(ranges, others))
    assert ascending(found)
    assert addresses(found) == addresses(ranges) - addresses(others)
