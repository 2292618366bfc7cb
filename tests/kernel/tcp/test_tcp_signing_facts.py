"""What keeping MD5 keys and listeners of Multipath TCP relies on, each on its own."""

import contextlib
import errno
import os
import socket

import pytest

from tcpstate.filters import drop_syns, own_mark, undo_drop_syns
from tcpstate.kernel import diag, md5sig, netlink
from tcpstate.kernel.bpf import DROP_ALL, attach
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import INFO_SIZE, TCP, Repair, TcpInfo, TcpState
from tcpstate.md5keys import SigningKey, give_keys, keys_of
from tcpstate.silence import MARK, Blackhole
from tests.tscnet import Watcher, net, wait_until

V4 = socket.AF_INET
KEY = SigningKey(address="10.77.0.0", prefix=24, secret=b"of the network")


@pytest.fixture(scope="module")
def hosts():
    with net() as made:
        with made.a:
            Blackhole().ensure()
        yield made


@contextlib.contextmanager
def listening(host, port, protocol=0, keys=()):
    with host.socket(V4, socket.SOCK_STREAM, protocol) as sock:
        sock.setsockopt(Level.SOCKET, SO.REUSEADDR, 1)
        give_keys(sock, keys, "listener")
        sock.bind((host.own(V4), port))
        sock.listen()
        yield sock


def established(sock):
    return TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE)).state == TcpState.ESTABLISHED


def test_sock_diag_tells_keys_with_tcp_info_only(hosts):
    with hosts.a, listening(hosts.a, 7400, keys=[KEY]) as sock:
        assert keys_of([sock]) == [(KEY,)]
        with netlink.Netlink(netlink.Protocol.SOCK_DIAG) as channel:
            for info in (False, True):
                bodies = channel.dump(20, diag._request(V4, diag.ALL_STATES, diag._sockid(7400), info=info))
                told = [dict(netlink.attributes(body, diag._MESSAGE_SIZE)) for body in bodies]
                assert any(diag.Extension.MD5SIG in one for one in told) is info


def test_a_key_can_be_set_in_repair(hosts):
    with hosts.a.socket() as sock:
        sock.setsockopt(Level.TCP, TCP.REPAIR, Repair.ON)
        give_keys(sock, [KEY], "in repair")


def test_a_key_that_is_too_long_is_refused(hosts):
    # a request with another length than struct tcp_md5sig has
    with hosts.a.socket() as sock, pytest.raises(OSError, match="Invalid argument"):
        sock.setsockopt(Level.TCP, TCP.MD5SIG_EXT, md5sig.pack(bytes(16), 0, b"k")[:-1])


def test_a_connection_gets_its_peers_key_out_of_its_listeners_network(hosts):
    with hosts.a, listening(hosts.a, 7401, keys=[KEY]) as listener, hosts.c.socket() as client:
        give_keys(client, [SigningKey(address=hosts.a.own(V4), prefix=32, secret=KEY.secret)], "client")
        client.settimeout(5)
        client.connect((hosts.a.own(V4), 7401))
        accepted, _ = listener.accept()
        with accepted:
            assert keys_of([accepted]) == [(SigningKey(address=hosts.c.own(V4), prefix=32, secret=KEY.secret),)]


def test_a_multipath_listener_takes_no_filter(hosts):
    with listening(hosts.a, 7402, socket.IPPROTO_MPTCP) as sock:
        with pytest.raises(OSError, match="not supported") as refused:
            attach(sock, DROP_ALL)
        assert refused.value.errno == errno.EOPNOTSUPP


def test_a_listener_with_the_mark_of_a_blackhole_drops_syns_unanswered(hosts):
    with (
        hosts.a,
        listening(hosts.a, 7403, socket.IPPROTO_MPTCP) as sock,
        hosts.c.socket() as client,
        Watcher(hosts.c, keep=lambda s: 7403 in (s.source_port, s.destination_port)) as seen,
    ):
        sock.setsockopt(Level.SOCKET, SO.MARK, 5)
        states = drop_syns([sock])
        assert sock.getsockopt(Level.SOCKET, SO.MARK) == MARK
        assert own_mark(sock) == 5
        client.setblocking(False)
        client.connect_ex((hosts.a.own(V4), 7403))
        # it comes again after a second: neither was answered, and none has become a request
        wait_until(lambda: sum(out for out, _ in seen.seen) >= 2)
        assert all(out for out, _ in seen.seen)
        assert not hosts.a.sh("ss -Htan state syn-recv sport = 7403")
        undo_drop_syns([sock], states)
        assert sock.getsockopt(Level.SOCKET, SO.MARK) == 5
        wait_until(lambda: established(client), 10)


def test_a_plain_connection_of_a_multipath_listener_is_an_ordinary_one(hosts):
    with hosts.a, listening(hosts.a, 7404, socket.IPPROTO_MPTCP) as sock, hosts.c.socket() as client:
        client.connect((hosts.a.own(V4), 7404))
        accepted, _ = sock.accept()
        with accepted, socket.socket(fileno=os.dup(accepted.fileno())) as plain:
            assert plain.proto == socket.IPPROTO_TCP
            assert plain.getsockopt(Level.TCP, TCP.IS_MPTCP) == 0
            plain.setsockopt(Level.TCP, TCP.REPAIR, Repair.ON)
            plain.setsockopt(Level.TCP, TCP.REPAIR, Repair.OFF_NO_PROBE)
            # 0 cannot be set: it becomes 1
            assert plain.getsockopt(Level.SOCKET, SO.RCVLOWAT) == 0
            plain.setsockopt(Level.SOCKET, SO.RCVLOWAT, 0)
            assert plain.getsockopt(Level.SOCKET, SO.RCVLOWAT) == 1
