"""Connections told again by their numbers: the very records come back, and nothing else is taken for them."""

import dataclasses
import random

import pytest

from checkpoint.errors import BadFileRecord
from checkpoint.files.eventfd import EventFd
from checkpoint.files.peers import StandIn
from checkpoint.files.retold import Retold, join, split
from checkpoint.files.tcpfile import TcpFile
from checkpoint.files.treefiles import AheadFiles, AheadPlace
from checkpoint.records import FilesDelta
from tcpstate import codec
from tcpstate.connid import ConnId
from tcpstate.errors import BadRecord
from tcpstate.record import (
    Buffers,
    ConnectionRecord,
    Family,
    LocalFin,
    Negotiated,
    SoftState,
    State,
    Timestamps,
    Windows,
)
from tcpstate.retold import ROW, SAME, numbers
from tests.unit.checkpoint_files.test_files_queues import file

NUMBERS = {
    "snd_una", "snd_nxt", "send_queue", "rcv_nxt", "receive_queue", "windows", "buffers", "timestamps", "soft",
    "options",
}  # fmt: skip
SOFT = SoftState(
    cwnd=10, ssthresh=0x7FFFFFFF, srtt=20_000, rttvar=500, rto=204_000, min_rtt=19_000, reordering=3, path_mtu=1500,
    advertised_mss=1448, pacing_rate=(1 << 64) - 1,
)  # fmt: skip
FIRST = ConnectionRecord(
    conn_id=ConnId.tcp("10.0.0.1", 80, "10.0.0.2", 5000),
    family=Family.IPV4,
    state=State.ESTABLISHED,
    snd_una=0xFFFF_FF00,
    snd_nxt=0xFFFF_FF00,
    send_queue=b"",
    rcv_nxt=77,
    receive_queue=b"",
    windows=Windows(snd_wl1=1, snd_wnd=2, max_window=3, rcv_wnd=4, rcv_wup=5),
    negotiated=Negotiated(mss=1000, snd_wscale=7, rcv_wscale=8, sack=True, timestamps=True),
    buffers=Buffers(send=1, receive=2, send_locked=False, receive_locked=True),
    congestion="cubic",
    timestamps=Timestamps(value=9, microseconds=False),
    options={"so.keepalive": (1,)},
    soft=SOFT,
)


def told(*records):
    places = [AheadPlace(pid=7, fd=10 + number, cloexec=False) for number in range(len(records))]
    return AheadFiles(files=[file(one) for one in records], places=places, read_at=5)


def changed(chance):
    """What traffic may make of it."""
    word = lambda: chance.choice([0, 1, 0xFFFF_FFFF, chance.randrange(1 << 32)])  # noqa: E731
    send, receive = chance.randbytes(chance.choice([0, 0, 5, 999])), chance.randbytes(chance.choice([0, 0, 7, 2000]))
    una = word()
    return dataclasses.replace(
        FIRST,
        snd_una=una,
        snd_nxt=(una + chance.randint(0, len(send))) & 0xFFFF_FFFF,
        send_queue=send,
        rcv_nxt=word(),
        receive_queue=receive,
        windows=Windows(snd_wl1=word(), snd_wnd=word(), max_window=word(), rcv_wnd=word(), rcv_wup=word()),
        options=chance.choice([FIRST.options, {}, {"tcp.quickack": (0,)}, {"so.linger": (1, 5), "tcp.nodelay": (1,)}]),
        buffers=Buffers(send=chance.randrange(1 << 30), receive=2, send_locked=False, receive_locked=True),
        timestamps=Timestamps(value=word(), microseconds=False),
        soft=dataclasses.replace(SOFT, cwnd=word(), srtt=word(), min_rtt=word(), pacing_rate=chance.randrange(1 << 64)),
    )


def carried(delta):
    return codec.unpack(FilesDelta, codec.pack(delta))


def test_every_field_is_told_or_must_be_the_same():
    assert {field.name for field in dataclasses.fields(ConnectionRecord)} == NUMBERS | set(SAME)
    assert not NUMBERS & set(SAME)


@pytest.mark.parametrize("seed", range(20))
def test_the_very_records_come_back(seed):
    chance = random.Random(seed)
    ahead = told(*[FIRST] * 9)
    files = {index: file(changed(chance)) for index in chance.sample(range(9), 6)}
    other = {9: EventFd(flags=0, count=0, semaphore=False)}
    delta = carried(FilesDelta.of(files | other, ahead.files))
    assert delta.files == other
    assert delta.whole(ahead) == files | other
    # to a target that does not know it
    assert carried(FilesDelta.of(files | other, ())) == FilesDelta(files=files | other)


