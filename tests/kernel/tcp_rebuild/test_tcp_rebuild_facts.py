"""What TCP.md says about export and rebuild, each on its own."""

import random
import socket
import struct
import time

import pytest

from tcpstate.discard import discard_connections
from tcpstate.errors import AddressInUse
from tcpstate.export import export_connections
from tcpstate.filters import read_filters
from tcpstate.freeze import enter_repair, quiet, thaw
from tcpstate.kernel import bpf, route
from tcpstate.kernel.sockets import IP, IPV6, SO, Ioctl, Level, ioctl_int
from tcpstate.kernel.tcp import TCP, RepairOption, RepairQueue, TcpState
from tcpstate.rebuild import rebuild_connections, release_connections
from tests.kernel.tcp_rebuild.moved import FAMILIES, V4, V6, Move, deaf, hearing, info
from tests.tscnet import SERVICE, Watcher, pair, receive, wait_until


def test_idle_connection_goes_on_both_ways(move):
    made = move.all()
    made.send(b"there")
    assert receive(move.client, 5) == b"there"
    move.client.send(b"and back")
    assert receive(made, 8) == b"and back"


def test_unread_data_is_kept(move):
    move.client.send(b"not read yet")
    wait_until(lambda: ioctl_int(move.served.fileno(), Ioctl.SIOCINQ) == 12)
    assert receive(move.all(), 12) == b"not read yet"


def test_sent_data_that_the_peer_never_got_needs_no_timeout(move):
    deaf(move.client)
    move.served.send(b"lost" * 1000)
    time.sleep(0.02)
    assert move.export().sent == 4000
    hearing(move.client)
    move.rebuild()
    begun = time.monotonic()
    move.release()
    assert receive(move.client, 4000) == b"lost" * 1000
    assert time.monotonic() - begun < 0.5, "it waited for a retransmission timer"


def test_sent_data_that_the_peer_has_is_not_given_twice(move):
    # the peer has all of it, its ACKs are lost: what goes out again are segments that it knows
    deaf(move.served)
    move.served.send(bytes(range(250)) * 30)
    time.sleep(0.02)
    hearing(move.served)
    assert move.export().sent == 7500
    made = (
        move.all_after_export() if hasattr(move, "all_after_export") else (move.rebuild(), move.release(), move.made)[2]
    )
    made.send(b"end")
    assert receive(move.client, 7503) == bytes(range(250)) * 30 + b"end"
    wait_until(lambda: ioctl_int(made.fileno(), Ioctl.SIOCOUTQ) == 0)


@pytest.mark.parametrize("size", [100_000, 6_000_000])
def test_more_sent_data_than_a_congestion_window_is_kept(move4, size):
    move4.served.setsockopt(Level.SOCKET, SO.SNDBUFFORCE, 8 << 20)
    move4.client.setsockopt(Level.SOCKET, SO.RCVBUFFORCE, 1 << 20)
    text = random.Random(size).randbytes(size)
    move4.served.setblocking(False)
    assert move4.served.send(text) == size
    time.sleep(0.1)
    made = move4.all()
    assert receive(move4.client, size) == text
    assert made.getsockopt(Level.SOCKET, SO.SNDBUF) >= 16 << 20


def test_megabytes_in_both_queues_are_kept(move):
    random_bytes = random.Random(9).randbytes(5_000_000)
    for sock in (move.served, move.client):
        sock.setsockopt(Level.SOCKET, SO.SNDBUFFORCE, 8 << 20)
        sock.setsockopt(Level.SOCKET, SO.RCVBUFFORCE, 8 << 20)
        sock.setblocking(False)
    sent = [move.client.send(random_bytes), move.served.send(random_bytes)]
    time.sleep(0.3)
    made = move.all()
    made.settimeout(8)
    move.client.settimeout(8)
    assert receive(made, sent[0]) == random_bytes[: sent[0]]
    assert receive(move.client, sent[1]) == random_bytes[: sent[1]]


