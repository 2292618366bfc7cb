"""What TCP.md says about freezing, each on its own: a red test here names what another kernel does differently."""

import errno
import os
import signal
import socket
import struct
import time

import pytest

from tcpstate.errors import ConnectionCallFailed, ForeignFilter
from tcpstate.filters import drop_syns, read_filters, remove_syn_filter, undo_drop_syns
from tcpstate.freeze import Gate, enter_repair, not_in_repair, quiet, thaw
from tcpstate.kernel import bpf, route
from tcpstate.kernel.sockets import IP, SO, Ioctl, Level, ioctl_int
from tcpstate.kernel.tcp import INFO_SIZE, TCP, USER_TIMEOUT_MAX, TcpInfo, TcpState
from tcpstate.locate import listener_backlog, take
from tcpstate.silence import MARK, blackhole
from tests.tscnet import Watcher, pair, silent_net, wait_until

V4, V6 = socket.AF_INET, socket.AF_INET6
ACCEPT = ((6, 0, 0, 0xFFFFFFFF),)


@pytest.fixture(scope="module")
def hosts():
    with silent_net() as made:
        yield made


def joined(hosts, family=V4, **how):
    return pair(hosts.a, hosts.c, family, service=False, port=0, **how)


def state_of(sock):
    return TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE)).state


@pytest.fixture(params=["IPv4", "IPv6", "mapped"])
def ends(request, hosts):
    made = joined(hosts, V6 if request.param == "IPv6" else V4, mapped=request.param == "mapped")
    yield made
    for sock in made:
        sock.close()


def test_a_quiet_socket_takes_nothing_and_answers_nothing(hosts, ends):
    served, client = ends
    with Watcher(hosts.a) as watcher:
        states = quiet([served])
        client.send(b"nobody hears this")
        time.sleep(0.25)
        assert ioctl_int(served.fileno(), Ioctl.SIOCINQ) == 0
        assert watcher.sent() == []
        thaw([served], states)
        served.settimeout(5)
        assert served.recv(100) == b"nobody hears this"


def test_a_quiet_socket_does_not_retransmit(hosts, ends):
    served, client = ends
    # the client hears nothing, so that data stays unacknowledged
    bpf.attach(client, bpf.DROP_ALL)
    served.send(bytes(3000))
    time.sleep(0.02)
    with Watcher(hosts.a) as watcher:
        states = quiet([served])
        time.sleep(0.6)
        assert watcher.sent() == []
    client.setsockopt(Level.SOCKET, SO.DETACH_FILTER, 0)
    thaw([served], states)
    client.settimeout(5)
    got = 0
    while got < 3000:
        got += len(client.recv(5000))


def test_repair_alone_does_not_freeze(hosts):
    served, client = joined(hosts)
    enter_repair([served])
    client.send(b"x" * 10)
    wait_until(lambda: ioctl_int(served.fileno(), Ioctl.SIOCINQ) == 10)
    served.close()
    client.close()


def test_quiet_outlives_user_timeout_and_keepalive(hosts):
    served, client = joined(hosts)
    served.setsockopt(Level.TCP, TCP.USER_TIMEOUT, 400)
    served.setsockopt(Level.SOCKET, SO.KEEPALIVE, 1)
    for option in (TCP.KEEPIDLE, TCP.KEEPINTVL, TCP.KEEPCNT):
        served.setsockopt(Level.TCP, option, 1)
    bpf.attach(client, bpf.DROP_ALL)
    served.send(b"unacknowledged")
    states = quiet([served])
    assert (states[0].user_timeout, states[0].keepalive) == (400, True)
    assert served.getsockopt(Level.TCP, TCP.USER_TIMEOUT) == USER_TIMEOUT_MAX
    time.sleep(2.5)
    assert state_of(served) == TcpState.ESTABLISHED
    client.setsockopt(Level.SOCKET, SO.DETACH_FILTER, 0)
    thaw([served], states)
    assert served.getsockopt(Level.TCP, TCP.USER_TIMEOUT) == 400
    assert served.getsockopt(Level.SOCKET, SO.KEEPALIVE) == 1
    served.close()
    client.close()


