"""The pages of an image file for who brings them one by one: where each is; read and verified when it is needed.

A file that is opened for this has been verified but for the frames of its pages (``reader.open_image(later=True)``):
what is kept here of each frame is its place and the digest that the whole image vouches for, so that no byte of a page
is handed out that has not been compared with it.
"""

from __future__ import annotations

import array
import bisect
import collections
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import field

from checkpoint.errors import ImageDamaged, ImageTruncated
from checkpoint.image import frames
from checkpoint.image.frames import (
    ALIGNMENT,
    DATA_MAX,
    DIGEST_SIZE,
    HEADER,
    HEADER_DIGESTED,
    PAGE_RECORD_MAX,
    RECORD_MAX,
    Kind,
    PageRun,
    Space,
    aligned_buffer,
)
from checkpoint.memory.ranges import Range, joined
from tcpstate.slotted import dataclass

__all__ = ["FileIndex", "ImagePages", "IndexMaker", "words"]

_WORD = 8

#: frames that stay in memory after they were verified
_KEPT = 4
#: frames that others may have read before they are used
_AHEAD = 12
#: bytes of the largest frame, with what lies around its data
_ROOM = DATA_MAX + PAGE_RECORD_MAX + 3 * ALIGNMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIndex:
    """Where the pages of memory are: the record PAGE_INDEX.

    Numbers are u64 in columns, so that an index of gigabytes is there as soon as it is read.  What does not fit
    together in itself shows when it is used: the bytes of a frame are compared with their digest, and no frame has
    bytes outside its data.

    offsets, records, data  of each frame: its place in the file, the length of its record, that of its data
    digests                 32 bytes of each frame
    runs                    by pid: start, end, number of the frame, place in its data, by start
    have                    by pid: start, end of all that is there, by start, neighbours put together
    """

    offsets: bytes = b""
    records: bytes = b""
    data: bytes = b""
    digests: bytes = b""
    runs: dict[int, bytes] = field(default_factory=dict)
    have: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.offsets) // _WORD
        columns = {len(self.offsets), len(self.records), len(self.data)}
        if columns != {_WORD * count} or len(self.digests) != DIGEST_SIZE * count:
            raise ValueError("the columns of the index are not of one length")
        if any(len(runs) % (4 * _WORD) for runs in self.runs.values()):
            raise ValueError("a run has four numbers")
        if any(len(have) % (2 * _WORD) for have in self.have.values()) or self.have.keys() != self.runs.keys():
            raise ValueError("what is there is told by start and end")
        if count and (max(words(self.records)) > PAGE_RECORD_MAX or not 0 < max(words(self.data)) <= DATA_MAX):
            raise ValueError("a frame is longer than any may be")

    @property
    def count(self) -> int:
        """How many frames."""
        return len(self.offsets) // _WORD

    def digest(self, number: int) -> bytes:
        """Of a frame."""
        return self.digests[number * DIGEST_SIZE : (number + 1) * DIGEST_SIZE]

    def ranges(self) -> Iterator[tuple[int, list[Range]]]:
        """By pid, what pages there are. ImageDamaged."""
        for pid, have in self.have.items():
            numbers = words(have)
            found = list(zip(numbers[0::2], numbers[1::2], strict=True))
            if any(start % ALIGNMENT or end % ALIGNMENT or start >= end for start, end in found):
                raise ImageDamaged(f"{Kind.PAGE_INDEX}: what is told of process {pid} are no pages")
            yield pid, joined(found)


