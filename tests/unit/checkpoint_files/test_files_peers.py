"""Stand-ins for other ends of connections: the record of one end, seen from the other side."""

from __future__ import annotations

import dataclasses

import pytest

from checkpoint.files.peers import alone, is_loopback, mirrored
from tcpstate.connid import ConnId
from tcpstate.record import (
    Buffers,
    ConnectionRecord,
    Family,
    LocalFin,
    Negotiated,
    State,
    Timestamps,
    Windows,
)

END = ConnectionRecord(
    conn_id=ConnId.parse("tcp:127.0.0.1:80-127.0.0.2:9999"),
    family=Family.IPV4,
    state=State.ESTABLISHED,
    snd_una=0xFFFFFFF0,
    snd_nxt=0xFFFFFFF8,
    send_queue=bytes(100),
    rcv_nxt=5000,
    receive_queue=b"unread",
    windows=Windows(snd_wl1=4990, snd_wnd=70000, max_window=80000, rcv_wnd=60000, rcv_wup=4900),
    negotiated=Negotiated(mss=65483, snd_wscale=7, rcv_wscale=9, sack=True, timestamps=True),
    buffers=Buffers(send=1 << 20, receive=1 << 20, send_locked=True, receive_locked=False),
    congestion="cubic",
    timestamps=Timestamps(value=77, microseconds=False),
)


@pytest.mark.parametrize(
    ("state", "fin", "becomes", "other"),
    [
        (State.ESTABLISHED, LocalFin.NONE, State.ESTABLISHED, State.ESTABLISHED),
        (State.FIN_WAIT_1, LocalFin.QUEUED, State.FIN_WAIT_2, State.CLOSE_WAIT),
        (State.CLOSE_WAIT, LocalFin.NONE, State.CLOSE_WAIT, State.FIN_WAIT_2),
        (State.CLOSING, LocalFin.SENT, State.LAST_ACK, State.FIN_WAIT_2),
        (State.LAST_ACK, LocalFin.SENT, State.LAST_ACK, State.FIN_WAIT_2),
    ],
)
def test_both_ends_agree(state: State, fin: LocalFin, becomes: State, other: State) -> None:
    end = alone(dataclasses.replace(END, state=state, local_fin=fin))
    assert (end.state, end.send_queue, end.receive_queue) == (becomes, b"", b"unread")
    stand_in = mirrored(end)
    assert stand_in.state is other
    assert stand_in.conn_id == ConnId.parse("tcp:127.0.0.2:9999-127.0.0.1:80")
    # what one has got the other has sent, and no more
    assert (stand_in.snd_una, stand_in.snd_nxt, stand_in.rcv_nxt) == (end.rcv_nxt, end.rcv_nxt, end.snd_una)
    assert stand_in.windows.snd_wnd == 4900 + 60000 - 5000
    assert (stand_in.negotiated.snd_wscale, stand_in.negotiated.rcv_wscale) == (9, 7)


def test_what_is_loopback() -> None:
    found = [a for a in ("127.0.0.1", "127.9.9.9", "::1", "10.0.0.1", "fe80::1%eth0") if is_loopback(a)]
    assert found == ["127.0.0.1", "127.9.9.9", "::1"]