def test_the_applications_filter_and_mark_come_back_exactly(ends):
    served, _ = ends
    own = ((0x30, 0, 0, 13), (0x15, 0, 1, 4), (6, 0, 0, 0), (6, 0, 0, 0xFFFFFFFF))
    bpf.attach(served, own)
    served.setsockopt(Level.SOCKET, SO.MARK, 77)
    served.setsockopt(Level.SOCKET, SO.REUSEADDR, 1)
    states = quiet([served])
    assert states[0].filter == own
    assert served.getsockopt(Level.SOCKET, SO.MARK) == MARK
    enter_repair([served])
    thaw([served], states)
    assert read_filters([served]) == [own]
    assert served.getsockopt(Level.SOCKET, SO.MARK) == 77
    assert not_in_repair([served]) == [served]
    # leaving repair clears it; thaw knows
    assert served.getsockopt(Level.SOCKET, SO.REUSEADDR) == 1


def test_leaving_repair_clears_reuseaddr(hosts):
    served, client = joined(hosts)
    served.setsockopt(Level.SOCKET, SO.REUSEADDR, 1)
    served.setsockopt(Level.TCP, TCP.REPAIR, 1)
    assert served.getsockopt(Level.SOCKET, SO.REUSEADDR) == 2
    served.setsockopt(Level.TCP, TCP.REPAIR, -1)
    assert served.getsockopt(Level.SOCKET, SO.REUSEADDR) == 0
    served.close()
    client.close()


def test_a_locked_filter_is_left_alone_and_the_ttl_gate_used(hosts, ends):
    served, client = ends
    bpf.attach(served, ACCEPT)
    served.setsockopt(Level.SOCKET, SO.LOCK_FILTER, 1)
    with pytest.raises(PermissionError):
        bpf.attach(served, bpf.DROP_ALL)
    states = quiet([served])
    assert states[0].gate is Gate.TTL
    client.send(b"too far")
    time.sleep(0.1)
    assert ioctl_int(served.fileno(), Ioctl.SIOCINQ) == 0
    thaw([served], states)
    assert read_filters([served]) == [ACCEPT]
    assert served.getsockopt(Level.IP, IP.MINTTL) == 0
    served.settimeout(5)
    assert served.recv(10) == b"too far"


def test_an_ebpf_filter_cannot_be_read_back_and_is_refused_untouched(hosts):
    served, client = joined(hosts)
    served.setsockopt(Level.SOCKET, SO.MARK, 5)
    served.setsockopt(Level.SOCKET, SO.ATTACH_BPF, bpf.drop_program())
    with pytest.raises(ForeignFilter):
        quiet([served])
    assert served.getsockopt(Level.SOCKET, SO.MARK) == 5
    served.close()
    client.close()


def test_one_bad_socket_leaves_all_as_they_were(hosts):
    good = [joined(hosts) for _ in range(3)]
    bad = joined(hosts)
    bad[0].setsockopt(Level.SOCKET, SO.ATTACH_BPF, bpf.drop_program())
    with pytest.raises(ForeignFilter):
        quiet([served for served, _ in good] + [bad[0]])
    for served, client in good:
        assert served.getsockopt(Level.SOCKET, SO.MARK) == 0
        assert read_filters([served]) == [()]
        served.close()
        client.close()


def test_where_no_ebpf_may_be_loaded_the_classic_filter_does_it(hosts, monkeypatch):
    served, client = joined(hosts)
    monkeypatch.setattr(bpf, "drop_program", lambda: None)
    states = quiet([served])
    client.send(b"x")
    time.sleep(0.05)
    assert ioctl_int(served.fileno(), Ioctl.SIOCINQ) == 0
    assert read_filters([served]) == [bpf.DROP_ALL]
    thaw([served], states)
    served.settimeout(5)
    assert served.recv(1) == b"x"


def test_the_owner_gets_errors_while_in_repair(hosts):
    served, client = joined(hosts)
    enter_repair([served])
    with pytest.raises(OSError) as sending:  # noqa: PT011 - the number is checked
        served.send(b"x")
    with pytest.raises(OSError) as receiving:  # noqa: PT011
        served.recv(1, socket.MSG_DONTWAIT)
    assert (sending.value.errno, receiving.value.errno) == (errno.EINVAL, errno.EPERM)
    served.close()
    client.close()


def test_a_listener_refuses_repair(hosts):
    with hosts.a.socket(V4, socket.SOCK_STREAM) as listener:
        listener.listen(1)
        with pytest.raises(ConnectionCallFailed, match="Operation not permitted"):
            enter_repair([listener])


