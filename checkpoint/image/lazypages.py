"""The pages of an image file for who brings them one by one: where each is; read and verified when it is needed.

A file that is opened for this has been verified but for the bytes of its pages (``reader.open_image(later=True)``):
what is kept here of each frame is its place and the digest that the whole image vouches for, so that no byte of a page
is handed out that has not been compared with it.
"""

from __future__ import annotations

import array
import bisect
import collections
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from checkpoint.errors import ImageDamaged, ImageTruncated
from checkpoint.image import frames
from checkpoint.image.frames import (
    ALIGNMENT,
    DATA_MAX,
    DIGEST_SIZE,
    HEADER,
    HEADER_DIGESTED,
    PAGE_RECORD_MAX,
    Frame,
    PageRun,
    aligned_buffer,
)
from checkpoint.memory.ranges import Range

__all__ = ["FileIndex", "ImagePages", "IndexMaker"]

#: frames that stay in memory after they were verified
_KEPT = 4
#: bytes of the largest frame, with what lies around its data
_ROOM = DATA_MAX + PAGE_RECORD_MAX + 3 * ALIGNMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIndex:
    """Where the pages are.

    offsets, records, data  of each frame: its place in the file, the length of its record, that of its data (u64 each)
    digests                 32 bytes of each frame
    runs                    by pid: start, end, number of the frame, place in its data (u64 each), by start
    """

    offsets: bytes = b""
    records: bytes = b""
    data: bytes = b""
    digests: bytes = b""
    runs: dict[int, bytes] = field(default_factory=dict)


class IndexMaker:
    """Makes one from frames, in their order."""

    def __init__(self) -> None:
        self._frames: list[tuple[int, int, int]] = []
        self._digests: list[bytes] = []
        self._runs: dict[int, list[tuple[int, int, int, int]]] = {}

    def add(self, frame: Frame, run: PageRun) -> None:
        """One frame of a process's memory."""
        number, at = len(self._frames), 0
        self._frames.append((frame.offset, len(frame.record), len(frame.data)))
        self._digests.append(bytes(frame.digest))
        mine = self._runs.setdefault(run.id, [])
        for start, length in run.runs:
            mine.append((start, start + length, number, at))
            at += length

    def made(self) -> FileIndex:
        """The index. ImageDamaged if pages come twice: which of them counts could not be told in time."""
        runs = {}
        for pid, mine in self._runs.items():
            mine.sort()
            if any(mine[i][1] > mine[i + 1][0] for i in range(len(mine) - 1)):
                raise ImageDamaged(f"pages of process {pid} come more than once")
            runs[pid] = array.array("Q", [word for one in mine for word in one]).tobytes()
        offsets, records, data = (array.array("Q", column).tobytes() for column in zip(*self._frames, strict=True))
        return FileIndex(offsets=offsets, records=records, data=data, digests=b"".join(self._digests), runs=runs)


class ImagePages:
    """A ``pageserver.PageSource``. ``fd``: the open file; ``path``: its name, for people."""

    def __init__(self, fd: int, index: FileIndex, path: str) -> None:
        self._fd = fd
        self._path = path
        self._offsets, self._records, self._lengths = (_words(x) for x in (index.offsets, index.records, index.data))
        self._digests = index.digests
        self._starts: dict[int, array.array[int]] = {}
        self._columns: dict[int, tuple[array.array[int], array.array[int], array.array[int]]] = {}
        for pid, runs in index.runs.items():
            words = _words(runs)
            self._starts[pid] = words[0::4]
            self._columns[pid] = words[1::4], words[2::4], words[3::4]
        self._wanted: collections.deque[tuple[int, int, int]] = collections.deque()
        #: data and the buffer that they are in, by number of the frame
        self._kept: collections.OrderedDict[int, tuple[memoryview, memoryview]] = collections.OrderedDict()

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
        if number not in self._kept:
            # an old buffer is warm, and its frame was handed out long ago
            space = self._kept.popitem(last=False)[1][1] if len(self._kept) >= _KEPT else aligned_buffer(_ROOM)
            self._kept[number] = self._read(number, space), space
        return self._kept[number][0]

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
        digest = self._digests[number * DIGEST_SIZE : (number + 1) * DIGEST_SIZE]
        data = whole[body:]
        if frames.digest(bytes(whole[:HEADER_DIGESTED]), whole[HEADER.size : HEADER.size + record], data) != digest:
            raise ImageDamaged("the digest of pages is wrong", object=where)
        return data


def _words(data: bytes) -> array.array[int]:
    found: array.array[int] = array.array("Q")
    found.frombytes(data)
    return found
