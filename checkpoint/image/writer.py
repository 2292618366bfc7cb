"""An image as a file: written under a temporary name, made durable, and only then given its name."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from types import TracebackType
from typing import Self

from checkpoint.errors import ImageNotWritten
from checkpoint.image.format import Buffer, FrameWriter, Kind, PageRun, page_frames

__all__ = ["ImageFile", "write_all"]

_MODE = 0o600
#: buffers that one writev may take (IOV_MAX, limits.h)
_IOV_MAX = 1024


class ImageFile:
    """Writes one image file: ``with ImageFile(path) as image: image.record(..); image.pages(..)``.

    The file appears under ``path`` when the block ends without an exception, complete and on disk, readable by its
    owner only; it replaces a file of that name. After an exception nothing of it is left.

    path      where the image goes; its directory also takes the temporary file
    executor  computes the digests of pages beside the writing; then each run given to pages() must stay untouched
              while the next ``AHEAD`` are asked for
    sign      makes the 64 bytes of an Ed25519 signature of the root digest
    """

    #: digests that are under way while a frame is written
    AHEAD = 2

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        executor: Executor | None = None,
        sign: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self.path = os.fspath(path)
        #: computes digests while frames are written; set before the block at the latest
        self.executor = executor
        self._sign = sign
        self._writer = FrameWriter()
        self._directory = -1
        self._fd = -1
        self._temporary = ""
        parent, name = os.path.split(os.path.abspath(self.path))
        #: where the file lies until it is complete
        self.temporary = os.path.join(parent, f".{name}.{secrets.token_hex(8)}.tmp")

    def __enter__(self) -> Self:
        parent, self._temporary = os.path.split(self.temporary)
        try:
            # everything else is done relative to the directory: renaming it meanwhile does not lead us astray
            self._directory = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self._temporary, flags, _MODE, dir_fd=self._directory)
            # the umask may have taken bits; a default ACL may have given some
            os.fchmod(self._fd, _MODE)
            self._put(self._writer.begin())
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError):
                raise self._failed(error) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            index = self._writer.page_index()
            if index is not None:
                # a program that does not know it can do without: it reads all bytes first
                self.record(Kind.PAGE_INDEX, index, optional=True)
            self._put(self._writer.end(self._sign))
            os.fsync(self._fd)
            name = os.path.basename(os.path.abspath(self.path))
            os.rename(self._temporary, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            self._temporary = ""
            os.fsync(self._directory)
        except OSError as failure:
            raise self._failed(failure) from failure
        finally:
            self._discard()

    @property
    def size(self) -> int:
        """Bytes written up to now."""
        return self._writer.offset

    def record(self, kind: str, value: object, *, optional: bool = False) -> None:
        """Append a frame with the record ``value``. ImageNotWritten, ImageLimitExceeded."""
        self._put(self._writer.frame(kind, value, optional=optional))

    def pages(self, runs: Iterable[PageRun]) -> int:
        """Append PAGES frames; the bytes of pages in them. ImageNotWritten."""
        total = 0
        for buffers in page_frames(self._writer, runs, self.executor, self.AHEAD):
            self._put(buffers)
            total += len(buffers[-1])
        return total

    def _put(self, buffers: list[Buffer]) -> None:
        try:
            for first in range(0, len(buffers), _IOV_MAX):
                write_all(self._fd, buffers[first : first + _IOV_MAX])
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> ImageNotWritten:
        return ImageNotWritten(f"the image could not be written: {error.strerror}", object=self.path)

    def _discard(self) -> None:
        """Close; remove the temporary file unless it has got its name."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if self._temporary:
                os.unlink(self._temporary, dir_fd=self._directory)
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1


def write_all(fd: int, buffers: Iterable[Buffer]) -> None:
    """All of these bytes, in as few system calls as the other end takes them in. OSError."""
    views = [memoryview(b) for b in buffers if len(b)]
    while views:
        count = os.writev(fd, views)
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