def test_unsent_data_behind_a_closed_window_is_kept(move):
    move.client.setsockopt(Level.SOCKET, SO.RCVBUFFORCE, 4096)
    move.served.setblocking(False)
    text = random.Random(5).randbytes(60_000)
    total = move.served.send(text)
    time.sleep(0.1)
    record = move.export()
    assert len(record.send_queue) > record.sent
    move.rebuild()
    move.release()
    assert receive(move.client, total) == text[:total]


def test_segments_are_as_large_as_before(move):
    before = info(move.served).snd_mss
    made = move.all()
    assert info(made).snd_mss == before
    with Watcher(move.hosts.c) as watcher:
        made.send(bytes(5 * before))
        receive(move.client, 5 * before)
    sizes = [len(s.payload) for out, s in watcher.seen if not out and s.payload]
    assert max(sizes) >= before


def test_without_the_resync_segments_stay_tiny(hosts):
    """The trap itself: if this fails, the kernel needs the call no more."""
    with hosts.b, socket.socket(V4, socket.SOCK_STREAM) as sock:
        enter_repair([sock])
        sock.setsockopt(Level.IP, IP.TRANSPARENT, 1)
        sock.bind((SERVICE[V4], 7999))
        sock.connect((hosts.c.own(V4), 7999))
        assert info(sock).snd_mss <= 536
        sock.setsockopt(Level.TCP, TCP.REPAIR_OPTIONS, struct.pack("II", RepairOption.MSS, 1460))
        assert info(sock).snd_mss <= 536


def test_buffers_do_not_grow_and_tuning_comes_back(move4):
    before = [move4.served.getsockopt(Level.SOCKET, o) for o in (SO.SNDBUF, SO.RCVBUF, SO.BUF_LOCK)]
    made = move4.all()
    assert [made.getsockopt(Level.SOCKET, o) for o in (SO.SNDBUF, SO.RCVBUF, SO.BUF_LOCK)] == before


def test_fixed_buffers_stay_fixed(move4):
    move4.served.setsockopt(Level.SOCKET, SO.SNDBUF, 50_000)
    made = move4.all()
    assert made.getsockopt(Level.SOCKET, SO.SNDBUF) == 100_000
    assert made.getsockopt(Level.SOCKET, SO.BUF_LOCK) == 1


def test_reuseaddr_and_transparent_are_as_before(move4):
    move4.served.setsockopt(Level.SOCKET, SO.REUSEADDR, 1)
    made = move4.all()
    assert made.getsockopt(Level.SOCKET, SO.REUSEADDR) == 1
    assert made.getsockopt(Level.IP, IP.TRANSPARENT) == 0
    assert made.getsockopt(Level.SOCKET, SO.MARK) == 0
    assert made.getsockopt(Level.TCP, TCP.USER_TIMEOUT) == 0


def test_a_listener_beside_it_can_be_bound_again(move4):
    move4.served.setsockopt(Level.SOCKET, SO.REUSEADDR, 1)
    move4.all()
    with move4.hosts.b.socket(V4, socket.SOCK_STREAM) as listener:
        listener.setsockopt(Level.SOCKET, SO.REUSEADDR, 1)
        listener.bind((SERVICE[V4], 7000))
        listener.listen(1)


