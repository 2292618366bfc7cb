"""What /proc tells of mappings, the layout's checks, and the cutting of ranges into runs."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.errors import (
    BadLayout,
    DeviceMapping,
    HugePageMapping,
    OtherVdso,
    Refused,
    SealedMapping,
    SecretMemory,
    StillLazy,
    UnsupportedMemory,
    UserfaultMapping,
)
from checkpoint.image.frames import PageRun, Space
from checkpoint.memory import scan, vdso, verdicts
from checkpoint.memory.compare import Region, differences
from checkpoint.memory.layout import Mapping, MemoryFields, MemoryLayout
from checkpoint.memory.pages import PageWriter, chunks
from checkpoint.memory.vma import (
    VDSO,
    Vma,
    find_named,
    foresee,
    parse_maps,
    parse_smaps,
    read_maps,
    with_flags,
    without,
)
from tcpstate import codec
from tcpstate.errors import BadRecord

SMAPS = b"""\
5620bf5db000-5620bf5dc000 r--p 00001000 fe:01 1234                       /usr/bin/a file-with dashes
Size:                  4 kB
KernelPageSize:        4 kB
ProtectionKey:         0
VmFlags: rd mr mw me sd
7f0000000000-7f0000002000 rw-s 00000000 00:05 77                         /dev/zero (deleted)
Size:                  8 kB
ProtectionKey:         3
VmFlags: rd wr sh mr mw me ms sd
7f0000002000-7f0000003000 ---p 00000000 00:00 0
Size:                  4 kB
ProtectionKey:         0
VmFlags: mr mw me nr sd
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
Size:                132 kB
ProtectionKey:         0
VmFlags: rd wr mr mw me gd ac
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
Size:                  4 kB
ProtectionKey:         0
VmFlags: ex
"""


def test_smaps_are_read_with_flags_and_keys() -> None:
    vmas = parse_smaps(SMAPS)
    assert [v.name for v in vmas] == [
        "/usr/bin/a file-with dashes",
        "/dev/zero (deleted)",
        "",
        "[stack]",
        "[vsyscall]",
    ]
    first, shared, none, stack, _ = vmas
    assert (first.start, first.end, first.prot, first.offset) == (0x5620BF5DB000, 0x5620BF5DC000, 1, 0x1000)
    assert (first.dev, first.inode, first.shared, first.anonymous) == (os.makedev(0xFE, 1), 1234, False, False)
    assert (shared.shared, shared.pkey, shared.permissions, shared.anonymous) == (True, 3, "rw-s", False)
    assert (none.prot, none.anonymous, none.size) == (0, True, 4096)
    assert stack.flags == {"rd", "wr", "mr", "mw", "me", "gd", "ac"}
    assert [v.key for v in parse_maps(SMAPS)] == [v.key for v in vmas]


def test_smaps_of_a_machine_without_protection_keys() -> None:
    text = b"\n".join(line for line in SMAPS.split(b"\n") if not line.startswith(b"ProtectionKey"))
    assert [v.pkey for v in parse_smaps(text)] == [0] * 5


def test_smaps_that_were_cut_are_not_believed() -> None:
    with pytest.raises(ValueError, match="zip"):
        parse_smaps(SMAPS[: SMAPS.rindex(b"VmFlags")])


def test_our_own_maps_agree_with_our_own_smaps() -> None:
    with open("/proc/self/maps", "rb") as maps:
        found = parse_maps(maps.read())
    assert len(found) > 20
    assert any(v.name == "[vdso]" and v.special for v in found)
    assert all(a.end <= b.start for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("name", "flags", "pkey", "error"),
    [
        ("/secretmem (deleted)", "", 0, SecretMemory),
        ("[uprobes]", "", 0, UnsupportedMemory),
        ("anon_inode:[io_uring]", "", 0, UnsupportedMemory),
        ("anon_inode:[perf_event]", "", 0, UnsupportedMemory),
        ("socket:[1]", "", 0, UnsupportedMemory),
        ("/mnt/huge/file", "ht", 0, HugePageMapping),
        ("", "um", 0, StillLazy),
        ("", "uw", 0, UserfaultMapping),
        ("/dev/fb0", "io pf", 0, DeviceMapping),
        ("/dev/mem", "mm", 0, DeviceMapping),
        ("", "ss", 0, UnsupportedMemory),
        ("", "sl", 0, SealedMapping),
        ("[vdso]", "sl", 0, SealedMapping),
        ("", "", 4, UnsupportedMemory),
    ],
)
def test_each_mapping_that_cannot_be_moved_is_refused_by_name(
    name: str, flags: str, pkey: int, error: type[Refused]
) -> None:
    vma = Vma(0x10000, 0x20000, 3, False, 0, 0, 0, name, frozenset(flags.split()), pkey)
    with pytest.raises(error) as caught:
        verdicts.check(12, vma)
    assert caught.value.object == "pid 12 map 10000-20000"


@pytest.mark.parametrize(
    "vma",
    [
        Vma(0x10000, 0x20000, 3, False, 0, 0, 0, "[heap]", frozenset({"rd", "wr", "ac"})),
        Vma(0x10000, 0x20000, 1, False, 0, 0, 0, "[vvar]", frozenset({"pf", "io", "de", "dd"})),
        Vma(0x10000, 0x20000, 4, False, 0, 0, 0, "", frozenset({"ex"}), 1),
        Vma(0x10000, 0x20000, 4, False, 0, 0, 0, "[vsyscall]", frozenset({"ex"})),
        Vma(0x10000, 0x20000, 3, True, 0, 5, 9, "/dev/zero (deleted)", frozenset({"sh"})),
    ],
)
def test_ordinary_mappings_pass(vma: Vma) -> None:
    verdicts.check(12, vma)


def fields(**changes: int) -> MemoryFields:
    return MemoryFields(**(dict.fromkeys(MemoryFields.__slots__, 0x1000) | changes))


def layout(*mappings: Mapping, **changes: object) -> MemoryLayout:
    values = {
        "pid": 5,
        "mappings": mappings,
        "fields": fields(),
        "auxv": b"a" * 16,
        "exe": "/bin/x",
        "exe_file": 0,
        "vdso": b"",
    }
    return MemoryLayout(**(values | changes))  # type: ignore[arg-type]


def test_a_layout_survives_the_codec() -> None:
    value = layout(
        Mapping(start=0x1000, end=0x3000, prot=3, flags=("dc", "nr")),
        Mapping(start=0x3000, end=0x4000, prot=1, file=2, offset=0x5000, shared=True, name="/x"),
        guards=((0x1000, 0x2000),),
    )
    assert codec.unpack(MemoryLayout, codec.pack(value)) == value


@pytest.mark.parametrize(
    "change",
    [
        {"start": 0},
        {"start": 0x3000},
        {"start": 0x1001},
        {"end": 0x2001},
        {"end": 1 << 47},
        {"end": 1 << 64},
        {"start": -0x1000},
        {"prot": 8},
        {"prot": -1},
        {"offset": 5},
        {"offset": 1 << 63},
        {"offset": -0x1000},
        {"flags": ["xx"]},
        {"flags": ["um"]},
        {"huge": 21},
        {"huge": 11},
        {"shared": True},
        {"file": -1},
        {"file": 1, "name": "[vdso]"},
    ],
)
def test_a_hostile_mapping_is_a_bad_record(change: dict[str, object]) -> None:
    good = Mapping(start=0x1000, end=0x2000, prot=1)
    with pytest.raises(BadRecord):
        codec.from_plain(Mapping, codec.to_plain(good) | change)


def test_hostile_layouts_are_bad_records() -> None:
    a, b = Mapping(start=0x1000, end=0x3000, prot=1), Mapping(start=0x2000, end=0x4000, prot=1)
    for make in (
        lambda: layout(a, b),
        lambda: layout(b, a),
        lambda: layout(a, pid=0),
        lambda: layout(a, auxv=b""),
        lambda: layout(a, auxv=b"x" * 2000),
        lambda: layout(a, exe_file=-1),
        lambda: layout(a, guards=((0x2000, 1 << 47),)),
        lambda: layout(*(Mapping(start=i << 12, end=i + 1 << 12, prot=5, name="[vdso]") for i in (1, 2))),
        lambda: layout(a, guards=((0x2000, 0x2000),)),
        lambda: layout(a, guards=((0x2001, 0x3000),)),
        lambda: fields(brk=-1),
        lambda: fields(brk=1 << 63),
    ):
        with pytest.raises(ValueError, match=r"(?i)mapping|overlaps|range|cannot|twice"):
            make()


@given(st.lists(st.tuples(st.integers(1, 700), st.integers(1, 700)), max_size=12), st.integers(1, 256))
def test_chunks_cover_the_ranges_in_order(gaps: list[tuple[int, int]], limit: int) -> None:
    def ranges() -> Iterator[tuple[int, int]]:
        at = 0
        for gap, size in gaps:
            yield (at + gap) * 4096, (at + gap + size) * 4096
            at += gap + size

    groups = list(chunks(ranges(), limit * 4096))
    assert all(sum(length for _, length in group) == limit * 4096 for group in groups[:-1])
    assert all(0 < sum(length for _, length in group) <= limit * 4096 for group in groups)
    pages = [p for group in groups for start, length in group for p in range(start, start + length, 4096)]
    assert pages == [p for start, end in ranges() for p in range(start, end, 4096)]


def areas(text: str) -> list[Mapping]:
    """One page per character: a, b anonymous, f file, s shared, blank nothing; letters that repeat are one mapping."""
    found = []
    for match in re.finditer(r"a+|b+|f+|s+", text):
        file = None if match[0][0] in "ab" else 1
        start, end = match.start() + 1 << 12, match.end() + 1 << 12
        found.append(Mapping(start=start, end=end, prot=3, file=file, shared=match[0][0] == "s"))
    return found


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("", []),
        ("aabb", [([(1, 5)], True)]),
        ("aa bb", [([(1, 3), (4, 6)], True)]),
        ("aaffbb", [([(1, 3)], True), ([(3, 5)], False), ([(5, 7)], True)]),
        ("asbs f", [([(1, 2)], True), ([(3, 4)], True), ([(6, 7)], False)]),
        ("s", []),
    ],
)
def test_mappings_of_one_sort_are_scanned_together(text: str, spans: list[tuple[list[tuple[int, int]], bool]]) -> None:
    assert [
        ([(low >> 12, high >> 12) for low, high in ranges], anonymous) for ranges, anonymous in scan._spans(areas(text))
    ] == spans


@given(st.text(alphabet="ab fs", max_size=20), st.sets(st.integers(1, 20)))
def test_only_pages_of_private_mappings_are_told(text: str, there: set[int]) -> None:
    private = {p for m in areas(text) if not m.shared for p in range(m.start >> 12, m.end >> 12)}
    found = []
    for ranges, _ in scan._spans(areas(text)):
        pages = [p for p in sorted(there) if ranges[0][0] <= p << 12 < ranges[-1][1]]
        # runs as the kernel gives them: neighbours joined
        runs: list[tuple[int, int]] = []
        for page in pages:
            if runs and runs[-1][1] == page << 12:
                runs[-1] = runs[-1][0], page + 1 << 12
            else:
                runs.append((page << 12, page + 1 << 12))
        found += [p >> 12 for low, high in scan._clipped(runs, ranges) for p in range(low, high, 4096)]
    assert found == sorted(private & there)


def test_the_engines_own_memory_is_cut_out_even_when_merged() -> None:
    def vma(start: int, end: int) -> Vma:
        return Vma(start, end, 7, False, 0, 0, 0, "")

    maps = [vma(0x1000, 0x5000), vma(0x8000, 0x9000)]
    assert without(maps, []) == maps
    assert without(maps, [(0x8000, 0x9000)]) == [vma(0x1000, 0x5000)]
    assert without(maps, [(0x2000, 0x3000)]) == [vma(0x1000, 0x2000), vma(0x3000, 0x5000), vma(0x8000, 0x9000)]
    assert without(maps, [(0x4000, 0x5000)]) == [vma(0x1000, 0x4000), vma(0x8000, 0x9000)]


@pytest.mark.parametrize(
    ("space", "pid", "start", "length"),
    [
        (Space.CONTENT, 5, 0x1000, 0x1000),
        (Space.MEMORY, 6, 0x1000, 0x1000),
        (Space.MEMORY, 5, 0x0, 0x1000),
        (Space.MEMORY, 5, 0x3000, 0x2000),
        (Space.MEMORY, 5, 0x5000, 0x1000),
        (Space.MEMORY, 5, 0x8000, 0x1000),
        (Space.MEMORY, 5, 0x9000, 0x1000),
    ],
)
def test_pages_that_are_not_the_processs_own_are_refused(space: Space, pid: int, start: int, length: int) -> None:
    memory = layout(
        Mapping(start=0x1000, end=0x2000, prot=3),
        Mapping(start=0x2000, end=0x4000, prot=3),
        Mapping(start=0x5000, end=0x6000, prot=3, shared=True, file=1),
        Mapping(start=0x8000, end=0xA000, prot=5, name="[vdso]"),
    )
    # the check comes before the process is touched: none is needed
    writer = PageWriter(None, memory)  # type: ignore[arg-type]
    with pytest.raises(BadLayout):
        writer.write(PageRun(space=space, id=pid, runs=((start, length),), data=memoryview(bytes(length))))


def test_the_code_of_a_vdso_ends_where_its_segment_ends() -> None:
    with open("/proc/self/maps", "rb") as maps, open("/proc/self/mem", "rb", 0) as mem:
        vma = next(v for v in parse_maps(maps.read()) if v.name == VDSO)
        mem.seek(vma.start)
        mapped = mem.read(vma.size)
    code = vdso.code(mapped)
    assert 1000 < len(code) <= len(mapped)
    assert mapped.startswith(code)
    for bad in (b"", b"\x7fELF", mapped[:100], b"x" * 4096, mapped[:32] + b"\xff" * 8 + mapped[40:]):
        with pytest.raises(OtherVdso):
            vdso.code(bad)


def test_differences_name_the_place_and_the_attribute() -> None:
    def region(start: int, **changes: object) -> Region:
        values = {
            "start": start,
            "end": start + 0x1000,
            "permissions": "rw-p",
            "offset": 0,
            "name": "[heap]",
            "flags": frozenset[str](),
            "pkey": 0,
            "digest": "d",
        }
        return Region(**(values | changes))  # type: ignore[arg-type]

    assert differences([region(0x1000)], [region(0x1000)]) == []
    assert differences([region(0x1000)], [region(0x1000, digest="e")]) == ["1000-2000 [heap]: digest d became e"]
    assert "only before" in differences([region(0x1000)], [])[0]
    assert "only after" in differences([], [region(0x1000)])[0]


STILL = """
import mmap, sys
maps = []
for size in sys.stdin:
    maps.append(mmap.mmap(-1, int(size)))
    print(flush=True)
