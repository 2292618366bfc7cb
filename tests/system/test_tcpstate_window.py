"""A connection whose receive window was closed when it moved flows on as soon as its owner reads."""

import contextlib
import dataclasses
import socket
import time
from pathlib import Path

import pytest

from tcpstate.capture import Capture, replay
from tcpstate.discard import discard_connections
from tcpstate.export import export_connections
from tcpstate.firstdata import LONG
from tcpstate.freeze import Blackhole, quiet
from tcpstate.kernel.route import is_local
from tcpstate.kernel.sockets import SO, Level
from tcpstate.rebuild import rebuild_connections, release_connections
from tcpstate.segment import SEQ_MASK
from tests.tscnet import SERVICE, Watcher, net, pair, wait_until

TOTAL = 40_000_000
#: the client's persist timer must have backed off beyond the time that is allowed below
CLOSED = 2.0
ALLOWED = 0.5


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_a_closed_window_opens(family):
    with _connected(family) as (hosts, served, client), contextlib.ExitStack() as ends:
        a, b, _ = hosts
        client.setblocking(False)
        sent = 0
        closed = time.monotonic() + CLOSED
        while time.monotonic() < closed:
            try:
                sent += client.send(bytes(min(1 << 16, TOTAL - sent)))
            except BlockingIOError:
                time.sleep(0.01)
        assert sent < TOTAL
        with a:
            records = export_connections([served], quiet([served]))
        assert records[0].windows.rcv_wnd == 0
        with b:
            (made,) = rebuild_connections(records)
        ends.callback(made.close)
        a.remove(family)
        with Watcher(b, keep=lambda s: s.source_port == 7000) as watcher:
            b.add(family)
            with b:
                wait_until(lambda: is_local(SERVICE[family]))
                release_connections([made], records)
            # what was offered cannot be taken back, and what does not fit is dropped: never more than the buffer holds
            scale = records[0].negotiated.rcv_wscale or 0
            offered = max(s.window << scale for s in watcher.sent())
            room = made.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) - len(records[0].receive_queue)
            assert offered <= max(room, 2 * records[0].negotiated.mss)
        with a:
            discard_connections([served])
        made.settimeout(5)
        unread = len(records[0].receive_queue)
        while unread:
            unread -= len(made.recv(min(1 << 20, unread)))
        # what follows can only come because the client heard of the room
        begun = time.monotonic()
        assert made.recv(1)
        assert time.monotonic() - begun < ALLOWED


def _counter(host, name):
    """One of the kernel's counters in /proc/net/netstat."""
    with host:
        lines = Path("/proc/thread-self/net/netstat").read_text().splitlines()
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        found = dict(zip(names.split()[1:], values.split()[1:], strict=True))
        if name in found:
            return int(found[name])
    raise KeyError(name)


def _fill(client, size=1 << 16):
    """Send as much as goes, in pieces, until nothing has gone for a while; how much."""
    client.setblocking(False)
    sent, last = 0, time.monotonic()
    while time.monotonic() - last < CLOSED / 4:
        try:
            sent += client.send(bytes(size))
            last = time.monotonic()
        except BlockingIOError:
            time.sleep(0.002)
    return sent


def _move(hosts, served, family, *, change):
    """From a to b: the capture, once it is frozen; (rebuilt socket, record, what was captured), once it is released."""
    a, b, _ = hosts
    with a, Capture(ports={7000}) as capture:
        states = quiet([served])
        yield capture
        (record,) = export_connections([served], states)
        arrived = capture.segments()
    record = change(record, arrived)
    with b:
        (made,) = rebuild_connections([record])
    a.remove(family)
    b.add(family)
    with b:
        wait_until(lambda: is_local(SERVICE[family]))
        release_connections([made], [record])
        yield made, record, arrived
    with a:
        discard_connections([served])


@contextlib.contextmanager
def _connected(family):
    """Hosts and a connection to the first of them: (hosts, served, client)."""
    with net() as hosts, contextlib.ExitStack() as ends:
        a, b, c = hosts.hosts
        for host in (a, b):
            with host:
                Blackhole().ensure()
        a.add(family)
        with a:
            wait_until(lambda: is_local(SERVICE[family]))
        served, client = pair(a, c, family)
        ends.callback(client.close)
        ends.callback(served.close)
        yield hosts.hosts, served, client


@contextlib.contextmanager
def _streaming(family):
    """The same, in full flow."""
    with _connected(family) as (hosts, served, client):
        client.setblocking(False)
        left = TOTAL
        while left:
            with contextlib.suppress(BlockingIOError):
                client.send(bytes(1 << 16))
            with contextlib.suppress(BlockingIOError):
                left -= len(served.recv(min(left, 1 << 20), socket.MSG_DONTWAIT))
        yield hosts, served, client


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_a_buffer_is_not_overrated(family):
    """After a move in full flow the kernel reckons with overhead, though the first packets are nearly all data."""

    with _streaming(family) as (hosts, served, client):
        _fill(client)
        steps = _move(hosts, served, family, change=lambda record, _: record)
        next(steps)
        made, record, _ = next(steps)
        left = len(record.receive_queue)
        assert left > LONG
        while left:
            left -= len(made.recv(min(left, 1 << 20)))
        next(steps, None)
        made.settimeout(5)
        assert made.recv(1 << 20)
        _fill(client)
        # what the kernel thinks is data, if all of the buffer is used; a connection's first packets make it 0.89
        assert made.getsockopt(Level.TCP, socket.TCP_WINDOW_CLAMP) < 0.95 * made.getsockopt(Level.SOCKET, SO.RCVBUF)
        made.close()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("locked", [False, True], ids=["tuned", "fixed"])
def test_what_is_replayed_has_room(family, locked):
    """What came into the window in the freeze is taken in, though single segments need more memory than merged ones."""

    def narrow(record, arrived):
        data = sum(len(segment.payload) for segment in arrived)
        buffers = dataclasses.replace(record.buffers, receive=len(record.receive_queue) + data, receive_locked=locked)
        return dataclasses.replace(record, buffers=buffers)

    with _streaming(family) as (hosts, served, client):
        steps = _move(hosts, served, family, change=narrow)
        next(steps)
        assert _fill(client) > 1 << 16
        made, record, arrived = next(steps)
        replay(arrived, [record], socks=[made])
        made.settimeout(5)
        end = max(segment.end for segment in arrived if segment.payload)
        left = len(record.receive_queue) + ((end - record.rcv_nxt) & SEQ_MASK)
        assert _counter(hosts[1], "TCPRcvQDrop") == 0
        while left:
            left -= len(made.recv(min(left, 1 << 20)))
        if locked:
            assert made.getsockopt(Level.SOCKET, SO.RCVBUF) == record.buffers.receive // 2 * 2
        next(steps, None)
        made.close()
