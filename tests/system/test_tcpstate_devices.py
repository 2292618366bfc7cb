"""Sockets bound to an interface, and link-local ones, move to a host where the interface has another name."""

import contextlib
import dataclasses
import socket

import pytest

from tcpstate.capture import Capture, replay
from tcpstate.discard import discard_connections
from tcpstate.export import export_connections, state_of
from tcpstate.freeze import Blackhole, quiet
from tcpstate.kernel.sockets import SO, Ioctl, Level, ioctl_int
from tcpstate.rebuild import differences, rebuild_connections
from tcpstate.record import ConnectionRecord, State
from tcpstate.release import release_connections
from tcpstate.segment import Flag, Segment
from tests.cells import FAMILIES
from tests.tscnet import Watcher, net, sh, until_local, wait_until

LINK_LOCAL = "fe80::100"
#: what the moved end is called at the source and at the target
OLD, NEW = "eth0", "lan0"


@pytest.fixture(scope="module")
def hosts():
    with net() as made:
        b = made.b.name
        sh(f"ip -n {b} link set {OLD} down && ip -n {b} link set {OLD} name {NEW} && ip -n {b} link set {NEW} up")
        made.b.sh(f"sysctl -qw net.ipv6.conf.{NEW}.accept_dad=0")
        # which went with the interface
        sh(f"ip -n {b} addr add {made.b.own(socket.AF_INET6)}/64 dev {NEW} nodad")
        for host in (made.a, made.b):
            with host:
                Blackhole().ensure()
        yield made


def service(kind):
    return LINK_LOCAL if kind == "link-local" else "fd77::100" if kind == "ipv6" else "10.77.0.100"


def place(host, device, kind, word):
    address, length = service(kind), 24 if "." in service(kind) else 64
    sh(f"ip -n {host.name} addr {word} {address}/{length} dev {device}" + " nodad" * (length == 64 and word == "add"))
    if word == "add":
        until_local(host.name, address, device)


@contextlib.contextmanager
def away(hosts, number):
    """The host with this number hears nothing and is not heard."""
    sh(f"ip -n {hosts.bridge.name} link set p{number} nomaster")
    try:
        yield
    finally:
        sh(f"ip -n {hosts.bridge.name} link set p{number} master br0")


def connected(hosts, kind, port):
    """(socket on a, bound to its interface unless it is link-local; the client's on c)."""
    if kind == "link-local":
        family, mapped = socket.AF_INET6, False
    else:
        family, mapped = FAMILIES[kind]
    with hosts.a.socket(socket.AF_INET6 if mapped else family, socket.SOCK_STREAM) as listener:
        if kind != "link-local":
            listener.setsockopt(Level.SOCKET, SO.BINDTODEVICE, OLD.encode())
        name = service(kind)
        if kind == "link-local":
            with hosts.a:
                listener.bind((name, port, 0, socket.if_nametoindex(OLD)))
        else:
            listener.bind((f"::ffff:{name}" if mapped else name, port))
        listener.listen()
        client = hosts.c.socket(family, socket.SOCK_STREAM)
        with hosts.c:
            scope = (0, socket.if_nametoindex("eth0")) if kind == "link-local" else ()
        client.settimeout(10)
        hosts.c.sh("ip neigh flush dev eth0", check=False)
        wait_until(lambda: client.connect_ex((name, port, *scope)) in (0, 106))
        return listener.accept()[0], client


