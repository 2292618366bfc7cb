"""What TCP.md says about urgent data in export and rebuild."""

import random
import socket
import time

import pytest

from tcpstate.attach import conn_id_of
from tcpstate.export import export_connections
from tcpstate.freeze import quiet, thaw
from tcpstate.kernel.bpf import tcpsock
from tcpstate.kernel.sockets import SO, Ioctl, Level, ioctl_int
from tcpstate.kernel.tcp import INFO_SIZE, TCP, RepairQueue, TcpInfo
from tests.kernel.tcp_rebuild.moved import attempt, deaf, hearing, info
from tests.tscnet import pair, receive, wait_until


def send_urgent(served, client, before, after):
    """The client sends an urgent byte between other bytes; all has arrived when it returns."""
    have = TcpInfo.unpack(served.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE)).bytes_received
    for data, flags in ((before, 0), (b"U", socket.MSG_OOB), (after, 0)):
        if data:
            client.send(data, flags)
    end = have + len(before) + 1 + len(after)
    wait_until(lambda: info(served).bytes_received == end)


def seen(sock, *, urgent_first):
    """What an application sees, step by step: the mark, the byte out of band, the bytes before and behind."""
    sock.setblocking(False)
    steps = []
    if urgent_first:
        steps.append(attempt(lambda: sock.recv(1, socket.MSG_OOB)))
    for _ in range(3):
        steps.append((ioctl_int(sock.fileno(), Ioctl.SIOCATMARK), ioctl_int(sock.fileno(), Ioctl.SIOCINQ)))
        steps.append(attempt(lambda: sock.recv(1, socket.MSG_OOB | socket.MSG_PEEK)))
        steps.append(attempt(lambda: sock.recv(100)))
    return steps


@pytest.mark.parametrize("taken", [False, True], ids=["unread", "taken"])
@pytest.mark.parametrize("inline", [0, 1], ids=["out-of-band", "inline"])
@pytest.mark.parametrize(("before", "after"), [(b"abc", b"def"), (b"", b"def"), (b"abc", b""), (b"", b"")])
def test_urgent_data_is_kept_on_both_sides_of_the_mark(hosts, move, before, after, inline, taken):
    control, peer = pair(hosts.a, hosts.c, service=False, port=0)
    for sock, client in ((move.served, move.client), (control, peer)):
        client.send(b"read before")
        assert receive(sock, 11) == b"read before"
        send_urgent(sock, client, before, after)
        if taken:
            assert sock.recv(1, socket.MSG_OOB) == b"U"
        sock.setsockopt(Level.SOCKET, SO.OOBINLINE, inline)
    record = move.export()
    assert record.receive_queue == before + b"U" + after
    assert (record.urgent_in, record.urgent_taken) == (len(before), taken)
    assert move.served.getsockopt(Level.SOCKET, SO.OOBINLINE) == inline
    move.rebuild()
    move.release()
    assert seen(move.made, urgent_first=False) == seen(control, urgent_first=False)
    move.made.setblocking(True)
    move.client.send(b"and on")
    assert receive(move.made, 6) == b"and on"
    control.close()
    peer.close()


def test_a_thaw_gives_urgent_data_back(hosts):
    served, client = pair(hosts.a, hosts.c, service=False, port=0)
    send_urgent(served, client, b"abc", b"def")
    with hosts.a:
        states = quiet([served])
        export_connections([served], states)
        thaw([served], states)
    assert served.getsockopt(Level.SOCKET, SO.OOBINLINE) == 0
    assert served.recv(1, socket.MSG_OOB) == b"U"
    assert [served.recv(100), served.recv(100)] == [b"abc", b"def"]
    served.close()
    client.close()


@pytest.mark.parametrize("size", [3, 100_000], ids=["sent again", "queued as sent"])
def test_our_own_urgent_byte_stays_urgent(move, size):
    """It was sent, and the peer never got it; snd_up tells where it is."""
    move.served.setsockopt(Level.SOCKET, SO.SNDBUFFORCE, 1 << 20)
    move.client.setsockopt(Level.SOCKET, SO.RCVBUFFORCE, 1 << 20)
    deaf(move.client)
    text = random.Random(size).randbytes(size)
    move.served.setblocking(False)
    assert move.served.send(text) == size
    move.served.send(b"U", socket.MSG_OOB)
    move.served.send(b"def")
    time.sleep(0.02)
    with move.hosts.a:
        move.export()
    assert move.record.urgent_out == size + 1
    hearing(move.client)
    move.rebuild()
    move.release()
    wait_until(lambda: info(move.client).bytes_received >= size + 4, 8)
    assert move.client.recv(1, socket.MSG_OOB) == b"U"
    assert receive(move.client, size + 3) == text + b"def"


def test_a_peek_from_the_mark_goes_past_it(hosts):
    """And one that begins before it stops there. SIOCINQ does, too, unless SO_OOBINLINE is set."""
    served, client = pair(hosts.a, hosts.c, service=False, port=0)
    send_urgent(served, client, b"abc", b"def")
    assert ioctl_int(served.fileno(), Ioctl.SIOCINQ) == 3
    served.setsockopt(Level.SOCKET, SO.OOBINLINE, 1)
    assert ioctl_int(served.fileno(), Ioctl.SIOCINQ) == 7
    assert served.recv(100, socket.MSG_PEEK) == b"abc"
    served.setsockopt(Level.SOCKET, SO.PEEK_OFF, 3)
    assert served.recv(100, socket.MSG_PEEK) == b"Udef"
    served.close()
    client.close()


def test_msg_oob_in_repair_moves_the_urgent_pointer(hosts):
    served, client = pair(hosts.a, hosts.c, service=False, port=0)
    with hosts.a:
        name = conn_id_of(served)
        # its timer may send the bytes before they are looked at, and an ACK would move snd_una
        deaf(served)
        served.setsockopt(Level.TCP, TCP.REPAIR, 1)
        served.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.SEND)
        served.send(b"abc")
        served.send(b"U", socket.MSG_OOB)
        served.send(b"def")
        told = tcpsock.read({"snd_up", "snd_una", "snd_nxt"}, wanted=name.__eq__)[name].values
        served.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    assert (told["snd_up"] - told["snd_una"]) & 0xFFFFFFFF == 4
    assert (told["snd_nxt"] - told["snd_una"]) & 0xFFFFFFFF == 7
    served.close()
    client.setsockopt(Level.TCP, TCP.REPAIR, 1)
    client.close()