"""


@pytest.fixture
def still() -> Iterator[subprocess.Popen[str]]:
    """A process whose mappings change only when told to: our own change between two looks (an arena, a thread)."""
    with subprocess.Popen(
        [sys.executable, "-c", STILL], text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        yield child


def more(child: subprocess.Popen[str], size: int) -> None:
    assert child.stdin
    assert child.stdout
    child.stdin.write(f"{size}\n")
    child.stdout.readline()


def test_what_was_foreseen_has_flags_and_what_came_since_has_none(still: subprocess.Popen[str]) -> None:
    more(still, 4096)
    before = foresee(still.pid)
    assert all(vma.flags for vma in before.values())
    more(still, 3 << 20)
    maps = read_maps(still.pid, before)
    assert [vma.key for vma in maps] == [vma.key for vma in read_maps(still.pid)]
    assert [vma.shared for vma in maps if not vma.flags] == [True]
    # one that is not known: all are read again
    assert all(vma.flags for vma in with_flags(still.pid, maps))
    known = [vma for vma in maps if vma.flags]
    assert len(known) == len(maps) - 1
    assert with_flags(still.pid, known) is known


def test_a_mapping_is_found_by_its_name() -> None:
    found = find_named(os.getpid(), VDSO)
    assert found is not None
    assert found == next(vma for vma in read_maps(os.getpid()) if vma.name == VDSO)
    assert find_named(os.getpid(), "[no such mapping]") is None
    # a word at the end of a path is not the whole name
    assert find_named(os.getpid(), "maps") is None


def test_guards_are_looked_for_in_one_scan_over_all_private_memory() -> None:
    text = b"""\
1000-2000 rw-p 00000000 00:00 0
3000-4000 r--p 00000000 fe:01 12 /lib
4000-5000 rw-s 00000000 fe:01 12 /lib
6000-7000 rw-p 00000000 00:00 0
8000-9000 r--p 00000000 fe:01 12 /lib
"""
    found = [ranges for ranges, _ in scan._spans(parse_maps(text), apart=False)]
    assert found == [[(0x1000, 0x2000), (0x3000, 0x4000)], [(0x6000, 0x7000), (0x8000, 0x9000)]]
