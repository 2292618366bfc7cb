"""Both ends of a connection move at once, to other hosts, addresses and ports; streams under way in both directions."""

import contextlib
import dataclasses
import random
import socket

import pytest

from tcpstate import ConnectionRecord, retuple, settle
from tcpstate.capture import Capture, replay
from tcpstate.discard import discard_connections
from tcpstate.export import export_connections, state_of
from tcpstate.freeze import quiet
from tcpstate.kernel.bpf import DROP_ALL, attach
from tcpstate.kernel.sockets import Ioctl, ioctl_int
from tcpstate.rebuild import differences, rebuild_connections
from tcpstate.record import State
from tcpstate.release import release_connections
from tests.cells import FAMILIES
from tests.tscnet import Watcher, pair, silent_net, wait_until

TO_CLIENT = random.Random(1).randbytes(1 << 20)
TO_SERVER = random.Random(2).randbytes(1 << 20)


@pytest.fixture(scope="module")
def hosts():
    with silent_net() as made:
        yield made


def push(sock, data):
    """As much as the kernel takes without waiting."""
    sock.setblocking(False)
    done = 0
    with contextlib.suppress(BlockingIOError):
        while done < len(data):
            done += sock.send(data[done : done + 30000])
    sock.setblocking(True)
    return done


def exchange(ends):
    """Each (socket, what it is to receive, what it is still to send) does so, all at a time."""
    found = {sock: bytearray() for sock, _, _ in ends}
    rest = {sock: memoryview(data) for sock, _, data in ends}
    for sock in found:
        sock.setblocking(False)

    def step():
        for sock, _, _ in ends:
            with contextlib.suppress(BlockingIOError):
                found[sock] += sock.recv(1 << 20)
            if rest[sock]:
                with contextlib.suppress(BlockingIOError):
                    rest[sock] = rest[sock][sock.send(rest[sock]) :]
        return all(len(found[sock]) >= len(expected) for sock, expected, _ in ends)

    wait_until(step, 20)
    for sock, expected, _ in ends:
        assert found[sock] == expected
        sock.settimeout(20)


@pytest.mark.parametrize("half_closed", [False, True], ids=["open", "half-closed"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_both_ends_move_and_nothing_is_lost(hosts, kind, half_closed):
    """The server from a to b, its client from c to a; other ports, too."""
    a, b, c = hosts.hosts
    family, mapped = FAMILIES[kind]
    port = 7200 + list(FAMILIES).index(kind) * 2 + half_closed
    with contextlib.ExitStack() as ends:
        watchers = [ends.enter_context(Watcher(h, keep=lambda s: s.flags & 4)) for h in hosts.hosts]
        served, client = pair(a, c, family, service=False, mapped=mapped, port=port)
        sent = [push(served, TO_CLIENT[:300_000]), push(client, TO_SERVER[:200_000])]
        wait_until(lambda: min(ioctl_int(s.fileno(), Ioctl.SIOCINQ) for s in (served, client)) > 0)
        # from here on nothing arrives at either end: what is sent now is in flight, or waits
        attach(served, DROP_ALL)
        attach(client, DROP_ALL)
        sent[0] += push(served, TO_CLIENT[sent[0] : 600_000])
        sent[1] += push(client, TO_SERVER[sent[1] : 500_000])
        if half_closed:
            served.shutdown(socket.SHUT_WR)
        with a:
            (one,) = export_connections([served], quiet([served]))
        with c:
            (other,) = export_connections([client], quiet([client]))
        assert len(one.send_queue) > 0
        assert len(other.send_queue) > 0
        assert one.receive_queue
        assert other.receive_queue
        names = (b.own(family), 9000 + port), (a.own(family), 9100 + port)
        # the filter was the test's
        one, other = (dataclasses.replace(ConnectionRecord.from_bytes(r.to_bytes()), filter=()) for r in (one, other))
        one, other = settle(one, other)
        assert one.sent == other.sent == 0
        one = retuple(one, local=names[0], peer=names[1])
        other = retuple(other, local=names[1], peer=names[0])
        with a:
            discard_connections([served])
        with c:
            discard_connections([client])
        made, captures = [], []
        for host, record in ((b, one), (a, other)):
            with host:
                captures.append(ends.enter_context(Capture(ports={record.conn_id.local_port})))
                made += rebuild_connections([record])
                assert differences(made[-1:], [record]) == []
        ends.callback(made[0].close)
        ends.callback(made[1].close)
        for host, sock, record in ((b, made[0], one), (a, made[1], other)):
            with host:
                release_connections([sock], [record])
        for host, capture, record in ((b, captures[0], one), (a, captures[1], other)):
            with host:
                replay(capture.segments(), [record])
        server, moved = made
        exchange([(moved, TO_CLIENT[: sent[0]], TO_SERVER[sent[1] :]), (server, TO_SERVER, b"")])
        if half_closed:
            assert moved.recv(1) == b""
            wait_until(lambda: state_of(server) is State.FIN_WAIT_2)
        else:
            server.sendall(b"end")
            assert moved.recv(9) == b"end"
        assert server.getpeername()[1] == names[1][1]
        assert [w.resets() for w in watchers] == [[], [], []]
