"""An image as a file: mapped, verified whole, and only then read."""

from __future__ import annotations

import collections
import mmap
import os
import stat
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from types import TracebackType
from typing import Self

from checkpoint.errors import ForeignImage, ImageDamaged, ImageTruncated, ImageUnreadable
from checkpoint.image import frames
from checkpoint.image.format import KNOWN_KINDS, check_kind
from checkpoint.image.frames import (
    HEADER,
    PREAMBLE,
    TRAILER,
    End,
    Frame,
    Kind,
    PageRun,
    Space,
)
from checkpoint.image.lazypages import FileIndex, IndexMaker, words

__all__ = ["ImageReader", "open_image"]

#: digests that may wait for the executor while the frames are walked
_CHECKS_AHEAD = 64
#: bytes from which on a digest is worth another thread: to pass one on takes as long as some 200 KiB
_WORTH = 256 << 10


class ImageReader:
    """A verified image file. Frames and their data are views of the mapped file, valid until close().

    path    as opened
    frames  all frames of known kinds before END, in order
    end     the END record
    size    bytes of the file
    fd      the open file
    later   where the pages of processes' memory are, if it was opened so: their frames are not in ``frames`` then

    The mapping is shared with the file: who may write the file (0600: its owner and root) could change it under us
    after the check. Do not open images that others may write.
    """

    def __init__(
        self, path: str, fd: int, mapping: mmap.mmap, found: list[Frame], end: End, later: FileIndex | None = None
    ) -> None:
        self.path = path
        self.fd = fd
        self.frames = found
        self.end = end
        self.later = later
        self.size = len(mapping)
        self._mapping = mapping

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def records(self, kind: str) -> Iterator[Frame]:
        """The frames of one kind, in order."""
        return (frame for frame in self.frames if frame.kind == kind)

    def pages(self) -> Iterator[PageRun]:
        """What the PAGES frames carry, in order; later bytes of an address supersede earlier ones."""
        return (frame.pages() for frame in self.records(Kind.PAGES))

    def close(self) -> None:
        """Let the mapping go. It is unmapped once no view of it is left."""
        self.frames = []
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_image(
    path: str | os.PathLike[str],
    *,
    known: frozenset[str] | None = KNOWN_KINDS,
    executor: Executor | None = None,
    later: bool = False,
) -> ImageReader:
    """Map and verify the image file ``path``. ImageError if it is not wholly right; nothing is handed out then.

    known     kinds of frames to hand out; unknown ones are skipped if optional, else refused. None: all are handed out
    executor  computes digests beside each other
    later     the frames of processes' memory are told by an index (``ImageReader.later``) and verified when they are
              used (``lazypages.ImagePages``): all else is verified now. An image without such an index is verified
              whole
    """
    name = os.fspath(path)
    fd = _open(name)
    try:
        mapping = _map(name, fd)
        index = None
        if later and (part := _verify_but_pages(memoryview(mapping), executor)) is not None:
            found, end, index = part
        else:
            found, end = _verify(memoryview(mapping), executor)
            if later:
                found, index = _index_of(found)
        if known is not None:
            found = [frame for frame in found if check_kind(frame, known)]
    except BaseException:
        os.close(fd)
        raise
    return ImageReader(name, fd, mapping, found, end, index)


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a fifo must not make us wait
    except OSError as error:
        raise ImageUnreadable(f"the image cannot be opened: {error.strerror}", object=path) from error