def test_a_taken_descriptor_keeps_a_quiet_connection_silent_when_its_owner_dies(hosts):
    served, client = joined(hosts)
    pid = os.fork()
    if not pid:
        signal.pause()
        os._exit(0)
    mine = take(pid, served.fileno())
    served.close()
    states = quiet([mine])
    with Watcher(hosts.a) as watcher:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        time.sleep(0.2)
        # the fork held other tests' sockets, too
        assert [s for s in watcher.sent() if s.source_port == mine.getsockname()[1]] == []
    thaw([mine], states)
    mine.send(b"still here")
    client.settimeout(5)
    assert client.recv(100) == b"still here"


@pytest.mark.parametrize("family", [V4, V6])
def test_drop_syns_lets_handshakes_complete_and_the_children_are_cleaned(hosts, family):
    listener = hosts.a.socket(family, socket.SOCK_STREAM)
    listener.bind((hosts.a.own(family), 0))
    listener.listen(8)
    bpf.attach(listener, ACCEPT)
    states = drop_syns([listener])
    late = hosts.c.socket(family, socket.SOCK_STREAM)
    late.setblocking(False)
    late.connect_ex(listener.getsockname()[:2])
    time.sleep(0.1)
    with hosts.a:
        assert listener_backlog([listener])[0].empty
    undo_drop_syns([listener], states)
    assert read_filters([listener]) == [ACCEPT]
    early = hosts.c.socket(family, socket.SOCK_STREAM)
    early.connect(listener.getsockname()[:2])
    with hosts.a:
        wait_until(lambda: listener_backlog([listener])[0].accepted >= 1)
    states = drop_syns([listener])
    child, _ = listener.accept()
    early.send(b"passes")
    child.settimeout(2)
    assert child.recv(10) == b"passes"
    # a request that began before inherits what the listener has when it completes
    bpf.attach(child, read_filters([listener])[0])
    assert remove_syn_filter([child]) == 1
    assert read_filters([child]) == [ACCEPT]
    undo_drop_syns([listener], states)
    for sock in (listener, late, early, child):
        sock.close()


def test_a_child_inherits_its_listeners_filter(hosts):
    with hosts.a.socket(V4, socket.SOCK_STREAM) as listener:
        listener.bind((hosts.a.own(V4), 0))
        listener.listen(1)
        bpf.attach(listener, ACCEPT)
        with hosts.c.socket(V4, socket.SOCK_STREAM) as client:
            client.connect(listener.getsockname())
            child, _ = listener.accept()
            assert read_filters([child]) == [ACCEPT]
            child.close()


def test_half_open_requests_are_counted(hosts):
    with hosts.a.socket(V4, socket.SOCK_STREAM) as listener:
        listener.bind((hosts.a.own(V4), 0))
        listener.listen(4)
        with hosts.c.socket(V4, socket.SOCK_STREAM) as client:
            # it never hears the SYN+ACK
            bpf.attach(client, bpf.DROP_ALL)
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
            with hosts.a:
                wait_until(lambda: listener_backlog([listener])[0].half_open == 1)


def test_users_of_the_blackhole_do_not_disturb_each_other(hosts):
    with hosts.b:
        before = {family: route.blackhole_rules(family, MARK) for family in (V4, V6)}
        with blackhole() as outer:
            with blackhole() as inner:
                for family in (V4, V6):
                    rules = route.blackhole_rules(family, MARK)
                    assert {outer.priorities[family], inner.priorities[family]} < set(rules)
                    assert len(rules) == len(before[family]) + 2
            assert outer.priorities[V4] in route.blackhole_rules(V4, MARK)
            inner.remove()
        assert {family: route.blackhole_rules(family, MARK) for family in (V4, V6)} == before


def test_the_listeners_filter_sees_the_segment_from_its_tcp_header_on(hosts):
    # the first 16-bit word is the source port: a filter that drops one port proves the offset
    with hosts.a.socket(V4, socket.SOCK_STREAM) as listener:
        listener.bind((hosts.a.own(V4), 0))
        listener.listen(4)
        with hosts.c.socket(V4, socket.SOCK_STREAM) as client:
            client.bind((hosts.c.own(V4), 0))
            port = client.getsockname()[1]
            bpf.attach(listener, ((0x28, 0, 0, 0), (0x15, 0, 1, port), (6, 0, 0, 0), (6, 0, 0, 0xFFFFFFFF)))
            client.settimeout(0.2)
            with pytest.raises(TimeoutError):
                client.connect(listener.getsockname())


def test_so_get_filter_counts_instructions(hosts):
    served, client = joined(hosts)
    bpf.attach(served, ACCEPT * 3)
    assert struct.pack("HBBI", *ACCEPT[0]) * 3 == bpf.pack(read_filters([served])[0])
    served.close()
    client.close()
