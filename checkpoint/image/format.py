"""The image container, sans-IO: frames to buffers, and bytes to frames. A file and a wire carry the same.

:class:`FrameWriter` makes buffers for ``writev``; page data are passed through, never copied.  :class:`FrameReader`
takes bytes as they come, in any chunks, and gives complete frames.  The layout is told in ``image/frames.py``; what
supersedes what in ``frames.Kind``.

Rule of trust: no length or offset is used before it is checked, nothing is allocated for bytes that have not come
(beyond one frame's data), and a frame is handed out only when its digest is right.  One exception, for speed: with an
``executor`` the digests of frames that carry data are computed by other threads, and such a frame may be handed out
before that; the failure is raised by a later call, at the latest before END is handed out.  So whoever builds from a
stream makes nothing final before END.

A stream has checksums (``frames.Flag.CHECKSUM``).  Measured here, 1 MiB chunks, GB/s: BLAKE3 6 (AVX-512), BLAKE2b
0.75-0.82, SHA-256 1.58 (with SHA extensions), SHA-512 0.75, CRC-32 3.7, XXH3 60, a copy 9.  BLAKE3 it is for what is
kept: with any other the digest takes longer than all else that is done to a page.
"""

from __future__ import annotations

import collections
import contextlib
import struct
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future

from checkpoint.errors import ImageError, ImageTruncated, UnknownFrameKind
from checkpoint.image import frames
from checkpoint.image.frames import (
    DATA_MAX,
    HEADER,
    PREAMBLE,
    TRAILER,
    Buffer,
    End,
    Flag,
    Frame,
    Header,
    Kind,
    PageRun,
    Runs,
    Space,
)
from checkpoint.image.lazypages import FileIndex, IndexMaker
from tcpstate import codec

__all__ = [
    "DATA_MAX",
    "KNOWN_KINDS",
    "Buffer",
    "End",
    "Flag",
    "Frame",
    "FrameReader",
    "FrameWriter",
    "Kind",
    "PageRun",
    "Runs",
    "Space",
    "check_kind",
    "page_frames",
]

#: the kinds that a reader accepts unless told otherwise
KNOWN_KINDS: frozenset[str] = frozenset(Kind)
#: how much a stream reader asks for while the length of what comes is not known
_SMALL_READ = 16 << 10
#: buffers of DATA_MAX bytes that a stream reader keeps for the next frames
_SPARE_BUFFERS = 8
#: digests that may be under way before a stream reader waits for the oldest
_CHECKS_AHEAD = 4


class FrameWriter:
    """Makes the buffers of one image. They must be written in the order in which they were made.

    begin() first, then frame() and pages() as often as wanted, then end().

    stream  checksums instead of full digests (``frames.Flag.CHECKSUM``): for a channel that guards against forgery
    """

    def __init__(self, *, stream: bool = False) -> None:
        self._flags = int(Flag.CHECKSUM if stream else 0)
        self._offset = 0
        self._offsets: list[int] = []
        self._digests: list[bytes | Future[list[Buffer]]] = []
        #: of a file: where memory is, and which of the digests are those of its frames
        self._pages = None if stream else IndexMaker()
        self._page_digests: list[int] = []

    def page_index(self) -> FileIndex | None:
        """Where all pages of memory so far are. Not of a stream. None if there can be no index of them."""
        if self._pages is None:
            raise RuntimeError("a stream has no index")
        return self._pages.made(self._digest(number) for number in self._page_digests)

    def _digest(self, number: int) -> bytes:
        digest = self._digests[number]
        return digest if isinstance(digest, bytes) else bytes(digest.result()[0][frames.HEADER_DIGESTED : HEADER.size])

    def _indexed(self, run: PageRun) -> bytes:
        """The record of a PAGES frame, which is the next one."""
        record = _pack_runs(run)
        if self._pages is not None and run.space is Space.MEMORY:
            self._pages.add(self._offset, len(record), run.id, run.runs)
            self._page_digests.append(len(self._digests))
        return record

    @property
    def offset(self) -> int:
        """Bytes made up to now."""
        return self._offset

    def begin(self) -> list[Buffer]:
        """The preamble."""
        if self._offset:
            raise RuntimeError("the image has begun already")
        self._offset = PREAMBLE.size
        return [frames.pack_preamble()]

    def frame(self, kind: str, payload: object, *, optional: bool = False) -> list[Buffer]:
        """A frame that carries the record ``payload`` (a dataclass, or anything that the codec writes).

        ImageLimitExceeded if it is longer than RECORD_MAX.
        """
        return self._frame(kind, codec.pack(payload), b"", Flag.OPTIONAL if optional else 0)

    def pages(self, run: PageRun) -> list[Buffer]:
        """A PAGES frame. The last buffer is ``run.data`` itself. ValueError if runs and data do not fit together."""
        record = self._indexed(run)
        return self._frame(Kind.PAGES, record, run.data, 0)

    def pages_in(self, executor: Executor, run: PageRun) -> Future[list[Buffer]]:
        """As pages(), with the digest computed by ``executor``. The frame's place in the image is taken at once."""
        record = self._indexed(run)
        raw, padding = self._place(Kind.PAGES, record, run.data, 0)

        def finish() -> list[Buffer]:
            return [raw + frames.digest(raw, record, run.data) + record + padding, run.data]

        buffers = executor.submit(finish)
        self._digests.append(buffers)
        return buffers

    def end(self, sign: Callable[[bytes], bytes] | None = None) -> list[Buffer]:
        """The END frame and the trailer. ``sign`` makes the 64 bytes of an Ed25519 signature of the root digest."""
        state = frames.root_state()
        for number in range(len(self._digests)):
            state.update(self._digest(number))
        root: bytes = state.digest()
        signature = None if sign is None else sign(root)
        index = struct.pack(f"<{len(self._offsets)}Q", *self._offsets)
        place = self._offset
        buffers = self.frame(Kind.END, End(index=index, root=root, signature=signature))
        self._offset += TRAILER.size
        return [*buffers, frames.pack_trailer(place)]

    def _frame(self, kind: str, record: bytes, data: Buffer, flags: int) -> list[Buffer]:
        raw, padding = self._place(kind, record, data, flags)
        digest = frames.digest(raw, record, data)
        self._digests.append(digest)
        head = raw + digest + record + padding
        return [head, data] if data else [head]

    def _place(self, kind: str, record: bytes, data: Buffer, flags: int) -> tuple[bytes, bytes]:
        """Give the next frame its place: the digested part of its header, and its padding."""
        if not self._offset:
            raise RuntimeError("begin() comes first")
        raw = frames.pack_header(kind, flags | self._flags, len(record), len(data), self._offset)
        header = frames.parse_header(raw + bytes(frames.DIGEST_SIZE), self._offset, stream=True)
        self._offsets.append(self._offset)
        self._offset = header.end
        return raw, bytes(header.padding)


