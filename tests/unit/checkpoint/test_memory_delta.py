"""From one layout to a later one: page by page against a model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from checkpoint.memory.delta import delta, same_process, without
from checkpoint.memory.layout import Mapping, MemoryFields, MemoryLayout
from checkpoint.memory.ranges import difference, intersection, joined, total
from checkpoint.memory.vma import PAGE

BASE = 0x10000000
PAGES = 24
FIELDS = MemoryFields(**dict.fromkeys(MemoryFields.__slots__, 0))


def layout(mappings: list[Mapping], guards: list[tuple[int, int]] = ()) -> MemoryLayout:  # type: ignore[assignment]
    return MemoryLayout(
        pid=7,
        mappings=tuple(mappings),
        guards=tuple(guards),
        fields=FIELDS,
        auxv=b"\0" * 16,
        exe="/exe",
        exe_file=0,
        vdso=b"",
    )


@st.composite
def layouts(draw: st.DrawFn) -> MemoryLayout:
    mappings = []
    page = 0
    while page < PAGES:
        length = draw(st.integers(1, 6))
        start, end = BASE + page * PAGE, BASE + min(PAGES, page + length) * PAGE
        sort = draw(st.sampled_from(["hole", "anonymous", "read", "file", "other", "shared"]))
        # the file's offset goes with the address in some, and not in others
        shift = draw(st.sampled_from([0, PAGE]))
        offset = start - BASE + shift
        if sort == "anonymous":
            mappings.append(Mapping(start=start, end=end, prot=3))
        elif sort == "read":
            mappings.append(Mapping(start=start, end=end, prot=1, flags=("dc",)))
        elif sort in ("file", "other"):
            mappings.append(Mapping(start=start, end=end, prot=3, file=int(sort == "other"), offset=offset))
        elif sort == "shared":
            mappings.append(Mapping(start=start, end=end, prot=3, shared=True, file=0, offset=offset))
        page += length
    guards = [(m.start, m.start + PAGE) for m in mappings if m.file is None and draw(st.booleans())]
    return layout(mappings, guards)


def model(one: MemoryLayout) -> dict[int, tuple[object, ...]]:
    """What is at each page."""
    found: dict[int, tuple[object, ...]] = {}
    for m in one.mappings:
        for at in range(m.start, m.end, PAGE):
            offset = m.offset + at - m.start if m.file is not None else 0
            guard = any(a <= at < b for a, b in one.guards)
            found[at] = (m.prot, m.shared, m.file, offset, m.flags, guard)
    return found


def carried_out(before: MemoryLayout, after: MemoryLayout) -> tuple[dict[int, tuple[object, ...]], set[int]]:
    """(what is at each page when the change is made, pages that keep their bytes)."""
    change = delta(before, after, lambda a, b: a == b)
    pages = model(before)
    for start, end in change.gone:
        for at in range(start, end, PAGE):
            del pages[at]  # KeyError: unmapping what is not there
    stays = set(pages)
    fresh = model(layout(list(change.fresh), list(change.guards)))
    assert not fresh.keys() & pages.keys(), "something is mapped over something"
    return pages | fresh, stays


@given(layouts(), layouts())
def test_the_change_leads_to_the_later_layout(before: MemoryLayout, after: MemoryLayout) -> None:
    pages, stays = carried_out(before, after)
    assert pages == model(after)
    kept = {at for m in delta(before, after, lambda a, b: a == b).kept for at in range(m.start, m.end, PAGE)}
    assert kept == stays
    # nothing is thrown away that could stay, but for guards that came or went
    old, new = model(before), model(after)
    assert stays == {at for at in old.keys() & new.keys() if old[at] == new[at]}


@given(layouts())
def test_without_a_change_everything_stays(one: MemoryLayout) -> None:
    change = delta(one, one, lambda a, b: a == b)
    assert (change.gone, change.fresh, change.guards) == ((), (), ())


@given(layouts(), st.lists(st.tuples(st.integers(0, PAGES), st.integers(1, 4)), max_size=2), st.booleans())
def test_most_of_it_is_still_there(one: MemoryLayout, spots: list[tuple[int, int]], comes: bool) -> None:
    other = without(one, joined((BASE + a * PAGE, BASE + (a + n) * PAGE) for a, n in spots))
    before, after = (other, one) if comes else (one, other)
    pages, stays = carried_out(before, after)
    assert pages == model(after)
    old, new = model(before), model(after)
    assert stays == {at for at in old.keys() & new.keys() if old[at] == new[at]}


@given(layouts(), layouts())
def test_another_file_is_another_mapping(before: MemoryLayout, after: MemoryLayout) -> None:
    change = delta(before, after, lambda a, b: False)
    assert all(m.file is None for m in change.kept)


@given(layouts(), st.lists(st.tuples(st.integers(0, PAGES), st.integers(1, 4)), max_size=4))
def test_memory_made_anew_is_taken_out(one: MemoryLayout, spots: list[tuple[int, int]]) -> None:
    holes = joined((BASE + a * PAGE, BASE + (a + n) * PAGE) for a, n in spots)
    left = model(without(one, holes))
    assert left == {at: what for at, what in model(one).items() if not any(a <= at < b for a, b in holes)}


def test_exec_makes_another_process() -> None:
    one = layout([Mapping(start=BASE, end=BASE + PAGE, prot=5, name="[vdso]")])
    other = layout([Mapping(start=BASE + PAGE, end=BASE + 2 * PAGE, prot=5, name="[vdso]")])
    assert same_process(one, one)
    assert not same_process(one, other)


sets = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=8).map(
    lambda pairs: [(a, a + n) for a, n in pairs]
)


def members(ranges: list[tuple[int, int]]) -> set[int]:
    return {n for a, b in ranges for n in range(a, b)}


@given(sets, sets)
def test_ranges_are_sets(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    a, b = joined(one), joined(other)
    assert members(a) == members(one)
    assert total(a) == len(members(one))
    assert members(list(difference(a, b))) == members(one) - members(other)
    assert members(list(intersection(a, b))) == members(one) & members(other)
