"""Frames over a pair of descriptors: messages, and the bytes of the image between them.

Each direction starts with eight bytes that show at once whether the other end is tcpmig and whether the line changes
bytes (as PNG's signature does).  Then frames::

    0  kind   1 message, 2 image, 3 image, compressed
    1..3  zero      4  length      8  crc32 (of a message; 0 for image bytes)

Little endian.  Compressed image bytes (zstd, a frame of its own each) come only to a side that said it reads them.
Image bytes carry digests of their own inside, and are neither copied nor looked at here: they go out by
writev from where they lie, and come in by readv where the reader of the image wants them.  A descriptor may be a pipe
or a socket; both ends are set to not block, and every wait has an end.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import fcntl
import os
import select
import socket
import stat
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

from checkpoint import urgency
from migrate.errors import BadFrame, LinkLost, LinkSilent, NotTcpmig
from migrate.messages import Message
from migrate.squeeze import Squeeze, expand
from tcpstate import codec
from tcpstate.errors import BadRecord
from tcpstate.slotted import dataclass

__all__ = [
    "MAX_CHUNK",
    "MAX_MESSAGE",
    "PREAMBLE",
    "Buffer",
    "Channel",
    "FrameKind",
    "ImageFrame",
    "ImageSink",
    "ImageWriter",
    "encode",
    "parse_header",
]

PREAMBLE = b"TCPMIG\r\n"
HEADER = struct.Struct("<B3sII")

#: longest message; captured segments and the manifest of a large tree are the long ones
MAX_MESSAGE = 16 << 20
#: longest frame of image bytes
MAX_CHUNK = 4 << 20
#: small pieces of the image are collected up to this length
GATHER = 64 << 10
#: pieces up to this length are copied to be collected, longer ones are sent from where they lie
SMALL = 16 << 10
#: bytes that the kernel should keep for us in a pipe or socket
KERNEL_ROOM = 1 << 20
#: seconds of silence after which the line counts as dead
SILENCE = 60.0
#: seconds in which a wait of a hasty line looks again and again before it sleeps; in which a line is hasty
HASTE, HASTE_LASTS = 0.05, 0.5

SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33  # asm-generic/socket.h
IOV_MAX = 1024  # linux/uio.h UIO_MAXIOV

Buffer = bytes | bytearray | memoryview


class FrameKind(enum.IntEnum):
    """What a frame carries."""

    MESSAGE = 1
    IMAGE = 2
    SQUEEZED = 3


class ImageSink(Protocol):
    """Who takes the bytes of the image (``checkpoint.image.format.FrameReader`` is one)."""

    def buffer(self) -> memoryview:
        """Where the next bytes are to be put. Never empty."""

    def received(self, count: int) -> object:
        """``count`` bytes have been put at the start of buffer()."""


@dataclass(frozen=True, slots=True)
class ImageFrame:
    """A frame of image bytes has begun: :meth:`Channel.take_image` comes next."""

    length: int


def encode(message: Message) -> bytes:
    """The frame of a message. BadFrame if it is longer than the other side accepts."""
    payload = codec.pack(message)
    if len(payload) > MAX_MESSAGE:
        raise BadFrame(f"a message of {len(payload)} bytes is longer than the limit of {MAX_MESSAGE}")
    return HEADER.pack(FrameKind.MESSAGE, bytes(3), len(payload), zlib.crc32(payload)) + payload


def parse_header(data: Buffer) -> tuple[FrameKind, int, int]:
    """(kind, length, checksum); BadFrame if it cannot be a header of ours."""
    kind, zero, length, checksum = HEADER.unpack(data)
    if kind not in set(FrameKind) or zero != bytes(3):
        raise BadFrame(f"a frame starts with {bytes(data[:4]).hex()}")
    if length > (MAX_MESSAGE if kind == FrameKind.MESSAGE else MAX_CHUNK):
        raise BadFrame(f"a frame claims {length} bytes")
    return FrameKind(kind), length, checksum


def decode(payload: Buffer, checksum: int) -> Message:
    """The message in a frame. BadFrame if the checksum is wrong or it is no message of ours."""
    if zlib.crc32(payload) != checksum:
        raise BadFrame("a message has a wrong checksum")
    try:
        return codec.unpack(Message, bytes(payload))
    except BadRecord as error:
        raise BadFrame(f"a message cannot be read: {error.message}") from error


class _Collected:
    """All of one frame, in one piece."""

    def __init__(self, length: int) -> None:
        self.data = memoryview(bytearray(length))
        self._got = 0

    def buffer(self) -> memoryview:
        return self.data[self._got :]

    def received(self, count: int) -> None:
        self._got += count


def put(data: Buffer, sink: ImageSink) -> None:
    """Image bytes that are here already."""
    view = memoryview(data)
    while view:
        room = sink.buffer()[: len(view)]
        room[:] = view[: len(room)]
        sink.received(len(room))
        view = view[len(room) :]


class Channel:
    """Both directions of a line to the other host.

    read_fd, write_fd  pipe ends or a socket (then both may be the same number); they stay the caller's to close
    silence            seconds without progress after which a wait ends with LinkSilent
    listens            read messages while a send has to wait; not on the side that receives the image, whose bytes must
                       be taken one by one
    aside              descriptor -> function: called when it can be read while the channel waits (the remote shell's
                       standard error); the function returns False when there will be no more
    """

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        *,
        silence: float = SILENCE,
        listens: bool = True,
        aside: dict[int, Callable[[], bool]] | None = None,
    ) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd
        self.silence = silence
        self._hasty, self._haste_ends = False, 0.0
        self._listens = listens
        self._aside = dict(aside or {})
        self._blocking = {fd: os.get_blocking(fd) for fd in {read_fd, write_fd}}
        for fd in self._blocking:
            os.set_blocking(fd, False)
            _enlarge(fd)
        self.bytes_sent = 0
        self.bytes_received = 0
        self._greeted = False
        self._heard = bytearray()
        self._header = bytearray(HEADER.size)
        self._header_got = 0
        self._frame: tuple[FrameKind, int, int] | None = None
        self._payload_got = 0
        self._message = memoryview(b"")
        self._queue: collections.deque[Message] = collections.deque()
        self._ended = False

    def close(self) -> None:
        """Give the descriptors back as they were, blocking or not."""
        for fd, blocking in self._blocking.items():
            # already closed by its owner: nothing to give back
            with contextlib.suppress(OSError):
                os.set_blocking(fd, blocking)

    @property
    def hasty(self) -> bool:
        """Whether waits look again and again at first, in the stop, for no longer than HASTE_LASTS: see stop.md."""
        return self._hasty

    @hasty.setter
    def hasty(self, on: bool) -> None:
        ends = self._haste_ends if self._hasty else time.monotonic() + HASTE_LASTS
        self._hasty, self._haste_ends = on, ends

    @property
    def descriptors(self) -> tuple[int, int]:
        """What is read from and written to, for who goes on with the line when nothing more is to be said."""
        return self._read_fd, self._write_fd

    # --- sending

    def send(self, *messages: Message) -> None:
        """Send messages, in one system call if the line takes them. LinkLost, LinkSilent."""
        self._write([encode(message) for message in messages])

    def send_image(self, pieces: Sequence[Buffer], kind: FrameKind = FrameKind.IMAGE) -> None:
        """Send one frame of image bytes, made of ``pieces``, which may be reused when this returns."""
        length = sum(map(len, pieces))
        if not 0 < length <= MAX_CHUNK:
            raise BadFrame(f"a piece of the image has {length} bytes")
        self._write([HEADER.pack(kind, bytes(3), length, 0), *pieces])

    def _write(self, pieces: Sequence[Buffer]) -> None:
        views = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
        if not self._greeted:
            self._greeted = True
            views.insert(0, memoryview(PREAMBLE))
        at = 0
        deadline = time.monotonic() + self.silence
        while at < len(views):
            try:
                count = os.writev(self._write_fd, views[at : at + IOV_MAX])
            except BlockingIOError:
                # what the other side says meanwhile is read, else both could wait for each other
                self._wait(write=True, deadline=deadline)
                if self._listens:
                    self._read_ahead()
                continue
            except (BrokenPipeError, ConnectionResetError) as error:
                # its last words may be the reason
                if self._listens:
                    self._drain()
                raise LinkLost("the other side closed the line") from error
            self.bytes_sent += count
            deadline = time.monotonic() + self.silence
            while count:
                step = min(count, len(views[at]))
                views[at] = views[at][step:]
                count -= step
                if not len(views[at]):
                    at += 1

    # --- receiving

    def receive(self, timeout: float | None = None) -> Message | ImageFrame | None:
        """The next message, or the news that a frame of the image has begun. None after ``timeout`` seconds; without a
        timeout LinkSilent after ``silence``. LinkLost at the end of the line, NotTcpmig, BadFrame."""
        if self._queue:
            return self._queue.popleft()
        deadline = time.monotonic() + (self.silence if timeout is None else timeout)
        while True:
            found = self._read()
            if found is not None:
                return found
            if timeout is not None and time.monotonic() >= deadline:
                return None
            if not self._wait(write=False, deadline=deadline, fail=timeout is None):
                return None

    @property
    def pending(self) -> bool:
        """Whether a message has been read already, while something was sent."""
        return bool(self._queue)

    def look(self) -> None:
        """Read what is there, without waiting: messages become ``pending``. LinkLost at the end of the line."""
        self._read_ahead()
        if self._ended and not self._queue:
            raise LinkLost("the other side closed the line")

    def _read_ahead(self) -> None:
        # on the sending side only messages come in; a piece of the image here would overwrite one not yet consumed
        while not self._ended:
            try:
                found = self._read()
            except LinkLost:
                return
            if found is None:
                return
            if isinstance(found, ImageFrame):
                raise BadFrame("image bytes came from the side that receives the image")
            self._queue.append(found)

    def _drain(self) -> None:
        deadline = time.monotonic() + 1.0
        while not self._ended and time.monotonic() < deadline:
            self._read_ahead()
            if not self._ended:
                self._wait(write=False, deadline=deadline, fail=False)

    def take_image(self, sink: ImageSink) -> None:
        """Put the bytes of the frame that has begun where ``sink`` wants them, without a copy on the way."""
        if self._frame is None or self._frame[0] is FrameKind.MESSAGE:
            raise RuntimeError("no frame of the image has begun")
        kind, left, _ = self._frame
        if kind is FrameKind.SQUEEZED:
            packed = _Collected(left)
            self._take(packed, left)
            put(expand(packed.data, MAX_CHUNK), sink)
        else:
            self._take(sink, left)

    def _take(self, sink: ImageSink, left: int) -> None:
        deadline = time.monotonic() + self.silence
        while left:
            room = sink.buffer()[:left]
            # the header of the next frame comes with the end of this one, in the same system call
            views = [room, memoryview(self._header)] if len(room) == left else [room]
            count = self._readv(views)
            if count is None:
                self._wait(write=False, deadline=deadline)
                continue
            step = min(count, len(room))
            self._header_got = count - step
            left -= step
            if not left:
                self._frame = None
            sink.received(step)
            deadline = time.monotonic() + self.silence

    def _read(self) -> Message | ImageFrame | None:
        """One message, or the start of a frame of the image, if that needs no waiting. LinkLost at the end."""
        while True:
            if self._frame is not None:
                _, length, checksum = self._frame
                if self._payload_got == length:
                    self._frame = None
                    self._payload_got = 0
                    return decode(self._message, checksum)
                views = [self._message[self._payload_got :], memoryview(self._header)]
            elif len(self._heard) < len(PREAMBLE):
                if not self._hear_preamble():
                    return None
                continue
            elif self._header_got == HEADER.size:
                self._header_got = 0
                self._frame = parse_header(self._header)
                if self._frame[0] is not FrameKind.MESSAGE:
                    return ImageFrame(self._frame[1])
                self._message = memoryview(bytearray(self._frame[1]))
                continue
            else:
                views = [memoryview(self._header)[self._header_got :]]
            count = self._readv(views)
            if count is None:
                return None
            if self._frame is not None:
                step = min(count, len(views[0]))
                self._payload_got += step
                count -= step
            self._header_got += count

    def _hear_preamble(self) -> bool:
        room = bytearray(len(PREAMBLE) - len(self._heard))
        count = self._readv([memoryview(room)])
        if count is None:
            return False
        self._heard += room[:count]
        if not PREAMBLE.startswith(self._heard):
            # what a login script printed is mostly one line: show it
            with contextlib.suppress(OSError):
                self._heard += os.read(self._read_fd, 200)
            shown = bytes(self._heard).decode(errors="replace").strip()
            raise NotTcpmig(f"the other side starts with {shown[:120]!r}")
        return True

    def _readv(self, views: list[memoryview]) -> int | None:
        try:
            count = os.readv(self._read_fd, views)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            count = 0
        if count == 0:
            self._ended = True
            raise LinkLost("the other side closed the line")
        self.bytes_received += count
        return count

    def _wait(self, *, write: bool, deadline: float, fail: bool = True) -> bool:
        """Until the line can be read (or written, too); False at the deadline, or LinkSilent if ``fail``."""
        while True:
            poll = select.poll()
            reads = not self._ended and (self._listens or not write)
            if reads:
                poll.register(self._read_fd, select.POLLIN)
            if write:
                both = self._write_fd == self._read_fd and reads
                poll.register(self._write_fd, select.POLLOUT | (select.POLLIN if both else 0))
            for fd in self._aside:
                poll.register(fd, select.POLLIN)
            left = deadline - time.monotonic()
            ready = [fd for fd, _ in self._poll(poll, max(0.0, left))]
            for fd in ready:
                if fd in self._aside and not self._aside[fd]():
                    del self._aside[fd]
            if any(fd in (self._read_fd, self._write_fd) for fd in ready):
                return True
            if left <= 0:
                if fail:
                    raise LinkSilent(f"no progress on the line for {self.silence:g} seconds")
                return False

    def _poll(self, poll: select.poll, seconds: float) -> list[tuple[int, int]]:
        ready: list[tuple[int, int]] = []
        with urgency.relaxed():
            end = min(time.monotonic() + min(seconds, HASTE), self._haste_ends)
            while self._hasty and time.monotonic() < end and not (ready := poll.poll(0)):
                os.sched_yield()  # whoever else wants this processor
            return ready or poll.poll(seconds * 1000)


class ImageWriter:
    """Image bytes on their way into a channel: small pieces are collected, large ones sent from where they lie.

    before   called before each frame: the protocol's permission
    after    called after each frame: what the other side said meanwhile is attended to
    squeeze  compresses where that is quicker; None: the other side does not read it, or the user does not want it
    """

    def __init__(
        self,
        channel: Channel,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
        squeeze: Squeeze | None = None,
    ) -> None:
        self._channel = channel
        self._before, self._after = before, after
        self._squeeze = squeeze
        self._small = bytearray()
        self.written = 0

    def write(self, pieces: Sequence[Buffer]) -> None:
        """Take the next bytes of the image; ``pieces`` may be reused when this returns."""
        for piece in pieces:
            view = memoryview(piece).cast("B")
            self.written += len(view)
            if len(view) <= SMALL:
                self._small += view
                if len(self._small) >= GATHER:
                    self.flush()
                continue
            first = view[: MAX_CHUNK - len(self._small)]
            self._frame([bytes(self._small), first] if self._small else [first])
            for at in range(len(first), len(view), MAX_CHUNK):
                self._frame([view[at : at + MAX_CHUNK]])

    def flush(self) -> None:
        """Send what was collected."""
        if self._small:
            self._frame([bytes(self._small)])

    def _frame(self, pieces: Sequence[Buffer]) -> None:
        self._small.clear()
        self._before()
        if self._squeeze is None:
            self._channel.send_image(pieces)
        else:
            packed = self._squeeze.chunk(pieces)
            if packed is None:
                began = time.monotonic()
                self._channel.send_image(pieces)
                self._squeeze.sent(sum(map(len, pieces)), time.monotonic() - began)
            else:
                self._channel.send_image([packed], FrameKind.SQUEEZED)
        self._after()


def _enlarge(fd: int) -> None:
    """Ask for a large kernel buffer: fewer switches between the two processes."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode):
        # above the user's limit: then it stays as it is, and is only slower
        with contextlib.suppress(PermissionError):
            if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) < KERNEL_ROOM:
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, KERNEL_ROOM)
    elif stat.S_ISSOCK(mode):
        with socket.socket(fileno=os.dup(fd)) as line:
            for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
                # without the privilege, or on a socket without such a buffer: only slower
                with contextlib.suppress(OSError):
                    line.setsockopt(socket.SOL_SOCKET, option, KERNEL_ROOM)
