"""Sockets bound to a VRF move to a host whose VRF has another name, and hear what is injected there.

Source: Documentation/networking/vrf.rst.
"""

import contextlib
import socket

import pytest

from tcpstate.capture import Capture, replay
from tcpstate.discard import discard_connections
from tcpstate.export import export_connections, state_of
from tcpstate.freeze import quiet
from tcpstate.kernel.sockets import SO, Ioctl, Level, ioctl_int
from tcpstate.rebuild import differences, rebuild_connections, release_connections
from tcpstate.record import ConnectionRecord, State
from tcpstate.segment import Flag
from tcpstate.silence import Blackhole
from tests.tscnet import PREFIX, SERVICE, Watcher, net, sh, wait_until

OLD, NEW = "red", "blue"
PORT = 7000


@pytest.fixture(scope="module")
def hosts():
    with net() as made:
        for host, name in ((made.a, OLD), (made.b, NEW)):
            run = f"ip -n {host.name}"
            sh(f"{run} link add {name} type vrf table 100 && {run} link set {name} up")
            sh(f"{run} link set eth0 master {name}")
            # which went with the change of its table
            sh(f"{run} addr replace {host.own(socket.AF_INET6)}/64 dev eth0 nodad")
            with host:
                Blackhole().ensure()
        yield made


def place(host, family, word):
    nodad = " nodad" * (family == socket.AF_INET6 and word == "add")
    sh(f"ip -n {host.name} addr {word} {SERVICE[family]}/{PREFIX[family]} dev eth0{nodad}")


@pytest.mark.parametrize("state", [State.ESTABLISHED, State.CLOSE_WAIT], ids=lambda s: s.name)
@pytest.mark.parametrize(
    ("family", "mapped"), [(socket.AF_INET, False), (socket.AF_INET6, False), (socket.AF_INET, True)],
    ids=["IPv4", "IPv6", "mapped"],
)  # fmt: skip
def test_it_moves_to_another_vrf_and_hears_what_is_injected(hosts, family, mapped, state):
    a, b, c = hosts.hosts
    kind = socket.AF_INET6 if mapped else family
    with contextlib.ExitStack() as ends, Watcher(c, keep=lambda s: s.flags & Flag.RST) as watcher:
        place(a, family, "add")
        leave = ends.enter_context(contextlib.ExitStack())
        leave.callback(place, a, family, "del")
        with a.socket(kind, socket.SOCK_STREAM) as listener:
            listener.setsockopt(Level.SOCKET, SO.REUSEADDR, 1)
            listener.setsockopt(Level.SOCKET, SO.BINDTODEVICE, OLD.encode())
            listener.bind(("::ffff:" * mapped + SERVICE[family], PORT))
            listener.listen()
            client = hosts.c.socket(family, socket.SOCK_STREAM)
            ends.callback(client.close)
            client.settimeout(30)
            c.sh("ip neigh flush dev eth0", check=False)
            wait_until(lambda: client.connect_ex((SERVICE[family], PORT)) in (0, 106), 30)
            served, _ = listener.accept()
        client.sendall(b"before")
        wait_until(lambda: ioctl_int(served.fileno(), Ioctl.SIOCINQ) == 6, 30)
        if state is State.CLOSE_WAIT:
            client.shutdown(socket.SHUT_WR)
            wait_until(lambda: state_of(served) is state, 30)
        with a:
            here = ends.enter_context(Capture(ports={PORT}))
            (record,) = export_connections([served], quiet([served]))
        arrived = []
        if state is State.ESTABLISHED:
            client.sendall(b" and in the freeze")

            def captured():
                arrived.extend(here.segments())
                return any(s.payload for s in arrived)

            wait_until(captured, 30)
        assert record.device == OLD
        record = ConnectionRecord.from_bytes(record.to_bytes()).on_devices({OLD: NEW})
        with b:
            (moved,) = rebuild_connections([record])
            ends.callback(moved.close)
            assert differences([moved], [record]) == []
        leave.close()
        place(b, family, "add")
        leave.callback(place, b, family, "del")
        # so that it is not the peer's retransmission that comes
        sh(f"ip -n {hosts.bridge.name} link set p3 nomaster")
        try:
            with b:
                release_connections([moved], [record])
                replay(arrived, [record])
                assert state_of(moved) is state
                whole = b"before" + b" and in the freeze" * (state is State.ESTABLISHED)
                wait_until(lambda: ioctl_int(moved.fileno(), Ioctl.SIOCINQ) == len(whole), 30)
        finally:
            sh(f"ip -n {hosts.bridge.name} link set p3 master br0")
        discard_connections([served])
        b.sh("ip neigh flush dev eth0", check=False)
        c.sh("ip neigh flush dev eth0", check=False)
        moved.settimeout(30)
        assert moved.recv(99) == whole
        moved.sendall(b"answer")
        assert client.recv(99) == b"answer"
        assert moved.getsockopt(Level.SOCKET, SO.BINDTODEVICE, 16).rstrip(b"\0").decode() == NEW
        assert watcher.resets() == []
