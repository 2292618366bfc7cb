"""The BPF iterator over TCP sockets tells what repair mode and TCP_INFO tell, of sockets that nobody froze."""

import socket
import struct

import pytest

from tcpstate.capture import Injector
from tcpstate.connid import ConnId
from tcpstate.export import export_connections
from tcpstate.freeze import quiet
from tcpstate.kernel.bpf import tcpsock
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import TCP, TcpInfo, TcpState
from tcpstate.segment import Flag, Segment, timestamp_option
from tests.tscnet import pair, silent_net, wait_until

V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.fixture(scope="module")
def hosts():
    with silent_net() as made:
        yield made


def conn_id(sock):
    local, peer = sock.getsockname(), sock.getpeername()
    return ConnId.tcp(local[0], local[1], peer[0], peer[1])


def test_the_kernel_lends_the_iterator():
    assert tcpsock.available() is None


@pytest.mark.parametrize(("family", "mapped"), [(V4, False), (V6, False), (V4, True)], ids=["IPv4", "IPv6", "mapped"])
def test_it_tells_what_an_export_tells(hosts, family, mapped):
    served, client = pair(hosts.a, hosts.c, family, service=False, port=0, mapped=mapped)
    client.sendall(b"x" * 5000)
    served.sendall(b"y" * 3000)
    wait_until(lambda: len(served.recv(5000, socket.MSG_PEEK)) == 5000)
    assert served.recv(1000) == b"x" * 1000
    wait_until(lambda: TcpInfo.unpack(served.getsockopt(Level.TCP, TCP.INFO, 280)).unacked == 0)
    with hosts.a:
        found = tcpsock.read()[conn_id(served)]
        (record,) = export_connections([served], quiet([served]))
    v = found.values
    assert (found.state, found.conn_id) == (TcpState.ESTABLISHED, record.conn_id)
    assert found.family == (V6 if mapped else family)
    assert (v["snd_una"], v["snd_nxt"], v["write_seq"]) == (record.snd_una, record.snd_nxt, record.write_seq)
    assert (v["rcv_nxt"], v["copied_seq"]) == (record.rcv_nxt, record.copied_seq)
    w, n, s = record.windows, record.negotiated, record.soft
    assert (v["snd_wl1"], v["snd_wnd"], v["max_window"]) == (w.snd_wl1, w.snd_wnd, w.max_window)
    assert (v["rcv_wnd"], v["rcv_wup"]) == (w.rcv_wnd, w.rcv_wup)
    assert (v["mss_clamp"], v["snd_wscale"], v["rcv_wscale"]) == (n.mss, n.snd_wscale, n.rcv_wscale)
    assert (bool(v["sack_ok"]), bool(v["tstamp_ok"]), v["wscale_ok"]) == (n.sack, n.timestamps, 1)
    assert (v["snd_cwnd"], v["snd_ssthresh"]) == (s.cwnd, s.ssthresh)
    assert (v["srtt_us"] >> 3, v["mdev_us"] >> 2, v["reordering"]) == (s.srtt, s.rttvar, s.reordering)
    assert v["out_of_order_queue"] == 0


def test_nothing_is_changed_by_reading(hosts):
    served, client = pair(hosts.a, hosts.c, service=False, port=0)
    with hosts.a:
        before = tcpsock.read()[conn_id(served)].values
        assert tcpsock.read()[conn_id(served)].values == before
    client.sendall(b"still alive")
    assert served.recv(100) == b"still alive"


def test_it_sees_one_network_namespace(hosts):
    served, client = pair(hosts.a, hosts.c, service=False, port=0)
    with hosts.a:
        assert set(tcpsock.read()) >= {conn_id(served)}
        assert conn_id(client) not in tcpsock.read()
    with hosts.c:
        assert conn_id(client) in tcpsock.read()


def test_listeners_are_left_out_and_names_and_connections_chosen(hosts):
    first, other = pair(hosts.a, hosts.c, service=False, port=0)
    second, another = pair(hosts.a, hosts.c, service=False, port=0)
    with hosts.a, hosts.a.socket(V4, socket.SOCK_STREAM) as listener:
        listener.listen(1)
        mine = conn_id(first)
        (found,) = tcpsock.read(["snd_cwnd"], wanted=lambda c: c == mine).values()
        assert set(found.values) == {"snd_cwnd"}
        assert all(i.state is not TcpState.LISTEN for i in tcpsock.read([]).values())
        cookie = struct.unpack("Q", second.getsockopt(Level.SOCKET, SO.COOKIE, 8))[0]
        mss, cwnd = tcpsock.read_by_cookie(["mss_cache", "snd_cwnd"])[cookie]
        assert (mss, cwnd) == (1448, 10)
        with pytest.raises(KeyError):
            tcpsock.read_by_cookie(["no such thing"])
    assert other.fileno() != another.fileno()


def test_a_hole_shows(hosts):
    served, client = pair(hosts.a, hosts.c, service=False, port=0)
    with hosts.a:
        before = tcpsock.read()[conn_id(served)].values
        assert before["out_of_order_queue"] == 0
        behind = Segment(
            source=client.getsockname()[0],
            source_port=client.getsockname()[1],
            destination=served.getsockname()[0],
            destination_port=served.getsockname()[1],
            seq=(before["rcv_nxt"] + 1000) & 0xFFFFFFFF,
            ack=before["snd_una"],
            flags=Flag.ACK,
            window=100,
            options=timestamp_option(before["ts_recent"], 0),
            payload=b"behind a hole",
        )
        with Injector() as injector:
            injector.send(behind)
        wait_until(lambda: tcpsock.read()[conn_id(served)].values["out_of_order_queue"])
    assert client.fileno() >= 0
