"""Which pages are missing, and where they are in the image, after whatever an application does with its memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from checkpoint.memory.missing import Missing, Piece

PAGE = 4096
SPACE = 64

pages = st.integers(0, SPACE - 1)
counts = st.integers(1, 16)
acts = st.one_of(
    st.tuples(st.just("take"), pages, counts, st.just(0)),
    st.tuples(st.just("move"), pages, counts, pages),
)


def apart(old: int, new: int, count: int) -> bool:
    return old + count <= new or new + count <= old


@given(st.sets(pages), st.lists(acts, max_size=20))
def test_as_a_map_of_pages_would_have_it(start: set[int], steps: list[tuple[str, int, int, int]]) -> None:
    found = Missing((page * PAGE, (page + 1) * PAGE) for page in sorted(start))
    model = {page: page for page in start}
    for what, page, count, to in steps:
        if what == "take":
            taken = found.take(page * PAGE, (page + count) * PAGE)
            assert sum(piece.size for piece in taken) == PAGE * sum(page <= one < page + count for one in model)
            model = {a: b for a, b in model.items() if not page <= a < page + count}
        elif apart(page, to, count):
            found.move(page * PAGE, to * PAGE, count * PAGE)
            moved = {a - page + to: b for a, b in model.items() if page <= a < page + count}
            kept = {a: b for a, b in model.items() if not page <= a < page + count and not to <= a < to + count}
            model = kept | moved
    assert {
        at // PAGE: (at - piece.start + piece.origin) // PAGE
        for piece in found
        for at in range(piece.start, piece.end, PAGE)
    } == model
    assert found.bytes == len(model) * PAGE
    assert bool(found) is bool(model)
    for origin in range(SPACE):
        places = found.of_origin(origin * PAGE, (origin + 1) * PAGE)
        assert {piece.start // PAGE for piece in places} == {a for a, b in model.items() if b == origin}


def test_what_comes_next_begins_again_at_the_end() -> None:
    found = Missing([(PAGE, 4 * PAGE), (8 * PAGE, 9 * PAGE)])
    assert found.after(0, 2 * PAGE) == Piece(PAGE, 3 * PAGE, PAGE)
    assert found.after(3 * PAGE, 2 * PAGE) == Piece(3 * PAGE, 4 * PAGE, 3 * PAGE)
    assert found.after(4 * PAGE, 2 * PAGE) == Piece(8 * PAGE, 9 * PAGE, 8 * PAGE)
    assert found.after(9 * PAGE, 2 * PAGE) == Piece(PAGE, 3 * PAGE, PAGE)
    assert Missing().after(0, PAGE) is None


def test_a_childs_is_its_own() -> None:
    parent = Missing([(PAGE, 4 * PAGE)])
    child = parent.copy()
    parent.take(PAGE, 2 * PAGE)
    assert (parent.bytes, child.bytes) == (2 * PAGE, 3 * PAGE)
