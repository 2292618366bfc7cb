"""The paper's interface (5.3 to 5.5): frozen connections, pending data, arrivals."""

from __future__ import annotations

import contextlib
import itertools
import random
import time

import pytest

from tcpstate.errors import (
    BadExtents,
    KernelFeatureMissing,
)
from tcpstate.kernel import bpf
from tcpstate.kernel.bpf import tcpsock
from tcpstate.kernel.sockets import SO, Ioctl, Level, ioctl_int
from tcpstate.silence import MARK, blackhole
from tcpstate.transport import (
    Extent,
    Progress,
    transport_arrivals,
    transport_buffer_purge,
    transport_freeze,
    transport_progress,
    transport_read_pending,
    transport_restore_pending,
    transport_resume,
)
from tests.system.transport.ends import talk, unread, values
from tests.tscnet import receive, wait_until


def test_what_arrives_while_frozen_needs_no_retransmission(ends):
    served, client = ends
    transport_freeze(served)
    text = random.Random(1).randbytes(10_000)
    client.sendall(text)
    time.sleep(0.05)
    assert transport_progress(served) is Progress.FROZEN
    assert ioctl_int(served.fileno(), Ioctl.SIOCINQ) == 0
    transport_resume(served)
    # it is there when the resume returns, without the peer's help
    assert ioctl_int(served.fileno(), Ioctl.SIOCINQ) == len(text)
    assert receive(served, len(text)) == text
    talk(served, client)


@pytest.mark.parametrize("with_bpf", [True, False], ids=["BPF", "no BPF"])
@pytest.mark.parametrize("when", ["before", "while frozen"])
def test_what_could_not_leave_goes_out_at_once(ends, when, with_bpf, monkeypatch):
    """The timeout has doubled four times, to more than three seconds, and the last try was just now."""
    if not with_bpf:

        def refuse():
            raise KernelFeatureMissing("no BPF iterator over TCP sockets: not today", object="BPF")

        monkeypatch.setattr(tcpsock, "_reader", refuse)
    served, client = ends
    if when == "before":
        bpf.attach(client, bpf.DROP_ALL)
        served.send(b"into the silence")
    transport_freeze(served)
    if when != "before":
        served.send(b"into the silence")
    else:
        client.setsockopt(Level.SOCKET, SO.DETACH_FILTER, 0)
    wait_until(lambda: values(served, ["backoff"])["backoff"] >= 4, 15)
    transport_resume(served)
    begun = time.monotonic()
    assert receive(client, 16) == b"into the silence"
    assert time.monotonic() - begun < 2, "it waited for its timeout"
    assert served.getsockopt(Level.SOCKET, SO.ERROR) == 0
    talk(served, client)


def test_it_quiesces_while_packets_wait_in_the_host(hosts, ends4):
    served, _ = ends4
    assert transport_progress(served) is Progress.IN_PROGRESS
    hosts.a.sh("tc qdisc add dev eth0 root tbf rate 64kbit burst 1600 latency 60s")
    try:
        served.send(bytes(20_000))
        wait_until(lambda: values(served, ["memory_in_host"])["memory_in_host"] > 0)
        transport_freeze(served)
        assert transport_progress(served) is Progress.QUIESCING
    finally:
        hosts.a.sh("tc qdisc del dev eth0 root")
    # the queue went with its packets
    wait_until(lambda: transport_progress(served) is Progress.FROZEN)


def test_pending_data_is_read_with_its_holes(hosts, ends):
    served, client = ends
    client.send(b"in order")
    unread(served, 8)
    transport_freeze(served)
    assert transport_read_pending(served) == [Extent(0, b"in order")]
    # the next segment is lost on its way, the one behind it is not
    with hosts.c, blackhole():
        client.setsockopt(Level.SOCKET, SO.MARK, MARK)
        client.send(b"lost")
        client.setsockopt(Level.SOCKET, SO.MARK, 0)
        client.send(b"found")
    wait_until(lambda: len(transport_read_pending(served)) == 2)
    extents = transport_read_pending(served)
    assert extents[0] == Extent(0, b"in order")
    assert extents[1] in (Extent(12, b"found"), Extent(8, b"lostfound"))
    transport_resume(served)
    assert receive(served, 17) == b"in orderlostfound"
    talk(served, client)


def test_pending_data_is_restored_with_its_holes(ends):
    served, client = ends
    client.send(b"read already, and put back: ")
    assert receive(served, 28) == b"read already, and put back: "
    client.send(b"unread")
    unread(served, 6)
    transport_freeze(served)
    transport_restore_pending(served, [Extent(0, b"read already, and put back: "), Extent(38, b"the third")])
    assert transport_read_pending(served) == [
        Extent(0, b"read already, and put back: unread"), Extent(38, b"the third")
    ]  # fmt: skip
    for wrong in (
        [Extent(-1, b"x")],
        [Extent(0, b"xx"), Extent(1, b"x")],
        [Extent(3, b"within what is unread")],
        [Extent(1 << 30, b"beyond the window")],
    ):
        with pytest.raises(BadExtents):
            transport_restore_pending(served, wrong)
    transport_resume(served)
    client.send(b"2nd ")
    client.send(b"the third")
    assert receive(served, 47) == b"read already, and put back: unread2nd the third"
    talk(served, client)


def test_a_purge_keeps_what_the_peer_may_lack(hosts, ends):
    served, client = ends
    client.setsockopt(Level.SOCKET, SO.RCVBUF, 4096)
    client.send(b"never read")
    unread(served, 10)
    served.setblocking(False)
    text = random.Random(2).randbytes(400_000)
    total = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            total += served.send(text[total:])
    wait_until(lambda: ioctl_int(served.fileno(), Ioctl.SIOCOUTQNSD) > 0)
    transport_freeze(served)
    done = transport_buffer_purge(served)
    assert done.unread == 10
    assert done.unsent > 0
    assert ioctl_int(served.fileno(), Ioctl.SIOCINQ) == 0
    assert ioctl_int(served.fileno(), Ioctl.SIOCOUTQ) == done.kept
    transport_resume(served)
    served.settimeout(5)
    assert receive(client, total - done.unsent) == text[: total - done.unsent]
    talk(served, client)


def test_arrivals_are_noted_with_time_and_length(ends):
    served, client = ends
    with transport_arrivals(served, capacity=4) as ring:
        begun = time.time_ns()
        for size in (10, 20, 30, 40, 50):
            client.send(bytes(size))
            assert receive(served, size)
            time.sleep(0.005)
        wait_until(lambda: [a.data for a in ring.read() if a.data][-1:] == [50])
        noted = [a for a in ring.read() if a.data]
        assert len(ring.read()) == 4, "the ring keeps the latest"
        assert ring.lost == 0
    assert [a.data for a in noted] == [20, 30, 40, 50][-len(noted) :]
    gaps = [b.time - a.time for a, b in itertools.pairwise(noted)]
    assert all(begun <= a.time <= time.time_ns() for a in noted)
    assert min(gaps) >= 5_000_000
    assert all(a.length - a.data in range(40, 120) for a in noted)
    client.send(b"after the end")
    receive(served, 13)
    assert [a for a in ring.read() if a.data] == noted