def _map(path: str, fd: int) -> mmap.mmap:
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ImageUnreadable("this is not a regular file", object=path)
        if status.st_size == 0:
            raise ImageTruncated("the file is empty", object=path)
        return mmap.mmap(fd, status.st_size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ImageUnreadable(f"the image cannot be mapped: {error.strerror}", object=path) from error


def _verify(whole: memoryview, executor: Executor | None) -> tuple[list[Frame], End]:
    """All frames before END, and END, of the image in ``whole``."""
    _check_ends(whole)
    root, offsets, found = frames.root_state(), list[int](), list[Frame]()
    checks = _Checks(executor)
    place = PREAMBLE.size
    while True:
        frame, header = _frame_at(whole, place)
        checks.add(frame, header)
        if frame.kind == Kind.END:
            checks.settle(0)
            _check_behind(whole, place, header)
            return found, frames.check_end(frame, offsets, root.digest())
        offsets.append(place)
        root.update(header.digest)
        found.append(frame)
        place = header.end


def _verify_but_pages(whole: memoryview, executor: Executor | None) -> tuple[list[Frame], End, FileIndex] | None:
    """The same, without the frames that PAGE_INDEX tells of: they are verified when they are used, against the digests
    in it, of which the root digest is made as much as of all others. None if the image has no such index."""
    _check_ends(whole)
    last = frames.TRAILER.unpack(whole[-TRAILER.size :])[0]
    if last >= len(whole):
        raise ImageDamaged("the trailer is not one")
    frame, header = _frame_at(whole, last)
    if frame.kind != Kind.END:
        raise ImageDamaged("the trailer does not tell where END is")
    checks = _Checks(executor)
    checks.add(frame, header)
    checks.settle(0)
    _check_behind(whole, last, header)
    offsets = words(frame.decode(End).index).tolist()
    if not offsets or offsets[-1] >= last or (told := _frame_at(whole, offsets[-1]))[0].kind != Kind.PAGE_INDEX:
        return None
    checks.add(*told)
    checks.settle(0)
    index = told[0].decode(FileIndex)
    numbers = {place: number for number, place in enumerate(words(index.offsets))}
    records, lengths, digest = words(index.records), words(index.data), index.digest
    align, digests, found, end = frames.ALIGNMENT, list[bytes](), list[Frame](), PREAMBLE.size
    # thousands, before anything is built
    for place in offsets:
        if place != end:
            raise ImageDamaged("the index does not tell where the frames are", object=f"offset {place}")
        number = numbers.pop(place, None)
        if number is None:
            one, its = _frame_at(whole, place)
            checks.add(one, its)
            digests.append(its.digest)
            found.append(one)
            end = its.end
        else:
            digests.append(digest(number))
            body = place + HEADER.size + records[number]
            end = body + -body % align + lengths[number]
    checks.settle(0)
    root = frames.root_state()
    root.update(b"".join(digests))
    if end != last or numbers:
        raise ImageDamaged("the index does not tell where the frames are")
    return found, frames.check_end(frame, offsets, root.digest()), index


def _index_of(found: list[Frame]) -> tuple[list[Frame], FileIndex]:
    """The frames of an image without PAGE_INDEX, and an index of those of memory. ImageDamaged."""
    maker, others, digests = IndexMaker(), list[Frame](), list[bytes]()
    for frame in found:
        run = frame.pages() if frame.kind == Kind.PAGES else None
        if run is None or run.space is not Space.MEMORY:
            others.append(frame)
            continue
        maker.add(frame.offset, len(frame.record), run.id, run.runs)
        digests.append(frame.digest)
    index = maker.made(digests)
    if index is None:
        raise ImageDamaged("pages of a process come more than once: they cannot come later")
    return others, index


class _Checks:
    """Digests that are compared, beside each other if there is an executor."""

    def __init__(self, executor: Executor | None) -> None:
        self._executor = executor
        self._waiting: collections.deque[tuple[Future[bytes], Frame]] = collections.deque()

    def add(self, frame: Frame, header: frames.Header) -> None:
        """One more. ImageDamaged."""
        if self._executor is None or len(frame.data) + len(frame.record) < _WORTH:
            frames.check_digest(frames.digest(header.raw, frame.record, frame.data), frame)
            return
        self._waiting.append((self._executor.submit(frames.digest, header.raw, frame.record, frame.data), frame))
        self.settle(_CHECKS_AHEAD)

    def settle(self, ahead: int) -> None:
        """Until no more than ``ahead`` are under way. ImageDamaged."""
        while len(self._waiting) > ahead:
            future, frame = self._waiting.popleft()
            frames.check_digest(future.result(), frame)


def _check_behind(whole: memoryview, place: int, end: frames.Header) -> None:
    """Nothing but the trailer is behind END, which is at ``place``."""
    if end.end + TRAILER.size != len(whole):
        raise ImageDamaged("there are bytes behind END", object=f"offset {end.end}")
    frames.check_trailer(whole[end.end :], place)


def _check_ends(whole: memoryview) -> None:
    """Beginning and end first: a foreign or truncated file is told without reading all of it."""
    if bytes(whole[: len(frames.MAGIC)]) != frames.MAGIC[: len(whole)]:
        raise ForeignImage("this does not begin as an image of tcpmig does")
    if len(whole) < PREAMBLE.size:
        raise ImageTruncated(f"the image ends after {len(whole)} bytes, before its END")
    frames.check_preamble(whole[: PREAMBLE.size])
    if len(whole) < PREAMBLE.size + HEADER.size + TRAILER.size or not frames.has_trailer(whole[-TRAILER.size :]):
        raise ImageTruncated(f"the image ends after {len(whole)} bytes, before its END and trailer")


def _frame_at(whole: memoryview, place: int) -> tuple[Frame, frames.Header]:
    limit = len(whole)
    if place + HEADER.size > limit:
        raise ImageTruncated(f"the image ends after {limit} bytes, in a frame header")
    header = frames.parse_header(whole[place : place + HEADER.size], place)
    if header.end > limit:
        raise ImageTruncated(f"the image ends after {limit} bytes, in a {header.kind} frame of {header.end - place}")
    body = place + HEADER.size
    data = body + header.record_length + header.padding
    frames.check_padding(whole[body + header.record_length : data], header)
    frame = Frame(header, whole[body : body + header.record_length], whole[data : header.end])
    return frame, header
