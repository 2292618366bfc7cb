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
from checkpoint.image.frames import HEADER, PREAMBLE, TRAILER, End, Frame, Kind, PageRun

__all__ = ["ImageReader", "open_image"]

#: digests that may wait for the executor while the frames are walked
_CHECKS_AHEAD = 64


class ImageReader:
    """A verified image file. Frames and their data are views of the mapped file, valid until close().

    path    as opened
    frames  all frames of known kinds before END, in order
    end     the END record
    size    bytes of the file

    The mapping is shared with the file: who may write the file (0600: its owner and root) could change it under us
    after the check. Do not open images that others may write.
    """

    def __init__(self, path: str, mapping: mmap.mmap, found: list[Frame], end: End) -> None:
        self.path = path
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


def open_image(
    path: str | os.PathLike[str], *, known: frozenset[str] | None = KNOWN_KINDS, executor: Executor | None = None
) -> ImageReader:
    """Map and verify the image file ``path``. ImageError if it is not wholly right; nothing is handed out then.

    known     kinds of frames to hand out; unknown ones are skipped if optional, else refused. None: all are handed out
    executor  computes digests beside each other
    """
    name = os.fspath(path)
    mapping = _map(name)
    whole = memoryview(mapping)
    found, end = _verify(whole, executor)
    if known is not None:
        found = [frame for frame in found if check_kind(frame, known)]
    return ImageReader(name, mapping, found, end)


def _map(path: str) -> mmap.mmap:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a fifo must not make us wait
    except OSError as error:
        raise ImageUnreadable(f"the image cannot be opened: {error.strerror}", object=path) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ImageUnreadable("this is not a regular file", object=path)
        if status.st_size == 0:
            raise ImageTruncated("the file is empty", object=path)
        return mmap.mmap(fd, status.st_size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ImageUnreadable(f"the image cannot be mapped: {error.strerror}", object=path) from error
    finally:
        os.close(fd)


def _verify(whole: memoryview, executor: Executor | None) -> tuple[list[Frame], End]:
    """All frames before END, and END, of the image in ``whole``."""
    _check_ends(whole)
    root, offsets, found = frames.root_state(), list[int](), list[Frame]()
    checks: collections.deque[tuple[Future[bytes], Frame]] = collections.deque()
    place = PREAMBLE.size
    while True:
        frame, header = _frame_at(whole, place)
        if executor is None:
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
            return found, frames.check_end(frame, offsets, root.digest())
        offsets.append(place)
        root.update(header.digest)
        found.append(frame)
        place = header.end


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
