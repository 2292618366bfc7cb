"""The registry of keywords: complete, consistent, and what the reference says."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from tcpstate import options
from tcpstate.connid import ConnId
from tcpstate.errors import BadStateItem
from tcpstate.kernel.bpf import tcpsock
from tcpstate.kernel.sockets import Level
from tcpstate.kernel.tcpinfo import field_names, unpack_fields
from tcpstate.keywords import KEYWORDS, TABLE, Change, Kind, Life
from tcpstate.record import Buffers, ConnectionRecord, Family, Negotiated, SoftState, State, Timestamps, Windows
from tcpstate.stateitem import Datatype, StateFlag, check_value
from tcpstate.stateread import field_of
from tcpstate.statewrite import edit_of

ROOT = Path(__file__).resolve().parents[3]

RECORD = ConnectionRecord(
    conn_id=ConnId.parse("tcp:10.0.0.1:1-10.0.0.2:2"),
    family=Family.IPV4,
    state=State.ESTABLISHED,
    snd_una=1000,
    snd_nxt=1010,
    send_queue=bytes(20),
    rcv_nxt=5000,
    receive_queue=b"unread",
    windows=Windows(snd_wl1=4999, snd_wnd=65535, max_window=65535, rcv_wnd=65535, rcv_wup=4990),
    negotiated=Negotiated(mss=1460, snd_wscale=7, rcv_wscale=7, sack=True, timestamps=True),
    buffers=Buffers(send=1 << 16, receive=1 << 17, send_locked=False, receive_locked=True),
    congestion="cubic",
    timestamps=Timestamps(value=77, microseconds=False),
    soft=SoftState(cwnd=10, ssthresh=0x7FFFFFFF, srtt=1, rttvar=2, rto=3),
)


def test_each_keyword_stands_there_once() -> None:
    assert len(KEYWORDS) == len(TABLE) >= 60


def test_every_source_has_what_it_is_asked_for() -> None:
    names = {kind: {k.source(kind) for k in TABLE} - {None} for kind in Kind}
    assert names[Kind.INFO] <= field_names()
    # all that TCP_INFO tells is a keyword, or (this one) another name of an option
    assert field_names() - names[Kind.INFO] == {"max_pacing_rate"}
    assert names[Kind.ITERATOR] <= {field.name for field in tcpsock.FIELDS}
    assert all(field_of(RECORD, path or "") is not None for path in names[Kind.REPAIR] - {"urgent_in", "urgent_out"})
    assert {o.keyword for o in options.TABLE} <= set(KEYWORDS)


@pytest.mark.parametrize("keyword", TABLE, ids=lambda k: k.name)
def test_a_line_is_consistent(keyword) -> None:
    assert keyword.sources
    assert keyword.meaning
    assert bool(keyword.flags & StateFlag.HARD) != bool(keyword.flags & StateFlag.SOFT)
    lives = StateFlag.FIXED | StateFlag.VARYING | StateFlag.INITIALIZATION
    assert (keyword.flags & lives) in (StateFlag.FIXED, StateFlag.VARYING, StateFlag.INITIALIZATION)
    assert not (keyword.life is Life.FIXED and keyword.change is not Change.NONE), "what is fixed cannot be set"
    if keyword.change is Change.REPAIR:
        assert keyword.source(Kind.REPAIR), "it could not be written into a record"


def test_the_reference_is_up_to_date() -> None:
    script = [sys.executable, str(ROOT / "scripts/keywords_reference.py")]
    page = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs/reference/keywords.md").read_text(encoding="utf-8") == page, "run `make docs`"


def test_every_field_of_a_record_is_a_keyword() -> None:
    """Or the paths of keywords lead into it."""
    roots = {(k.source(Kind.REPAIR) or "").split(".")[0] for k in TABLE}
    elsewhere = {
        "conn_id", "family", "scope", "flow_info",  # the name
        "options", "option_data",  # keywords of their own
        "filter", "filter_locked",  # the freeze gives them back
        "soft",  # keywords of their own, from TCP_INFO
        "signing_keys",  # secret
        "error", "version", "required",
    }  # fmt: skip
    assert {f.name for f in dataclasses.fields(ConnectionRecord)} - elsewhere <= roots


@pytest.mark.parametrize(
    ("datatype", "good", "bad"),
    [
        (Datatype.BOOL, [0, 1, True], [2, -1, "1", None]),
        (Datatype.U8, [0, 255], [256, -1, 1.0]),
        (Datatype.U16, [0, 65535], [65536]),
        (Datatype.SEQUENCE, [0, 2**32 - 1], [2**32, -1, True]),
        (Datatype.U64, [2**64 - 1], [2**64]),
        (Datatype.INT, [-(2**31), 2**31 - 1], [2**31, b"1"]),
        (Datatype.TEXT, ["", "cubic"], [b"cubic", 1]),
        (Datatype.BYTES, [b""], ["", 1, bytearray(b"x")]),
        (Datatype.NUMBERS, [(), (1, 2)], [[1, 2], (1, "2"), 1, (True,)]),
    ],
)
def test_values_are_of_their_type(datatype, good, bad) -> None:
    for value in good:
        check_value("k", datatype, value)
    for value in bad:
        with pytest.raises(BadStateItem) as caught:
            check_value("k", datatype, value)
        assert caught.value.object == "k"


def test_numbers_that_belong_together_keep_their_distance() -> None:
    made = edit_of({"snd_una": 0xFFFFFFFF, "rcv_nxt": 3})(RECORD)
    assert (made.snd_una, made.snd_nxt) == (0xFFFFFFFF, 9)
    assert (made.rcv_nxt, made.windows.rcv_wup, made.windows.snd_wl1) == (3, (3 - 10) & 0xFFFFFFFF, 2)
    made = edit_of({"snd_una": 5, "snd_nxt": 5, "rcv_nxt": 9, "rcv_wup": 9})(RECORD)
    assert (made.snd_nxt, made.windows.rcv_wup) == (5, 9)


def test_a_record_is_edited_by_keyword() -> None:
    values = {
        "snd_wnd": 1 << 20, "mss": 500, "timestamps": 0, "sack": 0, "congestion": "reno", "send_queue": b"x" * 30,
        "tcp.nodelay": 1, "so.linger": (1, 2), "ip.options": b"\1\1\1\1", "buffer_locks": 1, "send_buffer": 5000,
        "so.reuseaddr": 1, "state": "FIN_WAIT_1",
    }  # fmt: skip
    made = edit_of(values)(RECORD)
    assert (made.windows.snd_wnd, made.windows.max_window) == (1 << 20, 1 << 20)
    assert (made.negotiated.mss, made.negotiated.sack, made.timestamps) == (500, False, None)
    assert (made.congestion, made.send_queue, made.reuse_address) == ("reno", b"x" * 30, True)
    assert made.options == {"tcp.nodelay": (1,), "so.linger": (1, 2)}
    assert made.option_data == {"ip.options": b"\1\1\1\1"}
    assert (made.buffers.send, made.buffers.send_locked, made.buffers.receive_locked) == (5000, True, False)
    assert made.local_fin.value == "sent"


@pytest.mark.parametrize(
    "values",
    [
        {"max_window": 10},
        {"send_queue": b""},
        {"state": "NO_SUCH_STATE"},
        {"mss": 0},
        {"snd_wscale": 15},
        {"timestamps": 0, "timestamp": 5},
    ],
)
def test_what_contradicts_itself_is_refused(values) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the caller names the items
        edit_of(values)(RECORD)


def test_tcp_info_of_an_old_kernel_has_fewer_fields() -> None:
    assert set(unpack_fields(bytes(280))) == field_names()
    assert "rcv_wnd" not in unpack_fields(bytes(232))
    with pytest.raises(ValueError, match="5 bytes"):
        unpack_fields(bytes(5))


#: what an established socket gives out and takes back, found by trying all numbers on Linux 6.18 (design/TCP.md 2)
RESTORABLE = {
    Level.SOCKET: "1 2 5-15 18 20 21 25 26 29 35-37 40-47 49 60-67 69 72 74 75 82",
    Level.IP: "1 2 4 6-8 10-13 15 18-21 23 24 26 34 49-51",
    Level.IPV6: "2-5 8 11 16 19 23 25 26 29-31 33 49 51 53 56 58 60 62 66 67 70 72-78",
    Level.TCP: "1 3-10 12 13 16-18 25 27 36 37 44-46",
}


@pytest.mark.parametrize("level", RESTORABLE, ids=lambda level: level.name)
def test_every_option_that_can_be_kept_is_kept_or_excluded_with_a_reason(level) -> None:
    numbers: set[int] = set()
    for part in RESTORABLE[level].split():
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    kept = {int(o.number) for o in options.TABLE if o.level is level}
    reasons = {int(number): why for (of, number), why in options.EXCLUDED.items() if of is level}
    assert numbers <= kept | set(reasons)
    assert not kept & set(reasons)
    assert all(why.strip() for why in reasons.values())
