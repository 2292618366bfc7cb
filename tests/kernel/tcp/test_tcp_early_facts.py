"""Receive queues read beforehand: the bytes stay, what comes later is appended, and a reader is noticed."""

import random
import socket

import pytest

from tcpstate import options
from tcpstate.early import Early, read_early
from tcpstate.export import export_connections
from tcpstate.freeze import quiet
from tcpstate.kernel.sockets import SO, Ioctl, Level, ioctl_int
from tcpstate.rebuild import differences, rebuild_connections
from tcpstate.silence import Blackhole
from tests.tscnet import net, pair, wait_until

BYTES = random.Random(3).randbytes(300_000)
V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.fixture(scope="module")
def hosts():
    with net() as made:
        for host in (made.a, made.b):
            with host:
                Blackhole().ensure()
        yield made


@pytest.fixture(params=[(V4, False), (V6, False), (V4, True)], ids=["IPv4", "IPv6", "mapped"])
def ends(request, hosts):
    family, mapped = request.param
    served, client = pair(hosts.a, hosts.c, family, service=False, port=0, mapped=mapped)
    client.settimeout(5)
    # room for all, unread
    served.setsockopt(Level.SOCKET, SO.RCVBUFFORCE, 16 * len(BYTES))
    yield served, client
    served.close()
    client.close()


def arrive(served, client, data):
    before = ioctl_int(served.fileno(), Ioctl.SIOCINQ)
    client.sendall(data)
    wait_until(lambda: ioctl_int(served.fileno(), Ioctl.SIOCINQ) == before + len(data))


def export(hosts, served, early):
    with hosts.a:
        return export_connections([served], quiet([served]), early=early)[0]


def test_only_the_rest_is_exported(hosts, ends):
    served, client = ends
    arrive(served, client, BYTES[:100_000])
    (first,) = read_early([served], [None], 1).values()
    arrive(served, client, BYTES[100_000:150_000])
    (second,) = read_early([served], [first[0]], 1).values()
    assert read_early([served], [second[0]], 1) == {}
    assert (bytes(first[1]) + bytes(second[1]), second[0].count) == (BYTES[:150_000], 150_000)
    arrive(served, client, BYTES[150_000:])
    early = [second[0]]
    record = export(hosts, served, early)
    assert (early, record.receive_queue) == ([second[0]], BYTES[150_000:])
    # nothing was taken from it, and the two parts make the connection
    pieces = {0: [first[1], second[1]]}
    with hosts.b:
        made = rebuild_connections([record], early=pieces)
        assert differences(made, [record], pieces) == []
        made[0].close()
        made = rebuild_connections([record], early=pieces)
        damaged = {0: [first[1], memoryview(bytes(50_000))]}
        assert [d.what for _, d in differences(made, [record], damaged)] == ["receive queue"]
        made[0].close()


def test_a_fin_that_came_meanwhile_changes_nothing(hosts, ends):
    served, client = ends
    arrive(served, client, BYTES[:100_000])
    ((known, _),) = read_early([served], [None], 1).values()
    client.sendall(BYTES[100_000:])
    client.shutdown(socket.SHUT_WR)
    wait_until(lambda: ioctl_int(served.fileno(), Ioctl.SIOCINQ) == len(BYTES) and options.save([served]))
    wait_until(lambda: served.getsockopt(Level.TCP, 11, 1)[0] == 8)
    assert read_early([served], [known], 1)[0][0] == Early(len(BYTES), known.consumed)
    assert export(hosts, served, [known]).receive_queue == BYTES[100_000:]


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_reader_is_noticed(hosts, ends, size):
    served, client = ends
    arrive(served, client, BYTES)
    ((known, _),) = read_early([served], [None], 1).values()
    served.recv(size, socket.MSG_WAITALL)
    arrive(served, client, BYTES[:size])  # as many as before
    assert read_early([served], [known], 1) == {}
    early = [known]
    record = export(hosts, served, early)
    assert early == [None]
    assert record.receive_queue == BYTES[size:] + BYTES[:size]


def test_the_applications_own_peek_offset_stays(hosts, ends):
    served, client = ends
    arrive(served, client, BYTES)
    served.setsockopt(Level.SOCKET, SO.PEEK_OFF, 7)
    assert read_early([served], [None], 1) == {}
    assert export(hosts, served, [None]).receive_queue == BYTES
    assert served.getsockopt(Level.SOCKET, SO.PEEK_OFF) == 7


def test_urgent_data_is_left_to_the_export(hosts, ends):
    served, client = ends
    client.sendall(BYTES[:100])
    client.send(b"!", socket.MSG_OOB)
    client.sendall(BYTES[100:])
    wait_until(lambda: ioctl_int(served.fileno(), Ioctl.SIOCINQ) == 100)
    found = read_early([served], [None], 1)
    assert all(bytes(data) == BYTES[:100] for _, data in found.values())


def test_only_what_is_called_volatile_changes_without_the_owner(hosts, ends):
    served, client = ends
    before = options.save([served])[0]
    for _ in range(20):
        arrive(served, client, BYTES)
        got = 0
        while got < len(BYTES):
            got += len(served.recv(1 << 20))
        served.sendall(BYTES)
        got = 0
        while got < len(BYTES):
            got += len(client.recv(1 << 20))
    after = options.save([served])[0]
    changed = {k for k in before.numbers | after.numbers if before.numbers.get(k) != after.numbers.get(k)}
    assert changed <= options.VOLATILE
    assert before.data == after.data
    assert options.refresh([served], [before])[0] == after
