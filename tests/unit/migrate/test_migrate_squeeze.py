"""When compression pays, and what is believed of compressed bytes."""

from __future__ import annotations

import os
import threading

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import BadFrame
from migrate.messages import Keepalive
from migrate.squeeze import FEATURE, SHORTEST, Squeeze, agreed, expand
from migrate.wire import HEADER, MAX_CHUNK, PREAMBLE, FrameKind, ImageWriter
from tests.unit.migrate.test_migrate_wire import Sink, line, raw, received

TEXT = (b"%d is a number of the kind that memory is full of; " * 400 % tuple(range(400))).ljust(1 << 20, b"\0")
NOISE = os.urandom(1 << 20)


class Line:
    """A line of a given rate, and a processor that compresses at another; in bytes per second."""

    def __init__(self, rate: float, *, processor: float = 400e6) -> None:
        self.now = 0.0
        self.rate = rate
        self.processor = processor
        self.squeeze = Squeeze(self._clock)

    def _clock(self) -> float:
        # a look at it costs what a chunk of 1 MiB takes: each that is compressed is between two
        self.now += (1 << 20) / self.processor
        return self.now

    def send(self, chunk: bytes) -> bool:
        """Whether it went compressed."""
        packed = self.squeeze.chunk([chunk])
        took = len(chunk if packed is None else packed) / self.rate
        self.now += took
        if packed is None:
            self.squeeze.sent(len(chunk), took)
        return packed is not None


@pytest.mark.parametrize(
    ("rate", "chunk", "pays"),
    [
        (12e6, TEXT, True),
        (120e6, TEXT, True),
        (12e6, NOISE, False),
        (1200e6, TEXT, False),
        (550e6, TEXT, False),
    ],
)
def test_it_is_done_where_it_pays(rate: float, chunk: bytes, pays: bool) -> None:
    wire = Line(rate)
    done = [wire.send(chunk) for _ in range(200)]
    # until the line has shown its rate nothing is: it may be a fast one
    assert not any(done[:8])
    assert sum(done[10:]) > 180 if pays else sum(done) < 10


def test_it_is_begun_and_ended_as_the_memory_and_the_line_change() -> None:
    wire = Line(50e6)
    for _ in range(20):
        wire.send(TEXT)
    assert wire.send(TEXT)
    assert not any([wire.send(NOISE) for _ in range(60)][10:]), "what does not shrink is not compressed for long"
    assert any(wire.send(TEXT) for _ in range(70)), "but is tried again"
    wire.rate = 2e9
    done = [wire.send(TEXT) for _ in range(10_000)]
    assert done[0]
    assert not any(done[-100:]), "a line that has become fast is noticed, in time"


def test_what_is_short_goes_as_it_is() -> None:
    wire = Line(1e6)
    for _ in range(30):
        wire.send(TEXT)
    assert wire.squeeze.chunk([bytes(SHORTEST - 1)]) is None
    assert wire.squeeze.chunk([bytes(SHORTEST), b""]) is not None


def test_both_sides_have_to_want_it() -> None:
    assert agreed(True, {"other"}) is None
    assert agreed(False, {FEATURE}) is None
    assert agreed(True, {FEATURE}) is not None


@given(st.binary(min_size=1, max_size=3000))
def test_what_was_compressed_comes_back(data: bytes) -> None:
    packed = zstandard.ZstdCompressor().compress(data)
    assert expand(packed, 3000) == data
    with pytest.raises(BadFrame):
        expand(packed, len(data) - 1)
    with pytest.raises(BadFrame):
        expand(packed[:-1], 3000)
    with pytest.raises(BadFrame):
        expand(packed + b"\0", 3000)


@given(st.binary(max_size=100))
def test_other_bytes_are_a_bad_frame(data: bytes) -> None:
    with pytest.raises(BadFrame):
        expand(data, MAX_CHUNK)


def test_a_size_that_is_not_told_is_refused() -> None:
    packed = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(5000))
    with pytest.raises(BadFrame):
        expand(packed, MAX_CHUNK)


def test_a_bomb_takes_no_memory() -> None:
    packed = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    assert len(packed) < 10_000
    with raw() as (sock, channel):
        sock.sendall(PREAMBLE + HEADER.pack(FrameKind.SQUEEZED, bytes(3), len(packed), 0) + packed)
        channel.receive()
        sink = Sink()
        with pytest.raises(BadFrame, match="claim"):
            channel.take_image(sink)
        assert not sink.data


@pytest.mark.parametrize("room", [1000, 100_000, 1 << 20])
def test_the_image_is_the_same_whatever_goes_compressed(room: int) -> None:
    chunks = [TEXT, NOISE[:200_000], b"small", TEXT * 5, NOISE, TEXT] * 5
    squeeze = Squeeze()
    squeeze.sent(9 << 20, 1.0)
    squeeze.sent(1 << 20, 1.0)
    with line() as (source, target):
        writer = ImageWriter(source, squeeze=squeeze)
        sent = threading.Thread(target=lambda: (writer.write(chunks), writer.flush(), source.send(Keepalive())))
        sent.start()
        sink = Sink(room)
        assert received(target, sink) == Keepalive()
        sent.join()
        assert sink.data == b"".join(chunks)
        assert writer.written == len(sink.data)
        before, after = squeeze.squeezed
        assert after < before
        assert source.bytes_sent < writer.written
