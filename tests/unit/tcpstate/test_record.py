import contextlib
import dataclasses

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstate import codec
from tcpstate.connid import ConnId
from tcpstate.errors import BadRecord
from tcpstate.export import advance
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

U32 = st.integers(0, 0xFFFFFFFF)
SIZE = st.integers(0, (1 << 31) - 1)


@st.composite
def records(draw):
    send = draw(st.binary(max_size=50))
    sent = draw(st.integers(0, len(send)))
    una = draw(U32)
    stamped = draw(st.booleans())
    scale = draw(st.none() | st.tuples(st.integers(0, 14), st.integers(0, 14)))
    family = draw(st.sampled_from(Family))
    local, peer = ("fd00::5", "fd00::9") if family is Family.IPV6 else ("10.0.0.5", "10.0.0.9")
    return ConnectionRecord(
        conn_id=ConnId.tcp(local, draw(st.integers(0, 65535)), peer, 51514),
        family=family,
        state=draw(st.sampled_from([State.ESTABLISHED, State.CLOSE_WAIT, State.CLOSED])),
        snd_una=una,
        snd_nxt=(una + sent) & 0xFFFFFFFF,
        send_queue=send,
        rcv_nxt=draw(U32),
        receive_queue=draw(st.binary(max_size=50)),
        windows=Windows(snd_wl1=draw(U32), snd_wnd=1, max_window=2, rcv_wnd=draw(U32), rcv_wup=draw(U32)),
        negotiated=Negotiated(
            mss=draw(st.integers(1, 65535)),
            snd_wscale=scale and scale[0],
            rcv_wscale=scale and scale[1],
            sack=draw(st.booleans()),
            timestamps=stamped,
        ),
        buffers=Buffers(send=draw(SIZE), receive=draw(SIZE), send_locked=draw(st.booleans()), receive_locked=False),
        congestion=draw(st.sampled_from(["cubic", "bbr"])),
        timestamps=Timestamps(value=draw(U32), microseconds=draw(st.booleans())) if stamped else None,
        options=draw(st.dictionaries(st.sampled_from(["tcp.nodelay", "so.linger"]), st.tuples(st.integers(0, 9)))),
        option_data=draw(st.dictionaries(st.just("so.bindtodevice"), st.binary(max_size=9))),
        filter=draw(st.sampled_from([(), ((6, 0, 0, 0xFFFFFFFF),)])),
        soft=draw(st.none() | st.just(SoftState(cwnd=10, ssthresh=7, srtt=1, rttvar=2, rto=200000))),
    )


@given(records())
def test_wire_form_comes_back(record):
    assert ConnectionRecord.from_bytes(record.to_bytes()) == record


@given(st.binary(max_size=300))
def test_any_bytes_are_a_bad_record(data):
    with pytest.raises(BadRecord):
        ConnectionRecord.from_bytes(data)


@given(records(), st.data())
def test_a_flipped_byte_gives_a_record_or_that_error(record, data):
    wire = bytearray(record.to_bytes())
    wire[data.draw(st.integers(0, len(wire) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(BadRecord):
        ConnectionRecord.from_bytes(bytes(wire))


@given(records(), st.data())
def test_a_truncated_record_is_bad(record, data):
    wire = record.to_bytes()
    with pytest.raises(BadRecord):
        ConnectionRecord.from_bytes(wire[: data.draw(st.integers(0, len(wire) - 1))])


@given(records())
def test_fields_of_later_writers_are_skipped(record):
    plain = codec.to_plain(record) | {"of_the_future": [1, 2]}
    assert ConnectionRecord.from_bytes(msgpack.packb(plain)) == record


def one(**change):
    base = ConnectionRecord(
        conn_id=ConnId.parse("tcp:10.0.0.5:1-10.0.0.9:2"),
        family=Family.IPV4,
        state=State.ESTABLISHED,
        snd_una=0xFFFFFFFE,
        snd_nxt=1,
        send_queue=b"abcdef",
        rcv_nxt=2,
        receive_queue=b"1234",
        windows=Windows(snd_wl1=0, snd_wnd=0, max_window=0, rcv_wnd=0, rcv_wup=0),
        negotiated=Negotiated(mss=1460, snd_wscale=None, rcv_wscale=None, sack=True, timestamps=False),
        buffers=Buffers(send=1, receive=1, send_locked=False, receive_locked=False),
        congestion="cubic",
    )
    return dataclasses.replace(base, **change)


def test_sequence_numbers_wrap():
    record = one()
    assert (record.sent, record.write_seq, record.copied_seq) == (3, 4, 0xFFFFFFFE)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"snd_nxt": 100},
        {"state": State.FIN_WAIT_1},
        {"local_fin": LocalFin.SENT},
        {"timestamps": Timestamps(value=1, microseconds=False)},
        {"family": Family.IPV6},
        {"congestion": "a name of sixteen!"},
        {"filter": ((1, 2, 300, 4),)},
        {"rcv_nxt": -1},
    ],
)
def test_contradictions_are_refused(change):
    with pytest.raises(ValueError):  # noqa: PT011 - any message
        one(**change)


@given(U32, st.booleans(), st.floats(-5, 1000))
def test_the_clock_only_goes_on(value, microseconds, seconds):
    value = value & ~1 | microseconds
    later = advance(Timestamps(value=value, microseconds=microseconds), seconds)
    passed = (later.value - value) & 0xFFFFFFFF
    exact = max(0.0, seconds) * (1e6 if microseconds else 1e3)
    assert exact <= passed <= exact + 3
    assert later.value & 1 == microseconds
