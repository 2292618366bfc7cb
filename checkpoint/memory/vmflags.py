"""Mappings with their flags and protection keys, without smaps where the kernel lends its iterators.

Which bit is called what differs from kernel to kernel, and no header tells.  So it is learned: smaps is read once
beside the words of all mappings, and from then on the same word has the same names.  A word never seen is learned
likewise.  Names and words belong to the kernel, not to a process: what was learned of one holds for all.

Source: fs/proc/task_mmu.c (show_smap_vma_flags: names follow from the flags alone; the key lies among them).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from checkpoint.errors import NoSuchProcess
from checkpoint.kernel import vmaiter
from checkpoint.memory import vma as vmas
from checkpoint.memory.vma import TRACKING_FLAGS, VSYSCALL, Vma

__all__ = ["foresee", "mappings"]

#: names of flags, and the protection key
_Told = tuple[frozenset[str], int]
#: looks at a process that changes its mappings all the time
_LOOKS: Final = 3

_learned: dict[int, _Told] = {}
#: of what every process shows and none has: the kernel has no word for it
_shown: dict[str, _Told] = {}


def foresee(pid: int, known: Mapping[bytes, Vma] | None = None, *, tracked: bool = False) -> dict[bytes, Vma]:
    """What :func:`checkpoint.memory.vma.foresee` gives, mostly in a hundredth of its time. NoSuchProcess.

    known    what it gave before: saves the parsing of lines that are still the same
    tracked  our own tracking of writes is on, and is not to show
    """
    told = _without_smaps(pid, known or {}, tracked=tracked)
    if told is not None:
        return told[0]
    found = vmas.foresee(pid)
    if tracked:
        found = {line: vma._replace(flags=vma.flags - TRACKING_FLAGS) for line, vma in found.items()}
    return found


def mappings(pid: int, known: Mapping[bytes, Vma], *, tracked: bool = False) -> tuple[list[Vma], int | None]:
    """The mappings of a process that stands still, and where its heap ends. As they are now, also those that are told
    in ``known``, where the kernel lends its iterators; else, or if none are, see
    :func:`checkpoint.memory.vma.read_maps`, and nothing is told of the heap. NoSuchProcess."""
    told = _without_smaps(pid, known, tracked=tracked) if known else None
    return (vmas.read_maps(pid, known), None) if told is None else (list(told[0].values()), told[1])


def _without_smaps(pid: int, known: Mapping[bytes, Vma], *, tracked: bool) -> tuple[dict[bytes, Vma], int] | None:
    """The mappings by their lines, and the end of the heap. None where the kernel does not lend its iterators, or the
    mappings change all the time."""
    for _ in range(_LOOKS):
        words = vmaiter.words(pid)
        if words is None:
            return None
        found = _named(vmas.lines(pid), words.flags, known, tracked)
        if found is not None:
            return found, words.brk
        _learn(pid, words.flags)
    return None


def _named(
    lines: list[bytes], words: Mapping[tuple[int, int], int], known: Mapping[bytes, Vma], tracked: bool
) -> dict[bytes, Vma] | None:
    """None if the words are not those of the lines, or one was never seen."""
    found = {}
    for line in lines:
        vma = known.get(line) or vmas.parse_maps(line)[0]
        word = words.get((vma.start, vma.end))
        told = _shown.get(vma.name) if word is None else _learned.get(word)
        if told is None:
            return None
        flags, pkey = told
        if tracked and not flags.isdisjoint(TRACKING_FLAGS):
            flags -= TRACKING_FLAGS
        found[line] = vma if (vma.flags, vma.pkey) == (flags, pkey) else vma._replace(flags=flags, pkey=pkey)
    return found


def _learn(pid: int, before: Mapping[tuple[int, int], int]) -> None:
    """Read smaps, and take over what is true of mappings that have been the same before and after."""
    told = vmas.read_smaps(pid)
    after = vmaiter.words(pid)
    if after is None or not after.flags:
        raise NoSuchProcess("the process has just ended", object=f"pid {pid}")
    for vma in told:
        if vma.name == VSYSCALL:
            _shown[vma.name] = vma.flags, vma.pkey
            continue
        word = after.flags.get((vma.start, vma.end))
        if word is not None and word == before.get((vma.start, vma.end)):
            _learned[word] = vma.flags, vma.pkey
