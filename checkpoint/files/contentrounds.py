"""Shared memory in rounds of pre-copy: the source's half.

The kernel's marks of written pages belong to a mapping, the bytes of shared memory to a file that others can write past
every mark: through another mapping, by write(2), by a descriptor that was sent away.  So bytes are not tracked but
compared: what was sent of each block is remembered as a hash, and a block is sent again when its bytes have another.
In the stop that is one pass over them at the rate at which they can be read, whatever the line.

::

    see(contents)     while a round looks at the tree: what can be copied ahead, and is kept open from now on
    round()           records and bytes for the target, which keeps them in files of its own (files/staged.py)
    adopt(contents)   in the stop: which contents of FILES go on from there (``staged``)
    compare()         what of them has changed since: holes that have come, and ..
    runs(contents)    .. bytes; of all other contents, all

The hash is XXH3 with a secret start (128 bits): no accident makes two blocks the same, and who is moved, and could try,
would only deceive itself.

Source: lseek(2) SEEK_DATA; https://github.com/Cyan4973/xxHash.  Decisions: docs/design/precopy.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import field
from typing import Final

from checkpoint.files.content import Content, ContentKind, data_runs
from checkpoint.files.contents import ContentTable
from checkpoint.files.staged import StagedContents, goes_on
from checkpoint.image.frames import DATA_MAX, PageRun, Runs, Space
from checkpoint.memory.pages import chunks
from checkpoint.memory.ranges import Range, difference, joined, total
from tcpstate.slotted import dataclass

__all__ = ["BLOCK", "LEAST", "ContentRounds"]

#: bytes whose hash is remembered
BLOCK: Final = 16 << 10
#: smaller contents are read in the stop in less time than it takes to speak of them
LEAST: Final = 1 << 20
#: bytes from which a second thread reads in the stop
_SHARED_WORK: Final = 64 << 20
_DROPS_AT_ONCE: Final = 4096
_STAGED: Final = frozenset({ContentKind.MEMFD, ContentKind.SHARED})


@dataclass(slots=True)
class _Known:
    """One content. ``blocks``: what was sent, by number of the block; the target has holes everywhere else."""

    number: int
    content: Content
    fd: int
    told: bool = False
    blocks: dict[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Change:
    """What a pass found in one window.

    holes  (start, end) where the target has bytes, and there are none any more
    runs   (start, length) of bytes that the target lacks
    data   those bytes, one after the other, until the next window is asked for
    """

    holes: list[Range]
    runs: tuple[tuple[int, int], ...]
    data: memoryview


class ContentRounds:
    """See the module's docstring."""

    def __init__(self) -> None:
        #: somebody keeps what is told before the stop
        self.wanted = False
        self._known: dict[tuple[int, int], _Known] = {}
        self._seed = int.from_bytes(os.urandom(8), "little")
        #: by index of a content in FILES
        self._adopted: dict[int, _Known] = {}
        self._left: dict[int, list[tuple[int, int]]] = {}

    def see(self, contents: ContentTable) -> None:
        """What of these contents is worth copying ahead. OSError."""
        for key, index in contents.keys.items() if self.wanted else ():
            content = contents.records[index]
            if key in self._known or content.kind not in _STAGED or content.huge or content.size < LEAST:
                continue
            # open until the end: while it is, its number is nobody else's
            fd = os.dup(contents.fd(index))
            self._known[key] = _Known(len(self._known), content, fd)

    def round(self) -> Iterator[StagedContents | Runs | PageRun]:
        """What the target is to be told. Bytes are valid until the next is asked for."""
        fresh = [one for one in self._known.values() if not one.told]
        if fresh:
            yield StagedContents(contents={one.number: one.content for one in fresh})
        for one in self._known.values():
            one.told = True
            for change in self._pass(one):
                yield from _drops(Space.STAGED, one.number, change.holes)
                if change.runs:
                    yield PageRun(space=Space.STAGED, id=one.number, runs=change.runs, data=change.data)

    def written(self) -> int:
        """Bytes that a round would send now: one pass over all. OSError."""
        return sum(
            length
            for one in self._known.values()
            for change in self._pass(one, remember=False)
            for _, length in change.runs
        )

    # -- in the stop

    def adopt(self, contents: ContentTable) -> None:
        """Which contents are what was told."""
        for key, index in contents.keys.items():
            one = self._known.get(key)
            if one is not None and one.told and goes_on(one.content, contents.records[index]):
                self._adopted[index] = one

    @property
    def staged(self) -> dict[int, int]:
        """Index of a content in FILES: its number at the target."""
        return {index: one.number for index, one in self._adopted.items()}

    def compare(self) -> Iterator[Runs]:
        """Holes that the target is to make; nobody of the tree writes any more. OSError."""
        found = self._differences(list(self._adopted.values()))
        for index, (holes, runs) in zip(self._adopted, found, strict=True):
            self._left[index] = runs
            yield from _drops(Space.CONTENT, index, joined(holes))

    def runs(self, contents: ContentTable) -> Iterator[PageRun]:
        """The bytes of all contents that the target lacks, holes left out. A run stays as it is."""
        for index in range(len(contents)):
            runs = self._left.get(index)
            ranges = contents.runs(index) if runs is None else iter(runs)
            for group in chunks((start, start + length) for start, length in ranges):
                data = b"".join(contents.read(index, start, length) for start, length in group)
                if data:
                    yield PageRun(space=Space.CONTENT, id=index, runs=group, data=memoryview(data))

    def _differences(self, known: Sequence[_Known]) -> list[tuple[list[Range], list[tuple[int, int]]]]:
        parts = [(one, low, high) for one in known for low, high in _halves(os.fstat(one.fd).st_size)]
        if len(parts) == len(known):
            found = [self._differs(*part) for part in parts]
        else:
            # reading from the page cache takes most of the time, without the interpreter's lock
            with ThreadPoolExecutor(2) as executor:
                found = list(executor.map(lambda part: self._differs(*part), parts))
        result: list[tuple[list[Range], list[tuple[int, int]]]] = []
        for one in known:
            mine = [one_found for part, one_found in zip(parts, found, strict=True) if part[0] is one]
            holes = [hole for holes, _ in mine for hole in holes]
            result.append((holes, [run for _, runs in mine for run in runs]))
        return result

    def _differs(self, one: _Known, low: int, high: int) -> tuple[list[Range], list[tuple[int, int]]]:
        holes: list[Range] = []
        runs: list[tuple[int, int]] = []
        for change in self._pass(one, low, high):
            holes += change.holes
            runs += change.runs
        return holes, runs

    # -- one pass

    def _pass(self, one: _Known, low: int = 0, high: int = 1 << 62, *, remember: bool = True) -> Iterator[_Change]:
        """What differs from what was sent, in the windows of a file from ``low`` to ``high``; it is taken as sent, if
        it is to be remembered."""
        digest = _hash(self._seed)
        buffer = memoryview(bytearray(DATA_MAX))
        gone = {block for block in one.blocks if low <= block * BLOCK < high}
        for pieces in _windows(data_runs(one.fd, low), high):
            room = 0
            for start, length in pieces:
                room += os.preadv(one.fd, [buffer[room : room + length]], start)
            if room < total((start, start + length) for start, length in pieces):
                # it became shorter meanwhile: the next pass sees the rest
                continue
            holes: list[Range] = []
            runs: list[tuple[int, int]] = []
            data: list[memoryview] = []
            at = 0
            for block, parts in _by_block(pieces):
                size = sum(length for _, length in parts)
                view = buffer[at : at + size]
                at += size
                # also the same bytes in other places are another block
                mark = digest(view) if size == BLOCK else digest(view) + repr(parts).encode()
                gone.discard(block)
                if one.blocks.get(block) == mark:
                    continue
                if block in one.blocks and size < BLOCK:
                    here = block * BLOCK, (block + 1) * BLOCK
                    holes += difference([here], [(start, start + length) for start, length in parts])
                if remember:
                    one.blocks[block] = mark
                runs += parts
                data.append(view)
            if runs:
                together = data[0] if len(data) == 1 else memoryview(b"".join(data))
                yield _Change(holes, tuple(runs), together)
        for block in gone if remember else ():
            del one.blocks[block]
        if gone:
            yield _Change(joined((block * BLOCK, (block + 1) * BLOCK) for block in gone), (), memoryview(b""))

    def close(self) -> None:
        """Our descriptors. May be repeated."""
        while self._known:
            os.close(self._known.popitem()[1].fd)


