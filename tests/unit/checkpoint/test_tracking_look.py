"""What runs of pages are sorted into, against the same page by page."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from checkpoint.kernel.pagemap import Category
from checkpoint.memory import tracking
from checkpoint.memory.ranges import Range
from checkpoint.memory.vma import PAGE

_SORTS = st.lists(st.sampled_from([*Category, Category(0)]), max_size=3).map(lambda bits: sum({int(b) for b in bits}))
#: (pages of a gap before it, pages of the run, categories)
_RUNS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), _SORTS), max_size=12)


def pages(ranges: list[Range]) -> list[int]:
    """One by one; AssertionError if they are not ascending ranges with something between them."""
    last = 0
    for start, end in ranges:
        assert last < start < end, ranges
        last = end
    return [page for start, end in ranges for page in range(start // PAGE, end // PAGE)]


@given(_RUNS)
def test_each_page_is_where_it_belongs(told: list[tuple[int, int, int]]) -> None:
    runs, sorts, at = [], {}, 1
    for gap, count, sort in told:
        first, at = at + gap, at + gap + count
        runs.append((first * PAGE, at * PAGE, sort))
        sorts |= dict.fromkeys(range(first, at), Category(sort))
    look = tracking._Look(runs)
    there, not_own = Category.PRESENT | Category.SWAPPED, Category.PFNZERO | Category.FILE | Category.GUARD
    held = {page for page, sort in sorts.items() if sort & there and not sort & not_own}
    assert pages(look.held) == sorted(held)
    assert pages(look.blank) == sorted(sorts.keys() - held)
    assert pages(look.full) == sorted(page for page in held if sorts[page] & Category.WRITTEN)
    doubtful = sorted(page for page in held if not sorts[page] & (Category.WRITTEN | Category.PRESENT))
    assert pages(look.doubtful) == doubtful
    assert pages(look.tracked) == sorted(page for page in sorts if sorts[page] & Category.WPALLOWED)
    assert look.all_tracked == all(sort & Category.WPALLOWED for sort in sorts.values())
