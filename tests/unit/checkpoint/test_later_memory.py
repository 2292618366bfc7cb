"""Which pages of an image are left for later, and which are written before the processes run."""

from __future__ import annotations

import array

from hypothesis import given
from hypothesis import strategies as st

from checkpoint.image.lazypages import FileIndex, ImagePages
from checkpoint.latermemory import LaterMemory
from checkpoint.memory import lazy
from checkpoint.memory.layout import Mapping, MemoryFields, MemoryLayout
from checkpoint.memory.ranges import Range, difference, intersection, joined, total

MIB = 1 << 20
FIELDS = MemoryFields(**dict.fromkeys(MemoryFields.__slots__, 0))
#: a heap, a large area of data, a stack of a thread of which little is used, and what is too small to wait
HEAP, DATA, STACK, SMALL = (
    (0x10000000, 0x10000000 + 3 * MIB),
    (0x20000000, 0x20000000 + 64 * MIB),
    (0x30000000, 0x30000000 + 32 * MIB),
    (0x40000000, 0x40000000 + MIB // 2),
)
USED = (STACK[1] - MIB, STACK[1])


def layout(pid: int = 7, areas: tuple[Range, ...] = (HEAP, DATA, STACK, SMALL)) -> MemoryLayout:
    mappings = tuple(Mapping(start=start, end=end, prot=3) for start, end in areas)
    return MemoryLayout(
        pid=pid, mappings=mappings, guards=(), fields=FIELDS, auxv=b"\0" * 16, exe="/exe", exe_file=0, vdso=b""
    )


class Source(ImagePages):
    """Has pages, and notes which of them are wanted at once."""

    def __init__(self, have: dict[int, list[Range]]) -> None:
        columns = {pid: array.array("Q", [x for one in ranges for x in one]).tobytes() for pid, ranges in have.items()}
        super().__init__(-1, FileIndex(have=columns, runs=dict.fromkeys(columns, b"")), "image")
        self.wanted: dict[int, list[Range]] = {}

    def read_ahead(self, pid: int, ranges: object) -> None:
        assert isinstance(ranges, list)
        self.wanted[pid] = ranges


def test_small_areas_are_brought_at_once_and_the_large_one_waits() -> None:
    source, later = Source({7: [HEAP, DATA, USED, SMALL]}), LaterMemory()
    later.reads(source)
    later.laid_out({7: layout()})
    assert source.wanted == {7: [HEAP, USED, SMALL]}
    assert later.bytes == DATA[1] - DATA[0]


def test_what_is_brought_at_once_does_not_grow_with_the_tree() -> None:
    pids = range(100, 140)
    layouts = {pid: layout(pid) for pid in pids}
    source, later = Source({pid: [HEAP, DATA, USED, SMALL] for pid in pids}), LaterMemory()
    later.reads(source)
    later.laid_out(layouts)
    could_wait = sum(total(intersection(ranges, lazy.areas(layouts[pid]))) for pid, ranges in source.wanted.items())
    assert 4 * MIB < could_wait <= 8 * MIB
    everything = len(pids) * sum(end - start for start, end in (HEAP, DATA, USED, SMALL))
    assert later.bytes == everything - sum(map(total, source.wanted.values()))


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 30)), max_size=8),
    st.lists(st.tuples(st.integers(0, 230), st.integers(1, 20)), max_size=12),
)
def test_those_with_the_fewest_pages_come_first(places: list[tuple[int, int]], held: list[tuple[int, int]]) -> None:
    def ranges(found: list[tuple[int, int]]) -> list[Range]:
        return joined((HEAP[0] + at * MIB, HEAP[0] + (at + length) * MIB) for at, length in found)

    one, pages = layout(areas=tuple(ranges(places))), ranges(held)
    soon = lazy.soon([one], {7: pages})[7]
    areas = lazy.areas(one)
    assert soon == sorted(set(soon) & set(areas))

    def size(area: Range) -> int:
        return total(intersection(pages, [area]))

    assert sum(map(size, soon)) <= 8 * MIB
    for left in difference(areas, soon):
        assert all(size(area) <= size(left) for area in soon)
        assert sum(map(size, soon)) + size(left) > 8 * MIB
