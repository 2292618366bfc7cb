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
    PageRecords,
    PageRun,
    RecordsDigest,
    Space,
)

__all__ = ["ImageReader", "open_image"]

#: digests that may wait for the executor while the frames are walked
_CHECKS_AHEAD = 64


class ImageReader:
    """A verified image file. Frames and their data are views of the mapped file, valid until close().

    path    as opened
    frames  all frames of known kinds before END, in order
    end     the END record
    size    bytes of the file
    fd      the open file

    The mapping is shared with the file: who may write the file (0600: its owner and root) could change it under us
    after the check. Do not open images that others may write.
    """

    def __init__(self, path: str, fd: int, mapping: mmap.mmap, found: list[Frame], end: End) -> None:
        self.path = path
        self.fd = fd
        self.frames = found
        self.end = end
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
    later     the bytes of processes' memory are verified when they are used (``Frame.verify``): all else, and where
              they belong, is verified now. An image that does not allow it (by an earlier program) is verified whole
    """
    name = os.fspath(path)
    fd = _open(name)
    try:
        mapping = _map(name, fd)
        found, end = _verify(memoryview(mapping), executor, later=later)
        if known is not None:
            found = [frame for frame in found if check_kind(frame, known)]
    except BaseException:
        os.close(fd)
        raise
    return ImageReader(name, fd, mapping, found, end)


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


def _verify(whole: memoryview, executor: Executor | None, *, later: bool = False) -> tuple[list[Frame], End]:
    """All frames before END, and END, of the image in ``whole``."""
    _check_ends(whole)
    root, offsets, found = frames.root_state(), list[int](), list[Frame]()
    checks: collections.deque[tuple[Future[bytes], Frame]] = collections.deque()
    waiting: list[Frame] = []
    place = PREAMBLE.size
    while True:
        frame, header = _frame_at(whole, place)
        if later and _is_memory(frame):
            waiting.append(frame)
        elif executor is None:
            frames.check_digest(frames.digest(header.raw, frame.record, frame.data), frame)
        else:
            checks.append((executor.submit(frames.digest, header.raw, frame.record, frame.data), frame))
        while checks and (len(checks) > _CHECKS_AHEAD or frame.kind == Kind.END):
            future, checked = checks.popleft()
            frames.check_digest(future.result(), checked)
        if frame.kind == Kind.END:
            if header.end + TRAILER.size != len(whole):
                raise ImageDamaged("there are bytes behind END", object=f"offset {header.end}")
            frames.check_trailer(whole[header.end :], place)
            end = frames.check_end(frame, offsets, root.digest())
            if waiting and not _records_known(found):
                for one in waiting:
                    one.verify()
            return found, end
        offsets.append(place)
        root.update(header.digest)
        found.append(frame)
        place = header.end


def _is_memory(frame: Frame) -> bool:
    return frame.kind == Kind.PAGES and frame.runs().space is Space.MEMORY


def _records_known(found: list[Frame]) -> bool:
    """Whether the records of all pages are vouched for, so that their bytes may be verified later. ImageDamaged if they
    are not what is vouched for."""
    told = [frame.decode(PageRecords) for frame in found if frame.kind == Kind.PAGE_RECORDS]
    if not told:
        return False
    state = RecordsDigest()
    for frame in found:
        if frame.kind == Kind.PAGES:
            state.add(frame.record)
    if told[-1] != state.made():
        raise ImageDamaged("the records of pages are not those that the image had when it was made")
    return True


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