@pytest.mark.parametrize(
    "change",
    [
        {"option_data": {"so.bindtodevice": b"eth0"}},
        {"state": State.CLOSE_WAIT},
        {"state": State.FIN_WAIT_1, "local_fin": LocalFin.SENT},
        {"congestion": "reno"},
        {"reuse_address": True},
        {"soft": None},
        {"soft": dataclasses.replace(SOFT, min_rtt=None)},
        {"soft": dataclasses.replace(SOFT, min_rtt=1 << 32)},
        {"timestamps": Timestamps(value=9, microseconds=True)},
        {"buffers": Buffers(send=1, receive=2, send_locked=True, receive_locked=True)},
        {"negotiated": dataclasses.replace(FIRST.negotiated, mss=999)},
        {"send_queue": b"ab", "urgent_out": 1},
    ],
    ids=str,
)
def test_what_is_more_than_numbers_is_told_whole(change):
    ahead = told(FIRST, FIRST)
    now = file(dataclasses.replace(FIRST, **change))
    assert numbers(FIRST, now.connection, 0) is None
    assert split({1: now}, ahead.files) == ({1: now}, None)
    assert FilesDelta.of({1: now}, ahead.files).whole(ahead) == {1: now}


@pytest.mark.parametrize(
    "change", [{"received": 5}, {"to_send": 5, "sent": 2}, {"stand_in": StandIn.CLOSE}, {"flags": 0o4000}], ids=str
)
def test_a_file_that_is_more_than_its_connection_is_told_whole(change):
    now = dataclasses.replace(file(FIRST), **change)
    assert split({0: now}, told(FIRST).files) == ({0: now}, None)


def test_one_that_has_no_connection_any_more_is_told_whole():
    now = TcpFile(family=2, conn_id="tcp:gone", flags=0)
    assert split({0: now}, told(FIRST).files) == ({0: now}, None)


def good():
    _, retold = split(
        {1: file(dataclasses.replace(FIRST, send_queue=b"abc", receive_queue=b"de"))}, told(*[FIRST] * 2).files
    )
    assert retold is not None
    return retold


@pytest.mark.parametrize("index", [-1, 2, 1 << 40])
def test_numbers_of_what_was_not_told_are_refused(index):
    with pytest.raises(BadFileRecord, match="was not told"):
        join(dataclasses.replace(good(), indexes=(index,)), told(FIRST, FIRST))
    with pytest.raises(BadFileRecord, match="was not told"):
        join(good(), None)


def test_one_is_told_once():
    one = good()
    with pytest.raises(BadFileRecord, match="or twice"):
        join(Retold(indexes=(1, 1), numbers=one.numbers * 2, queues=one.queues * 2), told(FIRST, FIRST))


@pytest.mark.parametrize(("queues", "what"), [(b"abcd", "shorter"), (b"abcdef", "longer")])
def test_queues_of_another_length_are_refused(queues, what):
    with pytest.raises(BadFileRecord, match=what):
        join(dataclasses.replace(good(), queues=queues), told(FIRST, FIRST))


def test_numbers_that_contradict_each_other_are_refused():
    row = list(ROW.unpack(good().numbers))
    row[1] = row[0] + 4  # more was sent than there is
    with pytest.raises(BadFileRecord, match="cannot go on so"):
        join(dataclasses.replace(good(), numbers=ROW.pack(*row)), told(FIRST, FIRST))
    row = list(ROW.unpack(good().numbers))
    row[9] = 1 << 31  # a buffer of 2 GiB
    with pytest.raises(BadFileRecord, match="cannot go on so"):
        join(dataclasses.replace(good(), numbers=ROW.pack(*row)), told(FIRST, FIRST))
    bare = told(dataclasses.replace(FIRST, soft=None), dataclasses.replace(FIRST, soft=None))
    with pytest.raises(BadFileRecord, match="cannot go on so"):
        join(good(), bare)


def test_options_that_were_not_told_are_refused():
    row = list(ROW.unpack(good().numbers))
    row[-1] = 1
    with pytest.raises(BadFileRecord, match="options that were not told"):
        join(dataclasses.replace(good(), numbers=ROW.pack(*row)), told(FIRST, FIRST))


def test_options_that_many_have_are_told_once():
    ahead = told(*[FIRST] * 40)
    files = {index: file(dataclasses.replace(FIRST, options={"tcp.quickack": (index % 2,)})) for index in range(40)}
    whole, retold = split(files, ahead.files)
    assert retold is not None
    assert not whole
    assert len(retold.options) == 2
    assert join(retold, ahead) == files


def test_where_each_has_other_options_they_are_told_whole():
    ahead = told(*[FIRST] * 100)
    files = {index: file(dataclasses.replace(FIRST, options={"so.priority": (index,)})) for index in range(100)}
    whole, retold = split(files, ahead.files)
    assert len(whole) == 100 - 64
    assert whole | join(retold, ahead) == files


def test_rows_that_are_cut_off_are_refused():
    one = good()
    packed = codec.pack(FilesDelta(retold=one)).replace(codec.pack(one.numbers), codec.pack(one.numbers[:-1]))
    with pytest.raises(BadRecord, match="do not agree"):
        codec.unpack(FilesDelta, packed)
