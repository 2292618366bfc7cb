"""Idle connections that were made ready for their release: nothing is lost or taken twice, wherever the address is."""

import contextlib
import dataclasses
import socket
import time

import pytest

from tcpstate.capture import Capture, replay
from tcpstate.discard import discard_connections
from tcpstate.errors import ConnectionCallFailed
from tcpstate.export import export_connections
from tcpstate.freeze import Blackhole, not_in_repair, quiet
from tcpstate.kernel.route import is_local
from tcpstate.kernel.sockets import SO, Level
from tcpstate.rebuild import rebuild_connections
from tcpstate.release import Ready
from tests.tscnet import SERVICE, Watcher, net, pair, wait_until

FAMILIES = [pytest.param(socket.AF_INET, id="ipv4"), pytest.param(socket.AF_INET6, id="ipv6")]
ONES = 3


@contextlib.contextmanager
def rebuilt(family):
    """Hosts, rebuilt sockets on b with their records, and their clients; the address has left a."""
    with net() as hosts, contextlib.ExitStack() as ends:
        a, b, c = hosts.hosts
        for host in (a, b):
            with host:
                Blackhole().ensure()
        a.add(family)
        pairs = [pair(a, c, family, port=7000 + n) for n in range(ONES)]
        served, clients = [one for one, _ in pairs], [client for _, client in pairs]
        for sock in (*served, *clients):
            sock.settimeout(5)
            ends.callback(sock.close)
        with a:
            records = export_connections(served, quiet(served))
        with b:
            made = rebuild_connections(records)
        for sock in made:
            sock.settimeout(5)
            ends.callback(sock.close)
        a.remove(family)
        with a:
            discard_connections(served, close=False)
        yield hosts.hosts, made, records, clients


def filtered(sock):
    """Whether a filter was there; it is not any more."""
    try:
        sock.setsockopt(Level.SOCKET, SO.DETACH_FILTER, 0)
    except FileNotFoundError:
        return False
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_what_arrives_between_the_address_and_the_release_is_taken_once(family):
    """Without a filter they take it while they are in repair; the capture has it as well, and it is replayed."""
    with rebuilt(family) as ((_, b, _), made, records, clients):
        with b, Capture(ports={7000 + n for n in range(ONES)}) as capture, Watcher(b) as watcher:
            ready = Ready(made, records)
            assert not any(map(filtered, made))
            b.add(family)
            wait_until(lambda: is_local(SERVICE[family]))
            assert not [s for s in watcher.sent() if s.source == SERVICE[family]]
            for number, client in enumerate(clients[1:]):
                client.sendall(b"early %d" % number)
            arrived = []
            wait_until(lambda: arrived.extend(capture.segments()) or sum(bool(s.payload) for s in arrived) >= ONES - 1)
            assert not_in_repair(made) == []
            ready.release().finish()
            replay([*arrived, *capture.segments()], records, socks=made)
        assert not any(map(filtered, made))
        assert len(not_in_repair(made)) == ONES
        for number, (sock, client) in enumerate(zip(made[1:], clients[1:], strict=True)):
            assert sock.recv(99) == b"early %d" % number
            client.sendall(b"late")
            assert sock.recv(99) == b"late"
            sock.sendall(b"answer")
            assert client.recv(99) == b"answer"


@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_address_is_already_they_hear_nothing_before_the_release(family):
    with rebuilt(family) as ((_, b, _), made, records, clients):
        with b, Watcher(b) as watcher:
            b.add(family)
            wait_until(lambda: is_local(SERVICE[family]))
            ready = Ready(made, records)
            for client in clients:
                client.sendall(b"said before")
            time.sleep(0.1)
            assert not [s for s in watcher.sent() if s.source == SERVICE[family]]
            ready.release().finish()
        for sock, client in zip(made, clients, strict=True):
            # by itself: nobody replays
            assert sock.recv(99) == b"said before"
            sock.sendall(b"answer")
            assert client.recv(99) == b"answer"
        assert not any(map(filtered, made))


@pytest.mark.parametrize("out", [set(), {0}, {1}, {2}, {0, 2}, {0, 1, 2}], ids=str)
def test_without_those_that_were_left_out(out):
    with rebuilt(socket.AF_INET) as ((_, b, _), made, records, _):
        records = [dataclasses.replace(r, options={**r.options, "so.keepalive": (1,)}) for r in records]
        with b:
            ready = Ready(made, records)
            ready.release(out).finish()
        left = [sock for place, sock in enumerate(made) if place not in out]
        assert not_in_repair(made) == left
        alive = [sock for sock in made if sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
        assert alive == left


def test_a_release_that_fails_names_the_connection():
    with rebuilt(socket.AF_INET) as ((_, b, _), made, records, _):
        with b:
            ready = Ready(made, records)
            made[2].close()
            with pytest.raises(ConnectionCallFailed, match=str(records[2].conn_id)):
                ready.release({0}).finish()
