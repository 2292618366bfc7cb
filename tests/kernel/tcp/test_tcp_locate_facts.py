"""Finding connections and their owners from outside."""

import os
import signal
import socket

import pytest

from tcpstate.connid import ConnId
from tcpstate.errors import NoSuchConnection, UnsupportedSocket
from tcpstate.export import refusal, state_of, supported
from tcpstate.kernel import route
from tcpstate.kernel.tcp import TcpState
from tcpstate.locate import Owner, connections, find, listener_backlog, owners_of, take, take_all
from tcpstate.record import State
from tests.descriptors import open_descriptors
from tests.tscnet import net, pair

V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.fixture(scope="module")
def hosts():
    with net() as made:
        yield made


@pytest.fixture(params=[(V4, False), (V6, False), (V4, True)], ids=["IPv4", "IPv6", "mapped"])
def ends(request, hosts):
    family, mapped = request.param
    served, client = pair(hosts.a, hosts.c, family, service=False, port=0, mapped=mapped)
    yield served, client
    served.close()
    client.close()


def name(sock):
    local, peer = sock.getsockname(), sock.getpeername()
    return ConnId.tcp(local[0], local[1], peer[0], peer[1])


def test_a_connection_is_found_with_its_owner_and_queues(hosts, ends):
    served, client = ends
    client.send(b"four")
    with hosts.a:
        found = find(ConnId.parse(str(name(served))))
        assert found in connections()
        assert found in connections([os.getpid()])
        assert connections([1]) == []
    assert (found.conn_id, found.family, found.state) == (name(served), served.family, TcpState.ESTABLISHED)
    assert found.owners == (Owner(os.getpid(), served.fileno()),)
    assert found.inode == os.fstat(served.fileno()).st_ino
    assert found.receive_queue == 4


def test_it_is_another_connection_from_the_other_side(hosts, ends):
    _, client = ends
    with hosts.c:
        assert find(name(client)).owners[0].fd == client.fileno()
    with hosts.b, pytest.raises(NoSuchConnection) as caught:
        find(name(client))
    assert caught.value.object == str(name(client))


def test_every_owner_is_named_and_taking_gives_the_same_open_file(hosts, ends):
    served, client = ends
    pid = os.fork()
    if not pid:
        signal.pause()
        os._exit(0)
    try:
        with hosts.a:
            assert {o.pid for o in find(name(served)).owners} == {pid, os.getpid()}
        taken = take(pid, served.fileno())
        assert os.path.sameopenfile(taken.fileno(), served.fileno())
        assert (taken.family, taken.getsockname()) == (served.family, served.getsockname())
        taken.send(b"for it")
        assert client.recv(10) == b"for it"
        taken.close()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_what_cannot_be_taken_is_told_apart():
    with pytest.raises(NoSuchConnection, match="no such descriptor"):
        take(os.getpid(), 1 << 20)
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(NoSuchConnection):
        take(pid, 0)
    with open("/dev/null", "rb") as null, pytest.raises(UnsupportedSocket, match="not a socket"):
        take(os.getpid(), null.fileno())
    with socket.socket(V4, socket.SOCK_DGRAM) as datagrams, pytest.raises(UnsupportedSocket, match="not a TCP"):
        take(os.getpid(), datagrams.fileno())


def test_one_failure_takes_none(hosts, ends):
    served, _ = ends
    before = open_descriptors()
    with pytest.raises(NoSuchConnection):
        take_all([Owner(os.getpid(), served.fileno()), Owner(os.getpid(), 1 << 20)])
    assert open_descriptors() == before


def test_owners_by_inode(ends):
    served, _ = ends
    inode = os.fstat(served.fileno()).st_ino
    assert owners_of({inode}) == {inode: [Owner(os.getpid(), served.fileno())]}


def test_a_connection_in_the_accept_queue_has_no_owner_and_is_counted(hosts):
    with hosts.a.socket(V4, socket.SOCK_STREAM) as listener, hosts.c.socket(V4, socket.SOCK_STREAM) as client:
        listener.bind((hosts.a.own(V4), 0))
        listener.listen(4)
        with hosts.a:
            assert listener_backlog([listener])[0].empty
            client.connect(listener.getsockname())
            assert listener_backlog([listener])[0].accepted == 1
            assert find(name(client).reversed()).owners == ()
            with pytest.raises(UnsupportedSocket):
                listener_backlog([client])


def test_refusals_tell_before_anything_is_changed(hosts, ends):
    served, _ = ends
    assert refusal(served) is None
    assert state_of(served) is State.ESTABLISHED
    assert supported(State.ESTABLISHED)
    assert not supported(State.TIME_WAIT)
    with socket.socket(V4, socket.SOCK_STREAM) as listener:
        listener.listen(1)
        assert state_of(listener) is None
        assert "listening" in refusal(listener).message
    with hosts.a.socket(V4, socket.SOCK_STREAM) as fresh:
        assert "never connected" in refusal(fresh).message


def test_local_addresses_are_told_from_others(hosts):
    with hosts.a:
        assert route.is_local(hosts.a.own(V4))
        assert route.is_local(hosts.a.own(V6))
        assert route.is_local("127.0.0.1")
        assert not route.is_local(hosts.b.own(V4))
        assert not route.is_local(hosts.b.own(V6))
        assert not route.is_local("192.0.2.1")
        assert not route.is_local("2001:db8::1")