def _hash(seed: int) -> Callable[[memoryview], bytes]:
    # not before there is something to be compared
    import xxhash

    digest = xxhash.xxh3_128_digest

    def of(data: memoryview) -> bytes:
        return digest(data, seed)

    return of


def _halves(size: int) -> list[Range]:
    """Parts of a file that two threads may work at."""
    if size < _SHARED_WORK:
        return [(0, 1 << 62)]
    middle = size // 2 // DATA_MAX * DATA_MAX
    return [(0, middle), (middle, 1 << 62)]


def _windows(runs: Iterable[tuple[int, int]], high: int) -> Iterator[list[tuple[int, int]]]:
    """Runs (start, length) cut at multiples of DATA_MAX, those of one such window together; up to ``high``."""
    window, pieces = -1, list[tuple[int, int]]()
    for start, length in runs:
        end = min(start + length, high)
        while start < end:
            if start // DATA_MAX != window:
                if pieces:
                    yield pieces
                window, pieces = start // DATA_MAX, []
            step = min(end, (window + 1) * DATA_MAX) - start
            pieces.append((start, step))
            start += step
        if start >= high:
            break
    if pieces:
        yield pieces


def _by_block(pieces: Sequence[tuple[int, int]]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """The pieces of each block that has some, by its number."""
    block, parts = -1, list[tuple[int, int]]()
    for start, length in pieces:
        end = start + length
        while start < end:
            if start // BLOCK != block:
                if parts:
                    yield block, parts
                block, parts = start // BLOCK, []
            step = min(end, (block + 1) * BLOCK) - start
            parts.append((start, step))
            start += step
    if parts:
        yield block, parts


def _drops(space: Space, number: int, holes: Sequence[Range]) -> Iterator[Runs]:
    for at in range(0, len(holes), _DROPS_AT_ONCE):
        runs = tuple((start, end - start) for start, end in holes[at : at + _DROPS_AT_ONCE])
        yield Runs(space=space, id=number, runs=runs)