class IndexMaker:
    """Makes one from frames, in their order."""

    def __init__(self) -> None:
        self._frames: list[tuple[int, int, int]] = []
        self._runs: dict[int, list[tuple[int, int, int, int]]] = {}

    def add(self, offset: int, record: int, pid: int, runs: Iterable[Range]) -> None:
        """One frame of a process's memory: its place, the length of its record, and (start, length) of its pages."""
        number, at = len(self._frames), 0
        mine = self._runs.setdefault(pid, [])
        for start, length in runs:
            mine.append((start, start + length, number, at))
            at += length
        self._frames.append((offset, record, at))

    def made(self, digests: Iterable[bytes]) -> FileIndex | None:
        """The index; ``digests`` of the frames. None if pages come twice: which of them counts could not be told in
        time; or if it would be longer than a record may be."""
        runs, have = {}, {}
        for pid, mine in self._runs.items():
            mine.sort()
            if any(mine[i][1] > mine[i + 1][0] for i in range(len(mine) - 1)):
                return None
            runs[pid] = array.array("Q", itertools.chain.from_iterable(mine)).tobytes()
            together = joined((start, end) for start, end, _, _ in mine)
            have[pid] = array.array("Q", itertools.chain.from_iterable(together)).tobytes()
        columns = zip(*self._frames, strict=True) if self._frames else ((), (), ())
        offsets, records, data = (array.array("Q", column).tobytes() for column in columns)
        index = FileIndex(offsets=offsets, records=records, data=data, digests=b"".join(digests), runs=runs, have=have)
        size = sum(map(len, (offsets, records, data, index.digests, *runs.values(), *have.values())))
        return index if size < RECORD_MAX // 2 else None


