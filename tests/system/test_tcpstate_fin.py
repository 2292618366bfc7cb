"""Half-closed connections move: every state that its owner still holds, each family, queues full or empty."""

import contextlib
import socket
import time

import pytest

from tcpstate.capture import Capture, replay
from tcpstate.discard import discard_connections
from tcpstate.export import export_connections, state_of
from tcpstate.freeze import Blackhole, quiet
from tcpstate.kernel.bpf import DROP_ALL, attach
from tcpstate.kernel.route import is_local
from tcpstate.rebuild import compare, read_back, rebuild_connections, release_connections
from tcpstate.record import State
from tests.tscnet import SERVICE, Watcher, net, pair, wait_until

SO_DETACH_FILTER = 27
EARLY, LATE = b"early" * 100, b"late" * 800


@pytest.fixture(scope="module")
def hosts():
    with net() as made:
        for host in (made.a, made.b):
            with host:
                Blackhole().ensure()
        yield made


def bring(state, served, client, queued):
    """Bring ``served`` into ``state``; ``queued``: with unread data and, where it can be, unacknowledged data."""
    if queued:
        client.sendall(EARLY)
    peer_first = state in (State.CLOSE_WAIT, State.LAST_ACK)
    if peer_first:
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: state_of(served) is State.CLOSE_WAIT)
    if state in (State.FIN_WAIT_1, State.CLOSING, State.LAST_ACK):
        # the client hears nothing any more: neither our data nor our FIN is acknowledged
        attach(client, DROP_ALL)
    if queued and state is not State.FIN_WAIT_2:
        served.sendall(LATE)
    if state not in (State.ESTABLISHED, State.CLOSE_WAIT):
        served.shutdown(socket.SHUT_WR)
    if state is State.CLOSING:
        client.shutdown(socket.SHUT_WR)
    wait_until(lambda: state_of(served) is state)


def finish(state, moved, client, queued):
    """Both sides end the connection; all bytes have come, in order, and then the end."""
    with contextlib.suppress(FileNotFoundError):
        client.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
    to_client = LATE if queued and state is not State.FIN_WAIT_2 else b""
    to_server = EARLY if queued else b""
    if state in (State.ESTABLISHED, State.CLOSE_WAIT):
        moved.sendall(b"new")
        moved.shutdown(socket.SHUT_WR)
        to_client += b"new"
    if state in (State.ESTABLISHED, State.FIN_WAIT_1, State.FIN_WAIT_2):
        client.sendall(b"more")
        client.shutdown(socket.SHUT_WR)
        to_server += b"more"
    for sock, expected in ((client, to_client), (moved, to_server)):
        sock.settimeout(10)
        found = b""
        while data := sock.recv(65536):
            found += data
        assert found == expected


@pytest.mark.parametrize("queued", [False, True], ids=["empty", "queued"])
@pytest.mark.parametrize(
    ("family", "mapped"),
    [(socket.AF_INET, False), (socket.AF_INET6, False), (socket.AF_INET, True)],
    ids=["ipv4", "ipv6", "mapped"],
)
@pytest.mark.parametrize(
    "state",
    [State.ESTABLISHED, State.CLOSE_WAIT, State.FIN_WAIT_1, State.FIN_WAIT_2, State.CLOSING, State.LAST_ACK],
    ids=lambda s: s.value,
)
def test_every_state_moves(hosts, state, family, mapped, queued):
    a, b, c = hosts.hosts
    a.add(family)
    address = SERVICE[family]
    with a:
        wait_until(lambda: is_local(address))
    served, client = pair(a, c, family, mapped=mapped)
    with contextlib.ExitStack() as ends, Watcher(c, keep=lambda s: s.flags & 4) as watcher:
        ends.callback(client.close)
        bring(state, served, client, queued)
        with a:
            here = ends.enter_context(Capture(ports={7000}))
            records = export_connections([served], quiet([served]))
        assert records[0].state is state
        with b:
            there = ends.enter_context(Capture(ports={7000}))
            socks = rebuild_connections(records)
            ends.callback(socks[0].close)
            (again,) = read_back(socks, records)
            assert compare(records[0], again) == []
        a.remove(family)
        b.add(family)
        with b:
            wait_until(lambda: is_local(address))
            release_connections(socks, records)
            replay(here.segments() + there.segments(), records)
            # an acknowledgement may still be on its way
            wait_until(lambda: state_of(socks[0]) in (state, State.CLOSED, State.TIME_WAIT), 5)
        with a:
            discard_connections([served])
        finish(state, socks[0], client, queued)
        time.sleep(0.05)
        assert watcher.resets() == []
    b.remove(family)
