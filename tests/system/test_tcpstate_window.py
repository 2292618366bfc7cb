"""A connection whose receive window was closed when it moved flows on as soon as its owner reads."""

import contextlib
import socket
import time

import pytest

from tcpstate.discard import discard_connections
from tcpstate.export import export_connections
from tcpstate.freeze import Blackhole, quiet
from tcpstate.kernel.route import is_local
from tcpstate.rebuild import rebuild_connections, release_connections
from tests.tscnet import SERVICE, Watcher, net, pair, wait_until

TOTAL = 40_000_000
#: the client's persist timer must have backed off beyond the time that is allowed below
CLOSED = 2.0
ALLOWED = 0.5


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_a_closed_window_opens(family):
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