@pytest.mark.parametrize("state", [State.ESTABLISHED, State.CLOSE_WAIT], ids=lambda s: s.name)
@pytest.mark.parametrize("kind", [*FAMILIES, "link-local"])
def test_it_moves_and_hears_what_is_injected(hosts, kind, state):
    a, b, c = hosts.hosts
    port = 7000 + [*FAMILIES, "link-local"].index(kind) * 2 + (state is State.CLOSE_WAIT)
    with contextlib.ExitStack() as ends, Watcher(c, keep=lambda s: s.flags & Flag.RST) as watcher:
        place(a, OLD, kind, "add")
        leave = ends.enter_context(contextlib.ExitStack())
        leave.callback(place, a, OLD, kind, "del")
        served, client = connected(hosts, kind, port)
        ends.callback(client.close)
        client.sendall(b"before")
        wait_until(lambda: ioctl_int(served.fileno(), Ioctl.SIOCINQ) == 6)
        if state is State.CLOSE_WAIT:
            client.shutdown(socket.SHUT_WR)
            wait_until(lambda: state_of(served) is state)
        with a:
            here = ends.enter_context(Capture(ports={port}))
            (record,) = export_connections([served], quiet([served]))
        arrived = []
        if state is State.ESTABLISHED:
            client.sendall(b" and in the freeze")

            def captured():
                arrived.extend(here.segments())
                return any(s.payload for s in arrived)

            wait_until(captured)
        record = ConnectionRecord.from_bytes(record.to_bytes()).on_devices({OLD: NEW})
        # a link-local socket is bound to its interface as well
        assert (record.device, record.scope) == (NEW, NEW if kind == "link-local" else "")
        with b:
            (moved,) = rebuild_connections([record])
            ends.callback(moved.close)
            assert differences([moved], [record]) == []
        leave.close()
        place(b, NEW, kind, "add")
        leave.callback(place, b, NEW, kind, "del")
        # so that it is not the peer's retransmission that comes
        with away(hosts, 3), b:
            release_connections([moved], [record])
            replay(arrived, [record])
            assert state_of(moved) is state
            whole = b"before" + b" and in the freeze" * (state is State.ESTABLISHED)
            wait_until(lambda: ioctl_int(moved.fileno(), Ioctl.SIOCINQ) == len(whole))
        discard_connections([served])
        b.sh(f"ip neigh flush dev {NEW}", check=False)
        c.sh("ip neigh flush dev eth0", check=False)
        moved.settimeout(20)
        client.settimeout(20)
        assert moved.recv(99) == whole
        moved.sendall(b"answer")
        assert client.recv(99) == b"answer"
        bound = moved.getsockopt(Level.SOCKET, SO.BINDTODEVICE, 16).rstrip(b"\0").decode()
        assert bound == record.device
        assert watcher.resets() == []


@pytest.mark.parametrize("kind", [*FAMILIES, "link-local"])
def test_a_captured_syn_reaches_a_listener_on_an_interface(hosts, kind):
    """What holds off connections to a listener is undone by injecting their SYNs."""
    b, c = hosts.b, hosts.c
    # one each: half-open connections outlive a closed listener until their timer looks (a second)
    port = 7100 + [*FAMILIES, "link-local"].index(kind)
    family, mapped = FAMILIES.get(kind, (socket.AF_INET6, False))
    with contextlib.ExitStack() as ends, Watcher(c, keep=lambda s: s.flags & Flag.RST) as watcher:
        place(b, NEW, kind, "add")
        ends.callback(place, b, NEW, kind, "del")
        listener = ends.enter_context(b.socket(socket.AF_INET6 if mapped else family, socket.SOCK_STREAM))
        listener.setsockopt(Level.SOCKET, SO.BINDTODEVICE, NEW.encode())
        with b:
            name = (service(kind), port, 0, socket.if_nametoindex(NEW)) if kind == "link-local" else None
            listener.bind(name or (("::ffff:" if mapped else "") + service(kind), port))
        listener.listen()
        peer = {"link-local": "fe80::9", "ipv6": "fd77::3"}.get(kind, "10.77.0.3")
        syn = Segment(
            source=peer,
            source_port=4321,
            destination=service(kind),
            destination_port=port,
            seq=1,
            ack=0,
            flags=Flag.SYN,
            window=1000,
        )
        with b, away(hosts, 3):
            assert replay([syn, dataclasses.replace(syn, source_port=4322)], []) == 2
            wait_until(lambda: b.sh(f"ss -Htan state syn-recv sport = {port}").count(str(port)) == 2)
        assert watcher.resets() == []