def _pack_runs(run: PageRun) -> bytes:
    runs = Runs(space=run.space, id=run.id, runs=run.runs)
    if runs.length != len(run.data) or not run.data:
        raise ValueError(f"runs of {runs.length} bytes with {len(run.data)} bytes of data")
    record = runs.pack()
    if len(record) > frames.PAGE_RECORD_MAX:
        raise ValueError(f"{len(run.runs)} runs are too many for one frame")
    return record


def page_frames(
    writer: FrameWriter, runs: Iterable[PageRun], executor: Executor | None = None, ahead: int = 2
) -> Iterator[list[Buffer]]:
    """The PAGES frames of ``runs`` in their order, with up to ``ahead`` digests under way beside the one that is given
    out. The producer of ``runs`` must then leave ``ahead + 1`` runs untouched (``memory.pages.read(buffers=...)``)."""
    if executor is None:
        for run in runs:
            yield writer.pages(run)
        return
    waiting: collections.deque[Future[list[Buffer]]] = collections.deque()
    for run in runs:
        waiting.append(writer.pages_in(executor, run))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def check_kind(frame: Frame, known: frozenset[str]) -> bool:
    """Whether the frame is of a known kind; False: to be skipped. UnknownFrameKind if it may not be skipped."""
    if frame.kind in known:
        return True
    if frame.flags & Flag.OPTIONAL:
        return False
    raise UnknownFrameKind(
        f"the image has a part {frame.kind} that this tcpmig does not know", object=f"frame at offset {frame.offset}"
    )


