"""TCP MD5 signatures: signed connections and listeners move with their keys; a wrong key gets nothing."""

import contextlib
import logging
import os
import socket
import time

import pytest

from tcpstate.capture import Capture, replay
from tcpstate.discard import discard_connections
from tcpstate.export import export_connections, refusal, state_of
from tcpstate.freeze import Blackhole, quiet
from tcpstate.kernel.bpf import DROP_ALL, attach
from tcpstate.kernel.md5sig import OPTION_KIND
from tcpstate.kernel.route import is_local
from tcpstate.md5keys import SigningKey, all_keys, give_keys, keys_of, listeners_keys
from tcpstate.rebuild import differences, rebuild_connections
from tcpstate.record import ConnectionRecord, State
from tcpstate.release import release_connections
from tests.cells import FAMILIES
from tests.tscnet import SERVICE, Watcher, net, wait_until

SECRET = b"secret-of-the-routers"
SO_DETACH_FILTER = 27
NETWORK = {socket.AF_INET: ("10.77.0.0", 24), socket.AF_INET6: ("fd77::", 64)}


@pytest.fixture(scope="module")
def hosts():
    with net() as made:
        for host in (made.a, made.b):
            with host:
                Blackhole().ensure()
        yield made


def key(address, prefix=None, secret=SECRET):
    return SigningKey(address=address, prefix=prefix or (128 if ":" in address else 32), secret=secret)


def signed_pair(hosts, family, mapped, port, listener_key=None):
    """(listener's connection on a, client on c), signed on both sides."""
    address, kind = SERVICE[family], socket.AF_INET6 if mapped else family
    with hosts.a.socket(kind, socket.SOCK_STREAM) as listener:
        give_keys(listener, [listener_key or key(hosts.c.own(family))], "listener")
        listener.bind((f"::ffff:{address}" if mapped else address, port))
        listener.listen()
        client = hosts.c.socket(family, socket.SOCK_STREAM)
        give_keys(client, [key(address)], "client")
        client.settimeout(5)
        client.connect((address, port))
        return listener.accept()[0], client


def failures(host):
    """Segments without, with a needless or with a wrong signature, since the host came up."""
    lines = [line.split() for line in host.sh("cat /proc/net/netstat").splitlines() if line.startswith("TcpExt")]
    numbers = dict(zip(lines[0], lines[1], strict=True))
    return {k: int(v) for k, v in numbers.items() if k.startswith("TCPMD5") and int(v)}


def test_keys_of_listeners_are_told_without_those_of_connections(hosts):
    a, c = hosts.a, hosts.c
    with contextlib.ExitStack() as ends:
        a.add(socket.AF_INET)
        ends.callback(a.remove, socket.AF_INET)
        with a:
            wait_until(lambda: is_local(SERVICE[socket.AF_INET]))
        served, client = map(ends.enter_context, signed_pair(hosts, socket.AF_INET, False, 6999))
        listener = ends.enter_context(a.socket(socket.AF_INET, socket.SOCK_STREAM))
        mine = key(c.own(socket.AF_INET))
        give_keys(listener, [mine], "listener")
        listener.bind((SERVICE[socket.AF_INET], 6998))
        listener.listen()
        inode = os.fstat(listener.fileno()).st_ino
        with a:
            assert listeners_keys() == {inode: (mine,)}
            assert all_keys() == {inode: (mine,), os.fstat(served.fileno()).st_ino: (mine,)}
    assert client.fileno() == -1


CASES = [(State.ESTABLISHED, f) for f in FAMILIES] + [(s, "ipv4") for s in (State.CLOSE_WAIT, State.FIN_WAIT_1)]


