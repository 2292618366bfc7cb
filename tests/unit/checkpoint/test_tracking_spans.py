"""Mappings put together for one look."""

from __future__ import annotations

from checkpoint.memory.tracking import LARGE, _spans

PAGE = 4096


def test_neighbours_are_looked_at_together_also_across_a_hole() -> None:
    assert _spans([(0, 4 * PAGE, False), (4 * PAGE, 5 * PAGE, True), (9 * PAGE, 10 * PAGE, False)], []) == [
        (0, 10 * PAGE, False)
    ]


def test_large_anonymous_memory_is_looked_at_alone_and_without_its_files() -> None:
    large = (PAGE, PAGE + LARGE, True)
    after = (large[1], large[1] + PAGE, False)
    assert _spans([(0, PAGE, False), large, after], []) == [(0, PAGE, False), large, after]


def test_what_lies_between_is_not_looked_at() -> None:
    areas = [(0, PAGE, False), (3 * PAGE, 4 * PAGE, False), (6 * PAGE, 7 * PAGE, False)]
    assert _spans(areas, [(PAGE, 2 * PAGE)]) == [areas[0], (3 * PAGE, 7 * PAGE, False)]
    assert _spans(areas, [(8 * PAGE, 9 * PAGE)]) == [(0, 7 * PAGE, False)]
    assert _spans(areas, [(PAGE, 2 * PAGE), (5 * PAGE, 6 * PAGE)]) == areas
