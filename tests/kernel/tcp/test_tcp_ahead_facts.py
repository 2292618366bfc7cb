"""What building connections before the stop relies on: each thing that can happen to one shows, and a gate is shut."""

import contextlib
import dataclasses
import fcntl
import os
import signal
import socket
import struct
import time

import pytest

from checkpoint.kernel import filetable
from tcpstate import options
from tcpstate.export import export_connections
from tcpstate.freeze import quiet, thaw
from tcpstate.kernel.bpf import classic
from tcpstate.kernel.bpf.census import census
from tcpstate.kernel.bpf.gate import Gate
from tcpstate.kernel.bpf.recount import Recount, Same
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import TCP
from tcpstate.md5keys import SigningKey, give_keys, supported
from tcpstate.options import VOLATILE, Format, Stage, Where
from tcpstate.rows import conn_id_of
from tcpstate.silence import blackhole
from tcpstate.standing import cookies, idle, read_standing, unchanged
from tests.tscnet import net, pair, wait_until

V4, V6 = socket.AF_INET, socket.AF_INET6
#: BPF_RET with 0
NOTHING_COMES_IN = (6, 0, 0, 0)
QUIET = 0.3


@pytest.fixture(scope="module")
def hosts():
    with net() as made:
        yield made


@pytest.fixture(params=["IPv4", "IPv6", "mapped"])
def ends(request, hosts):
    made = pair(
        hosts.a, hosts.c, V6 if request.param == "IPv6" else V4, service=False, port=0, mapped=request.param == "mapped"
    )
    # what the handshake left behind is over
    time.sleep(0.1)
    yield made
    for sock in made:
        sock.close()


def census_of(sock):
    (cookie,) = cookies([sock])
    return census().take()[cookie]


def attempt(call):
    try:
        return call()
    except OSError:
        return None


def other_values(option, now):
    """Values that the option may take, other than it has."""
    if option.format is Format.BYTES:
        extension = b"\0\0\x01\x04" + bytes(4)
        return {"ip.options": [b"\x01" * 4], "so.bindtodevice": [b"eth0"]}.get(option.keyword, [extension])
    numbers = struct.unpack_from(f"={len(now) // 4}I", now) if len(now) >= 4 else ()
    found = []
    for step in (1, 2, 4, 8, 100, 1000, 70_000):
        found.append(
            struct.pack(f"={len(numbers)}I", *((n + step if i == 0 else n) & 0x7FFFFFFF for i, n in enumerate(numbers)))
        )
        found.append(struct.pack(f"={len(numbers)}I", *((n + step) & 0x7FFFFFFF for n in numbers)))
        found.append(struct.pack(f"={len(numbers)}I", *(step for _ in numbers)))
    # IP_LOCAL_PORT_RANGE: low and high in one number
    return [*found, bytes(len(now)), struct.pack("=I", 30_000 | 40_000 << 16)[: len(now)]]


#: what cannot be set to anything else here
FIXED = {
    "so.debug": "", "so.reserve_mem": "takes a memory cgroup that counts sockets' memory", "so.wifi_status": "",
    "so.prefer_busy_poll": "", "ipv6.v6only": "only before bind", "so.bindtodevice": "", "tcp.quickack": "",
    "ipv6.rthdr": "taken of type 2 only, with Mobile IPv6; it lies beside the other extension headers",
}  # fmt: skip


@pytest.fixture(scope="module")
def optioned(hosts):
    made = {family: pair(hosts.a, hosts.c, family, service=False, port=0) for family in (V4, V6)}
    yield {family: served for family, (served, _) in made.items()}
    for both in made.values():
        for sock in both:
            sock.close()


