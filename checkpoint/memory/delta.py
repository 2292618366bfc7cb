"""From one layout of a process's memory to a later one: what is still there, what has gone, what is new.

Both sides of a migration compute it from the same two records, so nothing of it travels.  What the records cannot tell
(memory that was unmapped, and mapped again in the same way) the source tells before: :func:`without`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

from checkpoint.memory.layout import Mapping, MemoryLayout
from checkpoint.memory.ranges import Range, difference, intersection, joined
from tcpstate.slotted import dataclass

__all__ = ["Delta", "delta", "same_process", "without"]

#: whether a file of the earlier record is a file of the later one
SameFile = Callable[[int, int], bool]


@dataclass(frozen=True, slots=True)
class Delta:
    """The difference, by address.

    gone    (start, end) of what has to be unmapped
    kept    parts of the later mappings that are there already
    fresh   parts of the later mappings that have to be mapped
    guards  guard regions in ``fresh``
    """

    gone: tuple[Range, ...]
    kept: tuple[Mapping, ...]
    fresh: tuple[Mapping, ...]
    guards: tuple[Range, ...]


def same_process(before: MemoryLayout, after: MemoryLayout) -> bool:
    """Whether the later layout can come from the earlier one: the program is the same, and the kernel's own mappings
    lie where they lay. Else the process has called exec in between."""
    one, other = ((layout.exe, layout.auxv, layout.vdso, _special(layout)) for layout in (before, after))
    return one == other


def _special(layout: MemoryLayout) -> list[tuple[int, int, str]]:
    return [(m.start, m.end, m.name) for m in layout.mappings if m.special]


def without(layout: MemoryLayout, ranges: Iterable[Range]) -> MemoryLayout:
    """The layout as if nothing were mapped in ``ranges`` (by address)."""
    holes = list(ranges)
    if not holes:
        return layout
    left = [
        part(mapping, start, end)
        for mapping in layout.mappings
        for start, end in difference([(mapping.start, mapping.end)], holes)
    ]
    guards = tuple(difference(layout.guards, holes))
    return dataclasses.replace(layout, mappings=tuple(left), guards=guards)


def part(mapping: Mapping, start: int, end: int) -> Mapping:
    """The part [start, end) of a mapping."""
    if (start, end) == (mapping.start, mapping.end):
        return mapping
    offset = mapping.offset + (start - mapping.start if mapping.file is not None else 0)
    return dataclasses.replace(mapping, start=start, end=end, offset=offset)


def delta(before: MemoryLayout, after: MemoryLayout, same: SameFile) -> Delta:
    """What leads from ``before`` to ``after``. The kernel's own mappings are left out: see same_process()."""
    same = functools.cache(same)  # a library has five mappings
    # a guard region that came or went: its memory is made anew
    guards = list(joined([*difference(before.guards, after.guards), *difference(after.guards, before.guards)]))
    kept: list[Mapping] = []
    fresh: list[Mapping] = []
    old = [mapping for mapping in before.mappings if not mapping.special]
    at = whole = 0
    for mapping in after.mappings:
        if mapping.special:
            continue
        while at < len(old) and old[at].end <= mapping.start:
            at += 1
        if at < len(old) and not guards and _in_place(old[at], mapping) and _alike(old[at], mapping, same):
            # most of them: nothing else can be there
            kept.append(mapping)
            whole += 1
            continue
        alike: list[Range] = []
        index = at
        while index < len(old) and old[index].start < mapping.end:
            if _alike(old[index], mapping, same):
                alike.append((max(old[index].start, mapping.start), min(old[index].end, mapping.end)))
            index += 1
        mine = [(mapping.start, mapping.end)]
        stays = list(difference(alike, guards))
        kept += [part(mapping, start, end) for start, end in stays]
        fresh += [part(mapping, start, end) for start, end in difference(mine, stays)]
    if whole == len(old) and not fresh:
        return Delta((), tuple(kept), (), ())
    there = joined((mapping.start, mapping.end) for mapping in old)
    gone = difference(there, joined((mapping.start, mapping.end) for mapping in kept))
    new = [(mapping.start, mapping.end) for mapping in fresh]
    return Delta(tuple(gone), tuple(kept), tuple(fresh), tuple(intersection(after.guards, new)))


def _in_place(before: Mapping, after: Mapping) -> bool:
    return before.start == after.start and before.end == after.end


def _alike(before: Mapping, after: Mapping, same: SameFile) -> bool:
    """Whether memory of the one is memory of the other where they overlap."""
    if (before.prot, before.shared, before.flags) != (after.prot, after.shared, after.flags):
        return False
    if before.file is None or after.file is None:
        # other names than an application's own are the kernel's, by place: [heap], [stack]
        return before.file is after.file and _own_name(before) == _own_name(after)
    return before.offset - before.start == after.offset - after.start and same(before.file, after.file)


def _own_name(mapping: Mapping) -> str:
    return mapping.name if mapping.name.startswith("[anon") else ""
