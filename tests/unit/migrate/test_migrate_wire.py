"""Frames over real descriptors: cut anywhere, interleaved, damaged, silent."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import BadFrame, LinkLost, LinkSilent, NotTcpmig
from migrate.messages import Abort, Captured, Failure, Keepalive, Measure, Message
from migrate.wire import (
    MAX_CHUNK,
    MAX_MESSAGE,
    PREAMBLE,
    Channel,
    FrameKind,
    ImageFrame,
    ImageWriter,
    encode,
    parse_header,
)

ABORT = Abort(migration="m", failure=Failure(code="TM-0100", message="it broke"))


class Sink:
    """Takes image bytes in rooms of a given size."""

    def __init__(self, room: int = 1 << 20) -> None:
        self.data = bytearray()
        self._room = memoryview(bytearray(room))

    def buffer(self) -> memoryview:
        return self._room

    def received(self, count: int) -> None:
        self.data += self._room[:count]


@contextlib.contextmanager
def line(silence: float = 5.0) -> Iterator[tuple[Channel, Channel]]:
    """The source's and the target's channel on one socket pair."""
    a, b = socket.socketpair()
    with a, b:
        yield (
            Channel(a.fileno(), a.fileno(), silence=silence),
            Channel(b.fileno(), b.fileno(), silence=silence, listens=False),
        )


@contextlib.contextmanager
def raw(silence: float = 5.0) -> Iterator[tuple[socket.socket, Channel]]:
    """A bare end, and a channel on the other."""
    a, b = socket.socketpair()
    with a, b:
        yield a, Channel(b.fileno(), b.fileno(), silence=silence)


def received(channel: Channel, sink: Sink) -> Message:
    """The next message; image bytes before it go into the sink."""
    while True:
        found = channel.receive()
        if isinstance(found, ImageFrame):
            channel.take_image(sink)
        else:
            assert found is not None
            return found


def test_messages_and_image_arrive_in_order() -> None:
    with line() as (source, target):
        source.send(Measure(number=1))
        source.send_image([b"abc", b"", bytearray(b"def"), memoryview(b"ghi")])
        source.send(Keepalive(), Measure(number=2))
        sink = Sink(room=2)
        assert received(target, sink) == Measure(number=1)
        assert received(target, sink) == Keepalive()
        assert received(target, sink) == Measure(number=2)
        assert sink.data == b"abcdefghi"
        assert source.bytes_sent == target.bytes_received


@given(st.lists(st.binary(min_size=1, max_size=200), max_size=6), st.integers(1, 9), st.integers(1, 50))
def test_any_cut_of_the_stream_gives_the_same(pieces: list[bytes], step: int, room: int) -> None:
    stream = PREAMBLE
    for i, piece in enumerate(pieces):
        stream += struct.pack("<B3xII", FrameKind.IMAGE, len(piece), 0) + piece + encode(Measure(number=i))
    sink = Sink(room)
    with raw() as (end, channel):
        found: list[Message] = []
        for at in range(0, len(stream), step):
            end.send(stream[at : at + step])
            while True:
                message = channel.receive(0)
                if message is None:
                    break
                if isinstance(message, ImageFrame):
                    rest = stream[at + step :]
                    end.send(rest)
                    channel.take_image(sink)
                    found += _all(channel, sink)
                    assert found == [Measure(number=i) for i in range(len(pieces))]
                    assert sink.data == b"".join(pieces)
                    return
                found.append(message)
        assert not pieces


def _all(channel: Channel, sink: Sink) -> Iterator[Message]:
    while (found := channel.receive(0)) is not None:
        if isinstance(found, ImageFrame):
            channel.take_image(sink)
        else:
            yield found


def test_something_else_on_the_line_is_named() -> None:
    with raw() as (end, channel):
        end.send(b"Welcome to host b!\n")
        with pytest.raises(NotTcpmig, match="Welcome to host b!"):
            channel.receive()


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack("<B3xII", 9, 1, 0),
        struct.pack("<B3xII", FrameKind.MESSAGE, MAX_MESSAGE + 1, 0),
        struct.pack("<B3xII", FrameKind.IMAGE, MAX_CHUNK + 1, 0),
        struct.pack("<BBBBII", FrameKind.IMAGE, 1, 0, 0, 5, 0),
        struct.pack("<B3xII", FrameKind.MESSAGE, 3, 0) + b"abc",
        struct.pack("<B3xII", FrameKind.MESSAGE, 3, zlib.crc32(b"abc")) + b"abc",
    ],
)
def test_hostile_frames_are_refused(frame: bytes) -> None:
    with raw() as (end, channel):
        end.send(PREAMBLE + frame)
        with pytest.raises(BadFrame):
            channel.receive()


@given(st.integers(0, 400), st.integers(1, 255))
def test_any_changed_byte_of_a_message_is_noticed(at: int, change: int) -> None:
    data = bytearray(PREAMBLE + encode(ABORT))
    data[at % len(data)] ^= change
    with raw(silence=0.01) as (end, channel):
        end.send(data)
        # a longer length waits for bytes that never come
        try:
            found = channel.receive()
        except (BadFrame, NotTcpmig, LinkSilent):
            return
        # its kind was changed: then it is no message, and where an image is not due, the machines refuse it
        assert isinstance(found, ImageFrame)


@given(st.binary(min_size=12, max_size=12))
def test_headers_are_refused_or_bounded(data: bytes) -> None:
    try:
        kind, length, _ = parse_header(data)
    except BadFrame:
        return
    assert length <= (MAX_MESSAGE if kind is FrameKind.MESSAGE else MAX_CHUNK)


def test_the_end_of_the_line() -> None:
    with raw() as (end, channel):
        end.send(PREAMBLE + encode(Keepalive())[:5])
        end.close()
        with pytest.raises(LinkLost):
            channel.receive()


def test_the_last_words_are_heard_after_a_broken_pipe() -> None:
    with raw() as (end, channel):
        end.send(PREAMBLE + encode(ABORT))
        end.close()
        with pytest.raises(LinkLost):
            _send_much(channel)
        assert channel.pending
        assert channel.receive() == ABORT


@pytest.mark.parametrize(("haste", "lasts"), [(0.0, 30.0), (30.0, 30.0), (30.0, 0.0)])
def test_a_hasty_line_hears_and_is_silent_like_any_other(
    haste: float, lasts: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it falls asleep (30 s: it never does here) and after."""
    monkeypatch.setattr("migrate.wire.HASTE", haste)
    monkeypatch.setattr("migrate.wire.HASTE_LASTS", lasts)
    with line(silence=0.05) as (source, target):
        target.hasty = True
        assert target.receive(0.01) is None
        late = threading.Timer(0.02, source.send, [Measure(number=7)])
        late.start()
        try:
            assert target.receive(5.0) == Measure(number=7)
        finally:
            late.join()
        with pytest.raises(LinkSilent):
            target.receive()
        source.send(ABORT)
        assert target.receive() == ABORT


