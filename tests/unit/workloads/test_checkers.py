"""The checkers must find what is wrong: a checker that cannot fail proves nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.packets import Flag, parse
from tests.workloads.gaps import GapLog
from tests.workloads.randomstream import BLOCK, RandomStream
from tests.workloads.resp import RespError, RespReader, command


def produced(seed: int, count: int) -> bytes:
    stream, made = RandomStream(seed), b""
    while len(made) < count:
        piece = stream.peek()
        made += piece
        stream.advance(len(piece))
    return made[:count]


LONG = produced(5, 6 * BLOCK)


@given(st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=6))
def test_stream_checks_in_any_pieces(sizes: list[int]) -> None:
    checker, at = RandomStream(5), 0
    for size in sizes:
        piece = LONG[at : at + size]
        assert checker.check(piece) == ""
        at += len(piece)
    assert checker.position == at


@given(st.integers(0, 4 * BLOCK), st.integers(1, 2 * BLOCK - 64))
def test_stream_finds_a_loss_and_says_whence(at: int, lost: int) -> None:
    checker = RandomStream(5)
    assert checker.check(LONG[:at]) == ""
    wrong = checker.check(LONG[at + lost :])
    # The bytes after the loss may begin as those that were lost, but not for long.
    assert wrong.startswith("byte ")
    assert "stream 5" in wrong


@pytest.mark.parametrize("count", [1, 16, 1448, BLOCK, 2 * BLOCK])
def test_stream_finds_a_repetition(count: int) -> None:
    checker = RandomStream(5)
    assert checker.check(LONG[: 3 * BLOCK]) == ""
    assert checker.check(LONG[3 * BLOCK - count : 4 * BLOCK]) != ""


@given(st.integers(0, len(LONG) - 1), st.integers(1, 255))
def test_stream_finds_an_altered_byte_at_its_place(at: int, change: int) -> None:
    altered = LONG[:at] + bytes([LONG[at] ^ change]) + LONG[at + 1 :]
    assert RandomStream(5).check(altered).startswith(f"byte {at} of stream 5")


def test_streams_of_other_seeds_differ() -> None:
    assert RandomStream(6).check(LONG[:BLOCK]) != ""


def test_loss_of_whole_blocks_is_named() -> None:
    assert RandomStream(5).check(LONG[2 * BLOCK :]).endswith(f"belongs to byte {2 * BLOCK + 8}")


@given(st.integers(1, 400))
def test_resp_in_any_pieces(size: int) -> None:
    wire = b"+OK\r\n:17\r\n$5\r\na\r\nbc\r\n$-1\r\n-ERR no\r\n$0\r\n\r\n"
    reader, replies = RespReader(), []
    for start in range(0, len(wire), size):
        replies += reader.feed(wire[start : start + size])
    assert replies == ["OK", 17, b"a\r\nbc", None, RespError("ERR no"), b""]
    assert isinstance(replies[4], RespError)
    assert reader.pending == 0


@pytest.mark.parametrize("wire", [b"?what\r\n", b"$2\r\nabc\r\n", b":x\r\n"])
def test_resp_refuses_what_is_no_reply(wire: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        RespReader().feed(wire)


def test_resp_command() -> None:
    assert command(b"GET", b"k\r\n") == b"*2\r\n$3\r\nGET\r\n$3\r\nk\r\n\r\n"


def test_gaps() -> None:
    gaps = GapLog()
    for now in (1.0, 1.001, 1.051, 1.052):
        gaps.reply(now)
    assert gaps.largest == pytest.approx(0.05)
    gaps.waiting(1.2)
    assert gaps.largest == pytest.approx(0.148)
    gaps.pause()
    gaps.reply(9.0)
    assert gaps.largest == pytest.approx(0.148)


def test_parse_both_families_and_nothing_else() -> None:
    tcp = b"\x1b\x58\xc3\x50" + bytes(4) + b"\0\0\0\x09" + b"\x50\x14\x01\x00" + bytes(4)
    four = b"\x45" + bytes(8) + b"\x06" + bytes(2) + bytes([10, 0, 0, 1, 10, 0, 0, 2]) + tcp
    six = b"\x60" + bytes(5) + b"\x06\x40" + bytes(15) + b"\1" + bytes(15) + b"\2" + tcp
    for header, addresses in ((four, ("10.0.0.1", "10.0.0.2")), (six, ("::1", "::2"))):
        packet = parse(0.0, True, len(header) + 7, header)
        assert packet is not None
        assert (packet.source, packet.destination) == ((addresses[0], 7000), (addresses[1], 50000))
        assert (packet.flags, packet.ack, packet.length, packet.window) == (Flag.RST | Flag.ACK, 9, 7, 256)
    assert parse(0.0, True, 40, b"\x45" + bytes(8) + b"\x11" + bytes(30)) is None
    assert parse(0.0, True, 60, six[:50]) is None