@pytest.mark.parametrize(("state", "kind"), CASES, ids=lambda v: getattr(v, "name", v))
def test_a_signed_connection_moves(hosts, caplog, state, kind):
    a, b, c = hosts.hosts
    family, mapped = FAMILIES[kind]
    caplog.set_level(logging.DEBUG)
    before = failures(c)
    with contextlib.ExitStack() as ends, Watcher(c) as watcher:
        a.add(family)
        place = ends.enter_context(contextlib.ExitStack())
        place.callback(a.remove, family)
        with a:
            wait_until(lambda: is_local(SERVICE[family]))
        network = key(*NETWORK[family])
        served, client = signed_pair(hosts, family, mapped, 7000 + CASES.index((state, kind)), network)
        ends.callback(client.close)
        client.sendall(b"unread")
        if state is State.FIN_WAIT_1:
            attach(client, DROP_ALL)
        if state is State.CLOSE_WAIT:
            client.shutdown(socket.SHUT_WR)
        served.sendall(b"unheard")
        if state is State.FIN_WAIT_1:
            served.shutdown(socket.SHUT_WR)
        wait_until(lambda: state_of(served) is state)
        assert refusal(served) is None
        with a:
            here = ends.enter_context(Capture(ports={served.getsockname()[1]}))
            (record,) = export_connections([served], quiet([served]))
        # of the listener's network of peers its connection has the one peer
        assert record.signing_keys == (key(c.own(family)),)
        record = ConnectionRecord.from_bytes(record.to_bytes())
        with b:
            (moved,) = rebuild_connections([record])
            ends.callback(moved.close)
            assert differences([moved], [record]) == []
            assert keys_of([moved]) == [record.signing_keys]
        place.close()
        b.add(family)
        place.callback(b.remove, family)
        with b:
            wait_until(lambda: is_local(SERVICE[family]))
            start = len(watcher.seen)
            release_connections([moved], [record])
            replay(here.segments(), [record])
        discard_connections([served])
        with contextlib.suppress(FileNotFoundError):
            client.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
        client.settimeout(10)
        moved.settimeout(10)
        assert moved.recv(99) == b"unread"
        if state is State.ESTABLISHED:
            client.sendall(b"new")
            assert moved.recv(99) == b"new"
        if state is not State.FIN_WAIT_1:
            moved.sendall(b"more")
            moved.shutdown(socket.SHUT_WR)
        expected = b"unheard" + b"more" * (state is not State.FIN_WAIT_1)
        found = b""
        while data := client.recv(99):
            found += data
        assert found == expected
        time.sleep(0.05)
        moving = [s for out, s in watcher.seen[start:] if not out and s.source == SERVICE[family]]
        assert len(moving) >= 2
        assert all(OPTION_KIND in dict(s.each_option()) for s in moving)
        assert watcher.resets() == []
    assert failures(c) == before
    assert SECRET.decode() not in caplog.text
    assert SECRET.decode() not in repr(record)
    assert SECRET.hex() not in repr(record)


def test_a_peer_with_another_key_gets_nothing(hosts):
    a, b, c = hosts.hosts
    family = socket.AF_INET
    with contextlib.ExitStack() as ends:
        a.add(family)
        place = ends.enter_context(contextlib.ExitStack())
        place.callback(a.remove, family)
        served, client = signed_pair(hosts, family, False, 7050)
        ends.callback(client.close)
        with a:
            (record,) = export_connections([served], quiet([served]))
        with b:
            (moved,) = rebuild_connections([record])
            ends.callback(moved.close)
        place.close()
        b.add(family)
        place.callback(b.remove, family)
        with b:
            release_connections([moved], [record])
        discard_connections([served])
        # the peer's operator changes the key on one side only
        give_keys(client, [key(SERVICE[family], secret=b"another")], "client")
        wrong = failures(c).get("TCPMD5Failure", 0)
        moved.sendall(b"in the right key")
        wait_until(lambda: failures(c).get("TCPMD5Failure", 0) > wrong)
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)
        give_keys(client, [key(SERVICE[family])], "client")
        client.settimeout(10)
        assert client.recv(99) == b"in the right key"


def test_a_listener_keeps_its_keys(hosts):
    """Record and rebuild of a listening socket; its connections are signed, others get no answer."""
    a, _, c = hosts.hosts
    address = a.own(socket.AF_INET)
    with a, a.socket() as listener:
        give_keys(listener, [key(c.own(socket.AF_INET)), key("10.99.0.0", 16, b"network")], "listener")
        listener.bind((address, 7060))
        listener.listen()
        keys = keys_of([listener])[0]
    assert {(k.address, k.prefix, k.secret) for k in keys} == {
        (c.own(socket.AF_INET), 32, SECRET),
        ("10.99.0.0", 16, b"network"),
    }
    with a, a.socket() as again:
        give_keys(again, keys, "listener")
        again.bind((address, 7060))
        again.listen()
        with c.socket() as stranger, c.socket() as friend:
            stranger.settimeout(0.3)
            with pytest.raises(TimeoutError):
                stranger.connect((address, 7060))
            give_keys(friend, [key(address)], "friend")
            friend.settimeout(5)
            friend.connect((address, 7060))
            accepted, _ = again.accept()
            accepted.close()