OPTIONS_SET = [
    (Level.TCP, TCP.NODELAY, 1), (Level.TCP, TCP.KEEPIDLE, 77), (Level.TCP, TCP.KEEPINTVL, 7),
    (Level.TCP, TCP.KEEPCNT, 3),
    (Level.TCP, TCP.USER_TIMEOUT, 12345), (Level.TCP, TCP.NOTSENT_LOWAT, 16384), (Level.TCP, TCP.SYNCNT, 4),
    (Level.TCP, TCP.LINGER2, 9), (Level.TCP, TCP.THIN_LINEAR_TIMEOUTS, 1), (Level.TCP, TCP.INQ, 1),
    (Level.SOCKET, SO.KEEPALIVE, 1), (Level.SOCKET, SO.MARK, 99), (Level.SOCKET, SO.PRIORITY, 5),
    (Level.SOCKET, SO.OOBINLINE, 1), (Level.SOCKET, SO.RCVLOWAT, 2), (Level.SOCKET, SO.TIMESTAMPNS_NEW, 1),
    (Level.SOCKET, SO.BUSY_POLL, 50), (Level.SOCKET, SO.ZEROCOPY, 1), (Level.SOCKET, SO.PEEK_OFF, 0),
    (Level.IP, IP.TOS, 0x10), (Level.IP, IP.TTL, 33), (Level.IP, IP.MTU_DISCOVER, 1), (Level.IP, IP.RECVTOS, 1),
    (Level.IP, IP.RECVERR, 1), (Level.IP, IP.MINTTL, 3), (Level.IP, IP.BIND_ADDRESS_NO_PORT, 1),
]  # fmt: skip


def test_socket_options_are_kept(move4):
    for level, option, value in OPTIONS_SET:
        move4.served.setsockopt(level, option, value)
    move4.served.setsockopt(Level.TCP, TCP.CONGESTION, b"reno")
    before = [move4.served.getsockopt(level, option) for level, option, _ in OPTIONS_SET]
    made = move4.all()
    assert [made.getsockopt(level, option) for level, option, _ in OPTIONS_SET] == before
    assert made.getsockopt(Level.TCP, TCP.CONGESTION, 16).rstrip(b"\0") == b"reno"


def test_socket_options_of_ipv6_are_kept(hosts):
    move = Move(hosts, "IPv6")
    wanted = [
        (IPV6.TCLASS, 0x20), (IPV6.UNICAST_HOPS, 44), (IPV6.RECVTCLASS, 1), (IPV6.DONTFRAG, 1), (IPV6.MINHOPCOUNT, 5),
        (IPV6.AUTOFLOWLABEL, 0), (IPV6.RECVERR, 1),
    ]  # fmt: skip
    for option, value in wanted:
        move.served.setsockopt(Level.IPV6, option, value)
    made = move.all()
    assert [made.getsockopt(Level.IPV6, option) for option, _ in wanted] == [value for _, value in wanted]
    move.end()


def test_the_filter_is_kept_and_its_lock(move4):
    own = ((6, 0, 0, 0xFFFFFFFF),)
    bpf.attach(move4.served, own)
    made = move4.all()
    assert read_filters([made]) == [own]


def test_timestamps_go_on(move4):
    before = move4.export().timestamps.value
    time.sleep(0.2)
    made = move4.rebuild()
    now = made.getsockopt(Level.TCP, TCP.TIMESTAMP) & 0xFFFFFFFF
    assert 200 <= (now - before) & 0xFFFFFFFF < 1000
    move4.release()


def test_given_sockets_become_the_connections(move):
    move.export()
    mapped = FAMILIES["mapped"] == (move.family, move.served.family == V6)
    fresh = move.hosts.b.socket(V6 if mapped else move.family, socket.SOCK_STREAM)
    descriptor = fresh.fileno()
    assert move.rebuild(socks=[fresh]).fileno() == descriptor
    move.release()
    move.made.send(b"same")
    assert receive(move.client, 4) == b"same"


def test_the_same_tuple_twice_is_refused_by_name(move4):
    move4.export()
    move4.rebuild()
    with move4.hosts.b, pytest.raises(AddressInUse) as caught:
        rebuild_connections([move4.record])
    assert caught.value.object == str(move4.record.conn_id)
    move4.release()


def test_a_rebuilt_connection_is_silent_until_released(move4):
    deaf(move4.client)
    move4.served.setblocking(False)
    move4.served.send(random.Random(1).randbytes(200_000))
    time.sleep(0.05)
    with Watcher(move4.hosts.b) as watcher:
        assert move4.export().sent > 14_480, "it must be queued as sent"
        move4.rebuild()
        time.sleep(1.5)
        assert watcher.sent() == []
    assert info(move4.made).state == TcpState.ESTABLISHED
    hearing(move4.client)
    move4.release()


