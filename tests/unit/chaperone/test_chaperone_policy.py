"""What a record may build, and how often one may ask."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from pathlib import Path

import pytest

from tcpstate.chaperone.client import DEFAULT_SOCKET
from tcpstate.chaperone.messages import Limits
from tcpstate.chaperone.policy import PRIVILEGED_OPTIONS, Host, Policy, RateLimit, checked_record
from tcpstate.chaperone.privilege import NEEDED
from tcpstate.connid import ConnId
from tcpstate.errors import ForbiddenEndpoint, ForbiddenState
from tcpstate.options import BY_KEYWORD
from tcpstate.record import Buffers, ConnectionRecord, Family, Negotiated, SoftState, State, Timestamps, Windows

USER = 1000
HOST = Host(first_port=1024, send=4 << 20, receive=6 << 20, congestion=frozenset({"reno", "cubic"}), default="cubic")
RECORD = ConnectionRecord(
    conn_id=ConnId.parse("tcp:10.0.0.1:8080-10.0.0.2:40000"),
    family=Family.IPV4,
    state=State.ESTABLISHED,
    snd_una=1,
    snd_nxt=1,
    send_queue=b"",
    rcv_nxt=1,
    receive_queue=b"",
    windows=Windows(snd_wl1=1, snd_wnd=65535 << 7, max_window=65535 << 7, rcv_wnd=65535, rcv_wup=1),
    negotiated=Negotiated(mss=1460, snd_wscale=7, rcv_wscale=7, sack=True, timestamps=True),
    buffers=Buffers(send=4 << 20, receive=6 << 20, send_locked=False, receive_locked=False),
    congestion="cubic",
    timestamps=Timestamps(value=2, microseconds=False),
    options={"tcp.nodelay": (1,), "so.priority": (6,)},
    soft=SoftState(cwnd=10, ssthresh=40, srtt=900_000, rttvar=500, rto=1_100_000),
)


def at(port: int) -> ConnectionRecord:
    return replace(RECORD, conn_id=replace(RECORD.conn_id, local_port=port))


def check(record: ConnectionRecord, uid: int = USER, local: bool = True, **policy: object) -> ConnectionRecord:
    return checked_record(record, uid, Policy(**policy), HOST, local=local)  # type: ignore[arg-type]


def test_what_harms_nobody_is_built_as_it_is() -> None:
    assert check(RECORD) == RECORD


def test_an_address_is_here_or_expected() -> None:
    expected = (ipaddress.ip_network("10.0.0.0/24"), ipaddress.ip_network("fd00::/64"))
    with pytest.raises(ForbiddenEndpoint):
        check(RECORD, local=False)
    assert check(RECORD, local=False, addresses=expected) == RECORD
    with pytest.raises(ForbiddenEndpoint):
        check(RECORD, local=False, addresses=(ipaddress.ip_network("10.0.1.0/24"),))
    with pytest.raises(ForbiddenEndpoint):
        # not even root builds what could never speak
        check(RECORD, uid=0, local=False)


def test_privileged_ports_are_roots_or_allowed() -> None:
    with pytest.raises(ForbiddenEndpoint):
        check(at(443))
    assert check(at(443), low_ports=frozenset({443})) == at(443)
    assert check(at(443), uid=0) == at(443)
    assert check(at(1024)) == at(1024)


@pytest.mark.parametrize("keyword", sorted(PRIVILEGED_OPTIONS))
def test_options_that_take_a_capability_are_roots(keyword: str) -> None:
    assert keyword in BY_KEYWORD
    for record in (replace(RECORD, options={keyword: (0,)}), replace(RECORD, option_data={keyword: b""})):
        with pytest.raises(ForbiddenState, match=keyword):
            check(record)
        assert check(record, uid=0) == record


@pytest.mark.parametrize(
    "odd",
    [
        replace(RECORD, options={"so.priority": (7,)}),
        replace(RECORD, options={"so.priority": (-1,)}),
        replace(RECORD, buffers=replace(RECORD.buffers, send=(4 << 20) + 1)),
        replace(RECORD, buffers=replace(RECORD.buffers, receive=(6 << 20) + 1)),
        replace(RECORD, windows=replace(RECORD.windows, snd_wnd=65536 << 7)),
        replace(RECORD, windows=replace(RECORD.windows, max_window=65536 << 7)),
        replace(RECORD, windows=replace(RECORD.windows, rcv_wnd=(65536 << 7) + 1)),
        replace(
            RECORD,
            negotiated=replace(RECORD.negotiated, snd_wscale=None, rcv_wscale=None),
            windows=replace(RECORD.windows, snd_wnd=65536),
        ),
    ],
)
def test_what_no_socket_of_a_user_has_is_roots(odd: ConnectionRecord) -> None:
    with pytest.raises(ForbiddenState):
        check(odd)
    assert check(odd, uid=0) == odd


def test_soft_state_that_could_harm_the_network_is_limited() -> None:
    wild = replace(RECORD, congestion="mine", soft=SoftState(cwnd=10**6, ssthresh=7, srtt=1, rttvar=1, rto=1))
    made = check(wild)
    assert made == replace(wild, congestion="cubic", soft=replace(wild.soft, cwnd=10, srtt=0, rttvar=0, rto=1_000_000))
    assert check(wild, uid=0) == wild
    assert check(replace(wild, soft=None)).soft is None
    slow = replace(RECORD, soft=replace(RECORD.soft, rto=2**32 - 1))
    assert check(slow).soft.rto == 120_000_000


def test_this_hosts_limits_can_be_read(tmp_path: Path) -> None:
    values = {
        "ipv4/ip_unprivileged_port_start": "80",
        "ipv4/tcp_wmem": "4096\t16384\t4194304",
        "ipv4/tcp_rmem": "4096\t131072\t6291456",
        "core/wmem_max": "4194304",
        "core/rmem_max": "212992",
        "ipv4/tcp_allowed_congestion_control": "reno cubic",
        "ipv4/tcp_congestion_control": "bbr",
    }
    for name, value in values.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(value + "\n")
    found = Host.read(tmp_path)
    assert found == Host(
        first_port=80, send=8388608, receive=6291456, congestion=frozenset({"reno", "cubic"}), default="bbr"
    )
    assert Host.read().first_port <= 65536


def test_a_user_may_ask_in_bursts_and_steadily_no_more() -> None:
    rate = RateLimit(Limits(rate=10.0, burst=5))
    assert [rate.take(USER, 0.0) for _ in range(7)] == [True] * 5 + [False] * 2
    assert rate.take(USER + 1, 0.0), "others have their own"
    assert [rate.take(USER, 0.25) for _ in range(3)] == [True, True, False]
    assert sum(rate.take(USER, 1 + i / 100) for i in range(1000)) == pytest.approx(5 + 100, abs=2)


def test_the_memory_of_who_asked_has_an_end() -> None:
    rate = RateLimit(Limits())
    for uid in range(2 * RateLimit.USERS):
        rate.take(uid, 0.0)
    assert len(rate._left) == RateLimit.USERS


def test_the_systemd_unit_grants_what_is_needed_and_no_more() -> None:
    unit = (Path(__file__).resolve().parents[3] / "packaging/systemd/tcpmig-chaperone.service").read_text()
    lines = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith("#"))
    needed = {f"CAP_{cap.name}" for cap in NEEDED}
    assert set(lines["CapabilityBoundingSet"].split()) == set(lines["AmbientCapabilities"].split()) == needed
    assert lines["NoNewPrivileges"] == "yes"
    assert f"/run/{lines['RuntimeDirectory']}/socket" == DEFAULT_SOCKET