class FrameReader:
    """Bytes in, frames out. One instance reads one image; after an error it only repeats it.

    Two ways to feed it: ``feed(data)``; or, without a copy of page data, ``buffer()`` to receive into, then
    ``received(count)``.  A frame's data are valid until its ``release()``.

    known     kinds that are handed out; others are skipped or refused. END is always handed out, as the last
    executor  computes the digests of page data (see the module's rule of trust)
    stream    frames with checksums are taken, too
    """

    def __init__(
        self, *, known: frozenset[str] = KNOWN_KINDS, executor: Executor | None = None, stream: bool = False
    ) -> None:
        self._known = known | {Kind.END}
        self._stream = stream
        self._executor = executor
        self._checks: collections.deque[tuple[Future[bytes], Frame]] = collections.deque()
        self._spare: list[memoryview] = []
        self._out: list[Frame] = []
        self._offset = 0
        self._small = frames.aligned_buffer(_SMALL_READ)
        self._piece = bytearray()  # what has come of a piece of known length ..
        self._data = memoryview(b"")  # .. or where data are to go, of which ..
        self._filled = 0  # .. so much has come
        self._error: ImageError | None = None
        self._parser = self._parse()
        self._need = 0
        self._expect(next(self._parser))
        #: the END record, once the whole image has come and is right
        self.end: End | None = None
        #: what came behind the image
        self.rest = b""

    def buffer(self) -> memoryview:
        """Where the next bytes are to be received. Never empty."""
        return self._data[self._filled :] if self._data else self._small

    def received(self, count: int) -> list[Frame]:
        """``count`` bytes have been put at the start of buffer(). Gives what feed() gives."""
        if not self._data:
            return self.feed(self._small[:count])
        with self._once():
            self._fill(count)
            return self._take()

    def feed(self, data: Buffer) -> list[Frame]:
        """The frames that ``data`` complete. ImageError for anything that an image cannot be."""
        view, at = memoryview(data), 0
        with self._once():
            while at < len(view) and self.end is None:
                if self._data:
                    count = min(len(view) - at, len(self._data) - self._filled)
                    self._data[self._filled : self._filled + count] = view[at : at + count]
                    self._fill(count)
                else:
                    count = min(len(view) - at, self._need - len(self._piece))
                    self._piece += view[at : at + count]
                    if len(self._piece) == self._need:
                        self._complete()
                at += count
            self.rest += bytes(view[at:])
            return self._take()

    def close(self) -> None:
        """No more bytes will come. ImageTruncated unless the image was complete."""
        if self._error is not None:
            raise self._error
        if self.end is None:
            came = self._offset + len(self._piece) + self._filled
            raise ImageTruncated(f"the image ends after {came} bytes, before its END")

    @contextlib.contextmanager
    def _once(self) -> Iterator[None]:
        if self._error is not None:
            raise self._error
        try:
            yield
        except ImageError as error:
            self._error = error
            raise

    # The parser asks for pieces: a number of bytes, or a view to be filled with as many as it has room for.

    def _parse(self) -> Generator[int | memoryview, bytes, None]:
        frames.check_preamble((yield PREAMBLE.size))
        root, offsets = frames.root_state(), list[int]()
        while True:
            place = self._offset
            header = frames.parse_header((yield HEADER.size), place, stream=self._stream)
            record = yield header.record_length
            frames.check_padding((yield header.padding), header)
            data = memoryview(b"")
            if header.data_length:
                data = (self._spare.pop() if self._spare else frames.aligned_buffer(DATA_MAX))[: header.data_length]
                yield data
            frame = Frame(header, record, data, self._recycle if data else None)
            self._check(header, frame)
            if frame.kind == Kind.END:
                self._settle(0)
                end = frames.check_end(frame, offsets, root.digest())
                frames.check_trailer((yield TRAILER.size), place)
                self._out.append(frame)
                self.end = end
                yield 0
            offsets.append(place)
            root.update(header.digest)
            if check_kind(frame, self._known):
                self._out.append(frame)
            else:
                frame.release()

    def _expect(self, piece: int | memoryview) -> None:
        if isinstance(piece, memoryview):
            self._data, self._filled = piece, 0
        else:
            self._need = piece

    def _complete(self) -> None:
        """The piece is complete; so are empty ones that follow."""
        while len(self._piece) == self._need and not self._data and self.end is None:
            piece, self._piece = bytes(self._piece), bytearray()
            self._offset += len(piece)
            self._expect(self._parser.send(piece))

    def _fill(self, count: int) -> None:
        """``count`` more bytes of data are in their place."""
        self._filled += count
        if self._filled == len(self._data):
            self._offset += self._filled
            self._data, self._filled = memoryview(b""), 0
            self._expect(next(self._parser))

    def _recycle(self, data: memoryview) -> None:
        if len(self._spare) < _SPARE_BUFFERS:
            self._spare.append(memoryview(data.obj))

    def _check(self, header: Header, frame: Frame) -> None:
        if self._executor is None or not frame.data:
            frames.check_digest(frames.digest(header.raw, frame.record, frame.data), frame)
            return
        future = self._executor.submit(frames.digest, header.raw, frame.record, frame.data)
        frame.checked_by(future)
        self._checks.append((future, frame))
        self._settle(_CHECKS_AHEAD)

    def _settle(self, ahead: int) -> None:
        """Take the results of digests that are done, waiting until no more than ``ahead`` are under way."""
        while self._checks and (len(self._checks) > ahead or self._checks[0][0].done()):
            future, frame = self._checks.popleft()
            frames.check_digest(future.result(), frame)

    def _take(self) -> list[Frame]:
        self._settle(_CHECKS_AHEAD)
        out, self._out = self._out, []
        return out