def test_a_peer_that_resets_during_the_release_does_not_stop_the_others(hosts):
    """The reset comes in between the filter and the data: one connection ends as it would have, the other lives."""
    moves = [Move(hosts, "IPv4"), Move(hosts, "IPv6")]
    doomed, lucky = moves
    for move in moves:
        deaf(move.client)
        move.served.send(b"unacknowledged")
        time.sleep(0.02)
        move.export()
        move.rebuild()
        hearing(move.client)
        hosts.a.remove(move.family)
        hosts.b.add(move.family)
        move.here = hosts.b
        with hosts.b:
            wait_until(lambda move=move: route.is_local(SERVICE[move.family]))
    # in repair, filter gone: what the release itself does first
    doomed.made.setsockopt(Level.SOCKET, SO.DETACH_FILTER, 0)
    doomed.client.setsockopt(Level.SOCKET, SO.LINGER, struct.pack("ii", 1, 0))
    doomed.client.close()
    wait_until(lambda: info(doomed.made).state == TcpState.CLOSE)
    with hosts.b:
        release_connections([m.made for m in moves], [m.record for m in moves])
    lucky.client.settimeout(5)
    assert receive(lucky.client, 14) == b"unacknowledged"
    with pytest.raises(ConnectionResetError):
        doomed.made.recv(1)
    for move in moves:
        discard_connections([move.served])
        move.end()


def test_discard_is_silent_for_every_holder(hosts):
    served, client = pair(hosts.a, hosts.c, service=False, port=0)
    other = served.dup()
    with hosts.a:
        quiet([served])
        with Watcher(hosts.a) as watcher:
            discard_connections([served])
            time.sleep(0.1)
            assert watcher.sent() == []
    assert info(other).state == TcpState.CLOSE
    other.close()
    client.setsockopt(Level.TCP, TCP.REPAIR, 1)
    client.close()


def test_peeking_is_not_led_astray_by_peek_off(hosts):
    served, client = pair(hosts.a, hosts.c, service=False, port=0)
    client.send(b"abcdef")
    time.sleep(0.05)
    served.setsockopt(Level.SOCKET, SO.PEEK_OFF, 2)
    with hosts.a:
        states = quiet([served])
        (record,) = export_connections([served], states)
        thaw([served], states)
    assert record.receive_queue == b"abcdef"
    assert record.options["so.peek_off"] == (2,)
    assert served.getsockopt(Level.SOCKET, SO.PEEK_OFF) == 2
    served.close()
    client.close()


def test_thaw_after_an_export_goes_on_in_place(hosts):
    served, client = pair(hosts.a, hosts.c, service=False, port=0)
    client.send(b"in")
    served.send(b"out")
    time.sleep(0.05)
    with hosts.a:
        for _ in range(5):
            states = quiet([served])
            export_connections([served], states)
            thaw([served], states)
    served.settimeout(2)
    client.settimeout(2)
    assert (receive(served, 2), receive(client, 3)) == (b"in", b"out")
    served.close()
    client.close()


def test_queue_ends_count_the_fin(hosts):
    served, client = pair(hosts.a, hosts.c, service=False, port=0)
    with hosts.a:
        served.setsockopt(Level.TCP, TCP.REPAIR, 1)
        served.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.SEND)
        before = served.getsockopt(Level.TCP, TCP.QUEUE_SEQ)
        served.setsockopt(Level.TCP, TCP.REPAIR, -1)
        served.shutdown(socket.SHUT_WR)
        served.setsockopt(Level.TCP, TCP.REPAIR, 1)
        served.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.SEND)
        assert (served.getsockopt(Level.TCP, TCP.QUEUE_SEQ) - before) & 0xFFFFFFFF == 1
    served.close()
    client.close()