@pytest.mark.parametrize("option", options.TABLE, ids=lambda o: o.keyword)
def test_an_option_that_is_set_shows_in_the_census(hosts, optioned, option):
    """On a younger kernel this names the options whose members the census lacks. That nobody has set one is told of
    connections that have had traffic, too: among what traffic changes none may live but those that are read again."""
    served = optioned[V6 if option.where is Where.IPV6 else V4]
    now = attempt(lambda: served.getsockopt(option.level, option.number, option.size))
    if now is None:
        # this kernel has no such option
        assert (
            option.format is Format.BYTES or attempt(lambda: served.setsockopt(option.level, option.number, 1)) is None
        )
        return
    with hosts.a, contextlib.ExitStack() as stack:
        before = census_of(served)
        counted = stack.enter_context(contextlib.closing(Recount(cookies([served]), [before])))
        assert counted.take()[:2] == (bytes([Same.WHOLLY]), False)
        for value in other_values(option, now):
            attempt(lambda value=value: served.setsockopt(option.level, option.number, value))
            if served.getsockopt(option.level, option.number, option.size) != now:
                assert census_of(served) != before
                (same,) = counted.take().same
                assert same != Same.WHOLLY
                assert same == Same.NOT or option.keyword in VOLATILE
                return
    assert option.keyword in FIXED or option.stage is Stage.BEFORE_CONNECT or option.keyword in VOLATILE


@pytest.mark.parametrize("size", [SO.SNDBUF, SO.RCVBUF])
def test_a_buffer_size_shows(hosts, ends, size):
    served, _ = ends
    with hosts.a:
        before = census_of(served)
        served.setsockopt(Level.SOCKET, size, 20_000)
        assert census_of(served) != before


def test_the_congestion_control_shows(hosts, ends):
    served, _ = ends
    with hosts.a:
        before = census_of(served)
        name = served.getsockopt(Level.TCP, TCP.CONGESTION, 16).rstrip(b"\0")
        served.setsockopt(Level.TCP, TCP.CONGESTION, b"reno" if name != b"reno" else b"cubic")
        assert census_of(served) != before


def test_a_connection_at_rest_has_the_same_census_for_ever(hosts, ends):
    served, client = ends
    client.send(b"something")
    wait_until(lambda: served.recv(9) == b"something")
    served.send(b"else")
    assert client.recv(4) == b"else"
    time.sleep(0.5)
    with hosts.a:
        before = census_of(served)
        assert idle(census().numbers(before))
        time.sleep(1.0)
        assert census_of(served) == before


def test_whatever_comes_or_goes_shows(hosts, ends):
    served, client = ends
    (cookie,) = cookies([served])

    def told():
        return census().take().get(cookie)

    with hosts.a:
        seen = [told()]
        for act in (
            lambda: client.send(b"a"),
            lambda: served.recv(1),
            lambda: served.send(b"b"),
            lambda: client.shutdown(socket.SHUT_WR),
        ):
            act()
            wait_until(lambda: told() != seen[-1])
            seen.append(told())
    # the peer's FIN: not established any more, so not in it
    assert seen[-1] is None
    assert len(set(seen)) == len(seen)


def test_corked_data_shows_and_is_no_rest(hosts, ends):
    served, _ = ends
    with hosts.a:
        before = census_of(served)
        served.setsockopt(Level.TCP, TCP.CORK, 1)
        corked = census_of(served)
        assert corked != before
        assert not idle(census().numbers(corked))
        served.send(b"held back")
        assert not idle(census().numbers(census_of(served)))


@pytest.fixture
def counted(hosts, ends):
    """Both are told of what was there a moment ago: the connection's census, and itself."""
    served, _ = ends
    with hosts.a:
        other, beside = pair(hosts.a, hosts.c, V4, service=False, port=0)
        time.sleep(0.1)
        named = cookies([other, served])
        now = census().take()
        with contextlib.closing(Recount(named, [now[cookie] for cookie in named])) as made:
            yield made
    for sock in (other, beside):
        sock.close()


def test_it_shows_whether_a_fin_is_not_acknowledged(hosts, counted):
    """In the states in which there may be segments under way of what was closed, and in no other."""
    closing, beside = pair(hosts.a, hosts.c, V4, service=False, port=0)
    try:
        assert not counted.take().closes
        classic.attach(beside, (NOTHING_COMES_IN,))
        closing.shutdown(socket.SHUT_WR)
        assert counted.take().closes
        beside.setsockopt(Level.SOCKET, SO.DETACH_FILTER, 0)
        wait_until(lambda: not counted.take().closes)
    finally:
        closing.close()
        beside.close()


