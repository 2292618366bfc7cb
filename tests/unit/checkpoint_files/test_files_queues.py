"""Large TCP queues on their way outside the records: taken apart, carried, put together again; and hostile input."""

import dataclasses
import random

import pytest

from checkpoint.errors import BadFileRecord
from checkpoint.files.queues import LARGE, Queues, apart, queue_runs
from checkpoint.files.tcpfile import TcpFile
from checkpoint.image.frames import DATA_MAX, PageRun, Space
from tcpstate import codec
from tcpstate.connid import ConnId
from tcpstate.record import Buffers, ConnectionRecord, Family, Negotiated, State, Windows

BYTES = random.Random(5).randbytes(3 * DATA_MAX)


def connection(receive: bytes, send: bytes, sent: int) -> ConnectionRecord:
    una = 0xFFFF_FF00  # the numbers wrap inside the queue
    return ConnectionRecord(
        conn_id=ConnId.tcp("10.0.0.1", 80, "10.0.0.2", 5000),
        family=Family.IPV4,
        state=State.ESTABLISHED,
        snd_una=una,
        snd_nxt=(una + sent) & 0xFFFFFFFF,
        send_queue=send,
        rcv_nxt=77,
        receive_queue=receive,
        windows=Windows(snd_wl1=1, snd_wnd=2, max_window=3, rcv_wnd=4, rcv_wup=5),
        negotiated=Negotiated(mss=1000, snd_wscale=None, rcv_wscale=None, sack=False, timestamps=False),
        buffers=Buffers(send=1, receive=2, send_locked=False, receive_locked=False),
        congestion="cubic",
    )


def file(one: ConnectionRecord, early: int = 0) -> TcpFile:
    return TcpFile(family=2, conn_id=str(one.conn_id), connection=one, received=early, flags=0)


def carried(record: TcpFile) -> TcpFile:
    return codec.unpack(TcpFile, codec.pack(record))


@pytest.mark.parametrize("receive", [0, 10, LARGE, LARGE + 1, 2 * DATA_MAX + 5])
@pytest.mark.parametrize("send", [0, 10, LARGE, LARGE + 1, 2 * DATA_MAX + 5])
@pytest.mark.parametrize("early", [0, 100, DATA_MAX + 7])
def test_what_is_taken_apart_comes_together_again(receive: int, send: int, early: int) -> None:
    head, rest = BYTES[:early], BYTES[early : early + receive]
    whole = file(connection(rest, BYTES[:send], send // 2), early)
    queues = Queues()
    for run in queue_runs(Space.RECEIVED, 4, memoryview(head), 0):
        queues.take(run)
    small, runs = apart(whole, 4)
    assert len(codec.pack(small)) < 3 * LARGE
    for run in runs:
        assert len(run.data) <= DATA_MAX
        queues.take(run)
    again, pieces = queues.whole(carried(small), 4)
    assert again.connection is not None
    assert b"".join(pieces) + again.connection.receive_queue == head + rest
    assert dataclasses.replace(again.connection, receive_queue=rest) == whole.connection


def test_early_bytes_that_do_not_count_are_replaced() -> None:
    # somebody read from the queue between the early look and the freeze
    queues = Queues()
    for run in queue_runs(Space.RECEIVED, 0, memoryview(b"stale" * LARGE), 0):
        queues.take(run)
    small, runs = apart(file(connection(BYTES, b"", 0)), 0)
    for run in runs:
        queues.take(run)
    assert b"".join(queues.whole(small, 0)[1]) == BYTES
    none, early = queues.whole(file(connection(b"abc", b"", 0)), 0)
    assert (early, none.connection and none.connection.receive_queue) == ([], b"abc")


def piece(start: int, data: bytes, *more: tuple[int, int]) -> PageRun:
    return PageRun(space=Space.SENT, id=1, runs=((start, len(data)), *more), data=memoryview(data))


def test_memory_of_small_pieces_is_free_at_once() -> None:
    queues = Queues()
    buffer = bytearray(b"x" * 100)
    assert not queues.take(PageRun(space=Space.RECEIVED, id=1, runs=((0, 100),), data=memoryview(buffer)))
    buffer[:] = b"y" * 100
    _, early = queues.whole(file(connection(b"", b"", 0), 100), 1)
    assert b"".join(early) == b"x" * 100
    assert queues.take(PageRun(space=Space.RECEIVED, id=1, runs=((100, DATA_MAX),), data=memoryview(BYTES)[:DATA_MAX]))


@pytest.mark.parametrize("run", [piece(5, b"abc"), piece(0, b"abc", (3, 4)), piece(2**31, b"abc")])
def test_pieces_that_do_not_follow_each_other_are_refused(run: PageRun) -> None:
    with pytest.raises(BadFileRecord):
        Queues().take(run)


def test_a_gap_is_refused() -> None:
    queues = Queues()
    queues.take(piece(0, b"abc"))
    with pytest.raises(BadFileRecord):
        queues.take(piece(4, b"abc"))


@pytest.mark.parametrize("told", [1, 2, 4, 1 << 40])
def test_a_length_that_did_not_come_is_refused(told: int) -> None:
    queues = Queues()
    queues.take(piece(0, b"abc"))
    small = dataclasses.replace(file(connection(b"", b"", 0)), to_send=told)
    with pytest.raises(BadFileRecord):
        queues.whole(small, 1)
    with pytest.raises(BadFileRecord):
        queues.whole(dataclasses.replace(file(connection(b"", b"", 0)), received=told), 1)


@pytest.mark.parametrize(
    "fields", [{"sent": 1}, {"to_send": -1}, {"received": -1}, {"to_send": 4, "sent": 5}, {"sent": -1}]
)
def test_impossible_lengths_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="lengths"):
        dataclasses.replace(file(connection(b"", b"", 0)), **fields)


def test_a_send_queue_in_two_places_is_refused() -> None:
    with pytest.raises(ValueError, match="two places"):
        dataclasses.replace(file(connection(b"", b"abc", 0)), to_send=3)
