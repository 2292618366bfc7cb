"""Out-of-order data read from kernel memory: only when asked for, and exactly what the peer sent."""

import contextlib
import random
import select
import socket
import threading

import pytest

from tcpstate.capture import Injector
from tcpstate.connid import ConnId
from tcpstate.errors import KernelReadRefused
from tcpstate.freeze import quiet, thaw
from tcpstate.kernel.bpf import tcpsock
from tcpstate.kernel.bpf.memory import KernelMemory
from tcpstate.outoforder import Piece, read
from tcpstate.segment import Flag, Segment, timestamp_option
from tcpstate.silence import Blackhole
from tests.tscnet import net, pair, wait_until

V4, V6 = socket.AF_INET, socket.AF_INET6
BYTES = random.Random(9).randbytes(12 << 20)


@pytest.fixture(scope="module")
def hosts():
    with net() as made:
        with made.a:
            Blackhole().ensure()
        yield made


def conn_id(sock):
    return ConnId.tcp(*sock.getsockname()[:2], *sock.getpeername()[:2])


@pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
def test_pieces_behind_holes(hosts, family):
    served, client = pair(hosts.a, hosts.c, family, service=False, port=0)
    mine = conn_id(served)
    wanted = [(3000, 1400), (4400, 600), (7000, 1400), (9000, 10), (12000, 1440), (20000, 1000)]
    with hosts.a:
        assert read([mine], kernel_reads=True) == {mine: []}
        values = tcpsock.read()[mine].values
        with Injector() as injector:
            for start, length in random.Random(1).sample(wanted, len(wanted)):
                injector.send(
                    Segment(
                        source=mine.peer, source_port=mine.peer_port, destination=mine.local,
                        destination_port=mine.local_port, seq=(values["rcv_nxt"] + start) & 0xFFFFFFFF,
                        ack=values["snd_una"], flags=Flag.ACK, window=100,
                        options=timestamp_option(values["ts_recent"], 0), payload=BYTES[start : start + length],
                    )
                )  # fmt: skip
        states = quiet([served])
        wait_until(lambda: len(read([mine], kernel_reads=True)[mine]) == len(wanted))
        (found,) = read([mine], kernel_reads=True).values()
        thaw([served], states)
    assert found == [Piece(start, BYTES[start : start + length]) for start, length in wanted]
    client.close()
    served.close()


def test_packets_with_page_fragments(hosts):
    """A real sender that loses every tenth large packet, for as long as it takes until holes were seen."""
    served, client = pair(hosts.a, hosts.c, service=False, port=0)
    mine = conn_id(served)
    hosts.a.sh("nft add table inet holes")
    hosts.a.sh("nft add chain inet holes input '{ type filter hook input priority 0; }'")
    hosts.a.sh(f"nft add rule inet holes input tcp sport {mine.peer_port} numgen random mod 10 == 0 drop")
    sending = threading.Thread(target=send_all, args=(client,))
    sending.start()
    position, seen = 0, 0
    served.settimeout(10)
    with hosts.a:
        while seen < 3:
            position += len(served.recv(1 << 16))
            if not tcpsock.read(["out_of_order_queue"], wanted=lambda c: c == mine)[mine].values["out_of_order_queue"]:
                continue
            states = quiet([served])
            unread = len(served.recv(1 << 24, socket.MSG_PEEK | socket.MSG_DONTWAIT)) if readable(served) else 0
            (pieces,) = read([mine], kernel_reads=True).values()
            thaw([served], states)
            for piece in pieces:
                at = (position + unread + piece.offset) % len(BYTES)
                assert piece.data == (BYTES[at:] + BYTES)[: len(piece.data)]
            seen += bool(pieces)
    hosts.a.sh("nft delete table inet holes")
    served.close()
    sending.join()
    client.close()


def send_all(sock):
    with contextlib.suppress(OSError):  # it ends when the test has seen enough
        while True:
            sock.sendall(BYTES)


def readable(sock):
    return bool(select.select([sock], [], [], 0)[0])


def test_nothing_is_read_unasked(hosts):
    with pytest.raises(KernelReadRefused):
        read([])


def test_what_is_not_there_is_an_error():
    with KernelMemory() as memory, pytest.raises(OSError, match="cannot be read"):
        memory.read(0x10, 8)