def test_silence_ends_a_receive_and_a_send() -> None:
    with raw(silence=0.05) as (end, channel):
        with pytest.raises(LinkSilent):
            channel.receive()
        assert channel.receive(0.01) is None
        with pytest.raises(LinkSilent):
            _send_much(channel)
        assert end.recv(8) == PREAMBLE


def test_words_that_come_while_sending_are_kept() -> None:
    with raw() as (end, channel):
        end.send(PREAMBLE + encode(ABORT))
        reader = threading.Thread(target=_drain, args=(end, 8 << 20))
        timer = threading.Timer(0.05, reader.start)
        timer.start()
        for _ in range(8):
            channel.send_image([bytes(1 << 20)])
        timer.join()
        reader.join()
        assert channel.pending


def _send_much(channel: Channel) -> None:
    for _ in range(100):
        channel.send_image([bytes(1 << 20)])


def _drain(end: socket.socket, count: int) -> None:
    while count > 0:
        count -= len(end.recv(1 << 20))


def test_descriptors_are_given_back_as_they_were() -> None:
    with line() as (source, target):
        fd = source._read_fd
        assert not os.get_blocking(fd)
        source.close()
        target.close()
        assert os.get_blocking(fd)


def test_pipes_carry_it_too() -> None:
    (r1, w1), (r2, w2) = os.pipe(), os.pipe()
    try:
        source, target = Channel(r1, w2), Channel(r2, w1, listens=False)
        source.send(ABORT)
        target.send(Captured(segments=(b"1",)))
        assert (target.receive(), source.receive()) == (ABORT, Captured(segments=(b"1",)))
        os.close(w1)
        with pytest.raises(LinkLost):
            source.receive()
    finally:
        for fd in (r1, r2, w2):
            os.close(fd)


def test_the_aside_descriptor_is_read_while_waiting() -> None:
    r, w = os.pipe()
    heard: list[bytes] = []
    a, b = socket.socketpair()
    with a, b:

        def relay() -> bool:
            heard.append(os.read(r, 100))
            return bool(heard[-1])

        channel = Channel(b.fileno(), b.fileno(), silence=1.0, aside={r: relay})
        os.write(w, b"Permission denied")
        os.close(w)
        assert channel.receive(0.05) is None
        assert heard == [b"Permission denied", b""]
        os.close(r)


@given(st.lists(st.integers(0, 200_000), max_size=8), st.sampled_from([1, 100, 1 << 20]))
def test_the_image_writer_keeps_every_byte_in_order(sizes: list[int], room: int) -> None:
    frames: list[bytes] = []

    class Line:
        def send_image(self, pieces: list[memoryview]) -> None:
            frames.append(b"".join(map(bytes, pieces)))

    writer = ImageWriter(Line())  # type: ignore[arg-type]
    data = [os.urandom(size) for size in sizes]
    for piece in data:
        for at in range(0, len(piece), max(room, 1000)):
            writer.write([piece[at : at + max(room, 1000)]])
    writer.flush()
    assert b"".join(frames) == b"".join(data)
    assert writer.written == sum(sizes)
    assert all(0 < len(frame) <= MAX_CHUNK for frame in frames)


def test_a_piece_longer_than_a_frame_is_cut() -> None:
    with line() as (source, target):
        data = os.urandom(2 * MAX_CHUNK + 5)
        thread = threading.Thread(target=lambda: (ImageWriter(source).write([b"x", data]), source.send(Keepalive())))
        thread.start()
        sink = Sink()
        assert received(target, sink) == Keepalive()
        thread.join()
        assert sink.data == b"x" + data