def test_the_kernel_itself_tells_what_has_changed(ends, counted):
    served, client = ends
    same = bytes([Same.WHOLLY, Same.WHOLLY])
    assert counted.take()[:2] == (same, False)
    assert counted.take()[:2] == (same, False)
    other = bytes([Same.WHOLLY, Same.BUT_FOR_TRAFFIC])
    client.send(b"a")
    wait_until(lambda: served.recv(1, socket.MSG_PEEK) == b"a")
    assert counted.take()[:2] == (other, False)
    served.recv(1)
    assert counted.take()[:2] == (other, False)
    served.send(b"answer" * 1000)
    client.recv(9999)
    assert counted.take()[:2] == (other, False)
    served.setsockopt(Level.TCP, TCP.NODELAY, 1)
    assert counted.take()[:2] == (bytes([Same.WHOLLY, Same.NOT]), False)


@pytest.mark.parametrize(
    "change",
    [
        lambda served, client: served.setsockopt(Level.TCP, TCP.NODELAY, 1),
        lambda served, client: (client.send(b"a"), served.setsockopt(Level.SOCKET, SO.MARK, 5)),
        lambda served, client: served.setsockopt(Level.SOCKET, SO.RCVBUF, 20_000),
        lambda served, client: served.setsockopt(Level.TCP, TCP.CORK, 1),
        lambda served, client: served.shutdown(socket.SHUT_WR),
        lambda served, client: client.shutdown(socket.SHUT_WR),
        lambda served, client: served.close(),
    ],
    ids=["option", "option and traffic", "buffer", "corked", "its FIN", "the peer's FIN", "closed"],
)
def test_whatever_is_done_to_one_is_told_of_it_alone(ends, counted, change):
    change(*ends)
    wait_until(lambda: counted.take()[:2] == (bytes([Same.WHOLLY, Same.NOT]), False))


def test_the_kernel_tells_as_well_whether_anybody_signs(hosts, counted):
    with hosts.a, socket.socket() as listener:
        assert counted.take()[:2] == (bytes([1, 1]), False)
        if not supported():
            return
        give_keys(listener, [SigningKey(address="10.9.8.7", prefix=32, secret=b"secret")], "listener")
        listener.bind(("", 0))
        listener.listen()
        assert counted.take()[:2] == (bytes([1, 1]), True)


def test_a_gate_notes_what_passes_and_lets_it_through(hosts, ends):
    served, client = ends
    other, beside = pair(hosts.a, hosts.c, V4, service=False, port=0)
    names = [conn_id_of(other), conn_id_of(served)]
    with hosts.a, contextlib.closing(Gate(names)) as gate:
        client.send(b"1")
        wait_until(lambda: heard(served) == b"1")
        time.sleep(0.1)  # its ACK is out
        # nobody asked for it
        assert gate.seen() == bytes([0, 0])
        gate.note()
        assert gate.seen() == bytes([0, 0])
        client.send(b"2")
        wait_until(lambda: heard(served) == b"2")
        assert gate.seen() == bytes([0, 1])
        other.send(b"3")
        wait_until(lambda: heard(beside) == b"3")
        assert gate.seen() == bytes([1, 1])
        gate.shut()
        assert gate.seen() == bytes([1, 1])
    for sock in (other, beside):
        sock.close()


def test_what_a_gate_cannot_look_into_is_told(hosts, ends):
    served, _ = ends
    with hosts.a, contextlib.closing(Gate([conn_id_of(served)])) as gate:
        gate.note()
        assert gate.seen() == bytes([0])
        # ESP: whatever is in it
        with socket.socket(V4, socket.SOCK_RAW, 50) as raw:
            raw.sendto(bytes(40), (hosts.c.own(V4), 0))
        wait_until(lambda: gate.seen() is None)


def test_a_keepalive_probe_shows(hosts, ends):
    served, _ = ends
    served.setsockopt(Level.SOCKET, SO.KEEPALIVE, 1)
    for option in (TCP.KEEPIDLE, TCP.KEEPINTVL):
        served.setsockopt(Level.TCP, option, 1)
    with hosts.a:
        before = census_of(served)
        wait_until(lambda: census_of(served) != before, 5)