class ImagePages:
    """A ``pageserver.PageSource``. ``fd``: the open file; ``path``: its name, for people."""

    def __init__(self, fd: int, index: FileIndex, path: str) -> None:
        self._fd = fd
        self._path = path
        self.index = index
        self._offsets, self._records, self._lengths = (words(x) for x in (index.offsets, index.records, index.data))
        self._starts: dict[int, array.array[int]] = {}
        self._columns: dict[int, tuple[array.array[int], array.array[int], array.array[int]]] = {}
        for pid, runs in index.runs.items():
            numbers = words(runs)
            self._starts[pid] = numbers[0::4]
            self._columns[pid] = numbers[1::4], numbers[2::4], numbers[3::4]
        self._wanted: collections.deque[tuple[int, int, int]] = collections.deque()
        #: data and the buffer that they are in, by number of the frame
        self._kept: collections.OrderedDict[int, tuple[memoryview, memoryview]] = collections.OrderedDict()
        #: for :meth:`runs`: (pid, frame, its parts as start, length, place), those that somebody reads, and who does
        self._whole: collections.deque[tuple[int, int, list[tuple[int, int, int]]]] = collections.deque()
        self._coming: collections.deque[Future[memoryview]] = collections.deque()
        #: one thread: who builds the processes meanwhile needs a processor, too
        self._reader: ThreadPoolExecutor | None = None

    @property
    def immediate(self) -> bool:
        """Nothing has to be waited for."""
        return True

    def look(self) -> None:
        """What is wrong with it shows when it is read."""

    @property
    def room(self) -> bool:
        """One at a time."""
        return not self._wanted

    def want(self, pid: int, origin: int, size: int, *, urgent: bool) -> bool:
        """To be read."""
        if urgent:
            self._wanted.appendleft((pid, origin, size))
        else:
            self._wanted.append((pid, origin, size))
        return True

    def forget(self) -> None:
        """Not any more."""
        self._wanted.clear()

    def ready(self) -> Iterator[tuple[int, int, memoryview]]:
        """What is wanted, frame by frame. ImageError, OSError."""
        while self._wanted:
            pid, origin, size = self._wanted.popleft()
            for (start, end), number, at in self._parts(pid, origin, origin + size):
                yield pid, start, self._frame(number)[at : at + end - start]

    # -- many at once

    def read_ahead(self, pid: int, ranges: Sequence[Range]) -> None:
        """All that is there of ``ranges`` will be wanted by :meth:`runs`: a thread begins to read it. ImageDamaged."""
        frames_of: dict[int, list[tuple[int, int, int]]] = {}
        for low, high in ranges:
            for (start, end), number, at in self._parts(pid, low, high):
                frames_of.setdefault(number, []).append((at, start, end - start))
        for number, parts in sorted(frames_of.items()):
            self._check(number)
            self._whole.append((pid, number, [(start, length, at) for at, start, length in sorted(parts)]))
        self._read_on()

    def _read_on(self) -> None:
        while len(self._coming) < min(_AHEAD, len(self._whole)):
            number = self._whole[len(self._coming)][1]
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, "image")
            self._coming.append(self._reader.submit(self._read_new, number))

    def _read_new(self, number: int) -> memoryview:
        return self._read(number, aligned_buffer(_ROOM))

    def runs(self) -> Iterator[PageRun]:
        """What :meth:`read_ahead` was told of, frame by frame; the bytes are valid until the next is asked for.
        ImageError, OSError."""
        while self._whole:
            pid, number, parts = self._whole.popleft()
            coming = self._coming.popleft()
            # what it has not come to yet is done beside it
            data = self._read_new(number) if coming.cancel() else coming.result()
            self._read_on()
            runs: list[tuple[int, int]] = []
            first = last = 0
            for start, length, at in parts:
                if at + length > len(data):
                    raise ImageDamaged(f"{Kind.PAGE_INDEX}: frame {number} has no such pages", object=self._path)
                if at != last:
                    if runs:
                        yield PageRun(space=Space.MEMORY, id=pid, runs=tuple(runs), data=data[first:last])
                    runs, first = [], at
                runs.append((start, length))
                last = at + length
            yield PageRun(space=Space.MEMORY, id=pid, runs=tuple(runs), data=data[first:last])

    def close(self) -> None:
        """Nobody reads in the file any more; it is the caller's."""
        self._whole.clear()
        self._coming.clear()
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)

    def _parts(self, pid: int, start: int, end: int) -> Iterator[tuple[Range, int, int]]:
        """((start, end), number of the frame, place in its data)."""
        starts = self._starts.get(pid)
        if starts is None:
            return
        ends, numbers, places = self._columns[pid]
        index = max(0, bisect.bisect_right(starts, start) - 1)
        while index < len(starts) and starts[index] < end:
            low, high = max(start, starts[index]), min(end, ends[index])
            if low < high:
                yield (low, high), numbers[index], places[index] + low - starts[index]
            index += 1

    def _frame(self, number: int) -> memoryview:
        """The data of a frame, verified."""
        self._check(number)
        if number not in self._kept:
            # an old buffer is warm, and its frame was handed out long ago
            space = self._kept.popitem(last=False)[1][1] if len(self._kept) >= _KEPT else aligned_buffer(_ROOM)
            self._kept[number] = self._read(number, space), space
        return self._kept[number][0]

    def _check(self, number: int) -> None:
        if number >= self.index.count:
            raise ImageDamaged(f"{Kind.PAGE_INDEX}: there is no frame {number}", object=self._path)

    def _read(self, number: int, space: memoryview) -> memoryview:
        offset, record, length = self._offsets[number], self._records[number], self._lengths[number]
        where = f"{self._path}, frame at offset {offset}"
        body = HEADER.size + record
        body += -(offset + body) % ALIGNMENT
        # so that the pages are on a page boundary here, too: see aligned_buffer
        lead = -body % ALIGNMENT
        whole = space[lead : lead + body + length]
        done = 0
        while done < len(whole):
            count = os.preadv(self._fd, [whole[done:]], offset + done)
            if not count:
                raise ImageTruncated("the image has become shorter", object=where)
            done += count
        data = whole[body:]
        if frames.digest(
            bytes(whole[:HEADER_DIGESTED]), whole[HEADER.size : HEADER.size + record], data
        ) != self.index.digest(number):
            raise ImageDamaged("the digest of pages is wrong", object=where)
        return data


def words(data: bytes) -> array.array[int]:
    """The numbers of a column."""
    found: array.array[int] = array.array("Q")
    found.frombytes(data)
    return found