def test_an_idle_connection_is_read_as_it_would_be_exported(hosts, ends):
    served, client = ends
    for count in range(1, 6):
        client.send(b"z" * 1000 * count)
        wait_until(lambda count=count: len(served.recv(1 << 16, socket.MSG_PEEK)) == 1000 * count)
        served.recv(1 << 16)
        served.send(b"q" * 77)
        client.recv(1 << 16)
    served.setsockopt(Level.SOCKET, SO.KEEPALIVE, 1)
    served.setsockopt(Level.TCP, TCP.USER_TIMEOUT, 30_000)
    time.sleep(0.5)
    with hosts.a, blackhole():
        before = census().take()
        (one,) = unchanged(read_standing([served], before), before)
        states = quiet([served])
        (exported,) = export_connections([served], states)
        thaw([served], states)
    assert one is not None
    assert one.state == states[0]
    assert dataclasses.replace(one.record, timestamps=exported.timestamps) == exported
    assert one.record.timestamps is not None
    assert exported.timestamps is not None
    # both clocks are told a little late
    assert (exported.timestamps.value - one.record.timestamps.value + 1000) & 0xFFFFFFFF < 60_000


def test_a_connection_with_something_to_read_is_not_told(hosts, ends):
    served, client = ends
    client.send(b"unread")
    wait_until(lambda: served.recv(6, socket.MSG_PEEK) == b"unread")
    with hosts.a:
        before = census().take()
        assert unchanged(read_standing([served], before), before) == [None]


def heard(sock):
    try:
        return sock.recv(100, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""


def test_a_shut_gate_lets_nothing_through_and_nobody_else_notices(hosts, ends):
    served, client = ends
    other, beside = pair(hosts.a, hosts.c, V4, service=False, port=0)
    conn = conn_id_of(served)
    with hosts.a, contextlib.closing(Gate([conn])) as gate:
        client.send(b"1")
        wait_until(lambda: heard(served) == b"1")
        gate.shut()
        client.send(b"2")
        served.send(b"3")
        beside.send(b"4")
        wait_until(lambda: heard(other) == b"4")
        time.sleep(QUIET)
        assert (heard(served), heard(client)) == (b"", b"")
        gate.open()
        wait_until(lambda: heard(served) == b"2", 5)
        wait_until(lambda: heard(client) == b"3", 5)
    for sock in (other, beside):
        sock.close()


def test_the_gate_goes_with_its_owner(hosts, ends):
    served, client = ends
    conn = conn_id_of(served)
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with hosts.a:
            Gate([conn]).shut()
            os.write(told, b"!")
            signal.pause()
    os.read(ready, 1)
    client.send(b"held")
    time.sleep(QUIET)
    assert heard(served) == b""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_until(lambda: heard(served) == b"held", 5)
    os.close(ready)
    os.close(told)


def row_of(fd):
    return next(raw for raw in filetable.read(os.getpid()) if int.from_bytes(raw[:4], "little") == fd)


def test_a_descriptor_s_row_is_the_same_until_it_is_changed(hosts, ends):
    served, client = ends
    with hosts.a:
        census().take()
    fd = served.fileno()
    first = row_of(fd)
    assert row_of(fd) == first
    (row,) = filetable.rows([first])
    assert row.cookie == cookies([served])[0]
    assert (row.cloexec, row.owner, row.locks) == (True, 0, 0)
    seen = {first}
    for change in (
        lambda: os.set_inheritable(fd, True),
        lambda: os.set_blocking(fd, not os.get_blocking(fd)),
        lambda: fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid()),
        lambda: fcntl.flock(fd, fcntl.LOCK_EX),
        lambda: os.dup2(client.fileno(), fd),
    ):
        change()
        assert row_of(fd) not in seen
        seen.add(row_of(fd))


def test_a_socket_that_nobody_asked_for_its_cookie_has_none_in_its_row():
    with socket.socket() as fresh:
        (row,) = filetable.rows([row_of(fresh.fileno())])
        assert row.cookie == 0


def test_of_a_process_that_has_ended_there_are_no_rows():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert filetable.read(child) == []
