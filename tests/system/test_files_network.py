"""UDP sockets, TCP listeners and TCP connections: captured, rebuilt, released, used; in a network of their own."""

from __future__ import annotations

import ctypes
import os
import re
import select
import socket
import subprocess
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from checkpoint.errors import AddressTaken
from checkpoint.files.rebuild import Rebuilder
from checkpoint.files.udp import UdpFile
from tests.system.files_children import capture, children, round_trip
from tests.system.files_essence import captured, same

CLONE_NEWNET = 0x40000000


def in_own_network(test: Callable[..., None], *args: Any) -> None:
    """Run ``test`` in a child with a network namespace where only the loopback device is, with 10.9.9.1 on it."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read_end)
            assert ctypes.CDLL(None).unshare(CLONE_NEWNET) == 0
            for command in (
                "ip link set lo up",
                "ip address add 10.9.9.1/32 dev lo",
                "ip address add fd09::1/128 dev lo nodad",
            ):
                subprocess.run(command.split(), check=True)
            test(*args)
            status = 0
        except BaseException:
            os.write(write_end, traceback.format_exc().encode()[-60000:])
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end) as file:
        problem = file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, problem


def test_udp_bound_connected_options_and_queue() -> None:
    in_own_network(_udp, "AF_INET", "10.9.9.1", "127.0.0.1")
    in_own_network(_udp, "AF_INET6", "fd09::1", "::1")


def _udp(family: str, local: str, other: str) -> None:
    same(
        f"""
u = socket.socket(socket.{family}, socket.SOCK_DGRAM); u.setsockopt(1, 8, 400000); u.bind(({local!r}, 5353))
c = socket.socket(socket.{family}, socket.SOCK_DGRAM); c.bind(({other!r}, 6000)); c.connect(({local!r}, 5353))
u.setsockopt(0, 1, 0x10); u.setsockopt(1, 9, 1); u.setblocking(False)
for part in (b'first', b'', b'x' * 60000): c.send(part)
wild = socket.socket(socket.{family}, socket.SOCK_DGRAM); wild.setsockopt(1, 2, 1); wild.bind(('', 7000))
c2 = socket.socket(socket.{family}, socket.SOCK_DGRAM); c2.bind(({other!r}, 6001)); c2.sendto(b'any', ({local!r}, 7000))
u.sendto(b'reply', ({other!r}, 6000))
keep.update(u=u.detach(), c=c.detach(), w=wild.detach(), c2=c2.detach())
""",
        f"""
u, c, w, c2 = (socket.socket(fileno=keep[k]) for k in ('u', 'c', 'w', 'c2'))
for part in (b'first', b'', b'x' * 60000):
    data, sender = u.recvfrom(1 << 16); assert data == part and sender[:2] == ({other!r}, 6000), (data[:9], sender)
w.settimeout(2); c.settimeout(2)
data, sender = w.recvfrom(99); assert data == b'any' and sender[:2] == ({other!r}, 6001)
assert c.recv(99) == b'reply' and c.getpeername()[:2] == ({local!r}, 5353)
c.send(b'new'); u.settimeout(2); assert u.recv(99) == b'new'
assert u.getsockopt(0, 1) == 0x10 and u.getsockopt(1, 8) == 800000 and w.getsockopt(1, 2) == 1
""",
    )


def test_udp_multicast_membership() -> None:
    in_own_network(_multicast)


def _multicast() -> None:
    subprocess.run(["ip", "link", "set", "lo", "multicast", "on"], check=True)
    same(
        """
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('', 5353))
u.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton('239.1.2.3') + socket.inet_aton('127.0.0.1'))
keep['u'] = u.detach()
""",
        """
u = socket.socket(fileno=keep['u']); u.settimeout(2)
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton('127.0.0.1'))
s.sendto(b'group', ('239.1.2.3', 5353)); assert u.recv(99) == b'group'
""",
    )


def test_udp_socket_whose_address_is_not_here_yet() -> None:
    in_own_network(_udp_early)


def _udp_early() -> None:
    with children(1) as (source,):
        source.bare()
        source.do(
            """
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('10.9.9.1', 5353))
c = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); c.bind(('10.9.9.1', 6000)); c.connect(('10.9.9.1', 5353))
c.send(b'waiting')
h = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); h.bind(('0.0.0.0', 7000)); h.connect(('10.9.9.1', 9))
h.sendto(b'half', socket.MSG_MORE, ('10.9.9.1', 5353))
"""
        )
        source.stop()
        table, records = capture(source.pid)
        delta = table.recapture()
        table.close()
    subprocess.run(["ip", "address", "del", "10.9.9.1/32", "dev", "lo"], check=True)
    rebuilder = Rebuilder(records)
    rebuilder.rebuild()
    subprocess.run(["ip", "address", "add", "10.9.9.1/32", "dev", "lo"], check=True)
    (index,) = [i for i, f in delta.items() if isinstance(f, UdpFile) and f.queue]
    sock = socket.socket(fileno=os.dup(rebuilder.descriptor(index)))
    sock.settimeout(2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as early:
        early.sendto(b"too early", ("10.9.9.1", 5353))
    rebuilder.take(delta)
    rebuilder.complete()
    rebuilder.release()
    assert sock.recvfrom(99) == (b"waiting", ("10.9.9.1", 6000))
    ((index, begun),) = [(i, f) for i, f in delta.items() if isinstance(f, UdpFile) and f.corked]
    # a release that was cut short is done again
    begun.release(rebuilder, rebuilder.descriptor(index))
    with socket.socket(fileno=os.dup(rebuilder.descriptor(index))) as half:
        assert not select.select([sock], [], [], 0)[0]
        half.sendto(b", whole", ("10.9.9.1", 5353))
    assert sock.recvfrom(99) == (b"half, whole", ("10.9.9.1", 7000))
    assert not select.select([sock], [], [], 0)[0]
    assert sock.getsockopt(0, 19) == 0  # IP_TRANSPARENT was borrowed
    sock.close()
    rebuilder.close()


def test_tcp_listeners_options_backlog_and_silence_until_release() -> None:
    in_own_network(_listeners)


def _listeners() -> None:
    same(
        """
l = socket.socket(); l.setsockopt(1, 2, 1); l.setsockopt(6, 9, 5); l.bind(('10.9.9.1', 80)); l.listen(77)
l.setsockopt(6, 13, b'reno')
six = socket.socket(socket.AF_INET6); six.setsockopt(41, 26, 1); six.bind(('::', 81)); six.listen(5)
group = []
for _ in range(2):
    g = socket.socket(); g.setsockopt(1, 15, 1); g.bind(('0.0.0.0', 82)); g.listen(9); group.append(g.detach())
dual = socket.socket(socket.AF_INET6); dual.setsockopt(41, 26, 0); dual.bind(('::', 83)); dual.listen(5)
keep.update(l=l.detach(), six=six.detach(), group=group, dual=dual.detach())
""",
        """
l, six, dual = (socket.socket(fileno=keep[k]) for k in ('l', 'six', 'dual'))
info = l.getsockopt(6, 11, 280); assert struct.unpack_from('<I', info, 8 + 4 * 5)[0] == 77
assert l.getsockopt(6, 9) == 7 and l.getsockopt(6, 13, 16).rstrip(b'\\0') == b'reno' and l.getsockopt(1, 2) == 1
for sock, address, family in ((l, ('10.9.9.1', 80), 2), (six, ('::1', 81), 10), (dual, ('127.0.0.1', 83), 2)):
    sock.settimeout(3); c = socket.socket(family); c.settimeout(3); c.connect(address); c.send(b'x')
    s, _ = sock.accept(); assert s.recv(9) == b'x'
""",
    )


def test_tcp_address_in_use_is_told() -> None:
    in_own_network(_in_use)


def _in_use() -> None:
    with children(1) as (source,):
        source.bare()
        source.do("l = socket.socket(); l.bind(('10.9.9.1', 80)); l.listen(7)")
        source.stop()
        records = captured(source.pid)
    rebuilder = Rebuilder(records)
    assert rebuilder.check() == []
    with socket.socket() as other:
        other.bind(("0.0.0.0", 80))
        other.listen()
        with pytest.raises(AddressTaken, match=re.escape("10.9.9.1:80")):
            rebuilder.check()
        with pytest.raises(AddressTaken, match=re.escape("10.9.9.1:80")):
            rebuilder.rebuild()


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])
def test_tcp_connection_with_both_ends_in_the_tree(family: str) -> None:
    in_own_network(_connection, family, "10.9.9.1" if family == "AF_INET" else "fd09::1")


def _connection(family: str, address: str) -> None:
    outcome = round_trip(
        f"""
l = socket.socket(socket.{family}); l.setsockopt(1, 2, 1); l.bind(({address!r}, 9000)); l.listen(7)
a = socket.socket(socket.{family}); a.connect(({address!r}, 9000)); b, _ = l.accept()
a.setsockopt(6, 1, 1); b.setsockopt(1, 9, 1)
data = os.urandom(60000); keep['data'] = data
b.setblocking(False); sent = b.send(data); a.send(b'request'); keep['sent'] = sent
closed = socket.socket(socket.{family}); closed.bind(({address!r}, 9001))
e = select.epoll(); e.register(b, select.EPOLLIN | select.EPOLLET); e.register(a, select.EPOLLIN); e.poll(0)
keep.update(l=l.detach(), a=a.detach(), b=b.detach(), c=closed.detach(), e=e.fileno())
""",
        f"""
l, a, b, c = (socket.socket(fileno=keep[k]) for k in 'labc')
e = select.epoll.fromfd(keep['e'])
assert dict(e.poll(1)).keys() == {{a.fileno(), b.fileno()}}
a.settimeout(3); assert b.recv(99) == b'request'
got = b''
while len(got) < keep['sent']: got += a.recv(1 << 20)
assert got == keep['data'][:keep['sent']]
b.settimeout(3); b.sendall(b'more'); assert a.recv(9) == b'more'
assert a.getsockopt(6, 1) == 1 and b.getsockopt(1, 9) == 1 and l.getsockopt(1, 2) == 1
assert a.getpeername()[:2] == b.getsockname()[:2] == ({address!r}, 9000)
n = socket.socket(socket.{family}); n.settimeout(3); n.connect(({address!r}, 9000)); l.settimeout(3); l.accept()
c.listen(3); n = socket.socket(socket.{family}); n.settimeout(3); n.connect(({address!r}, 9001))
a.shutdown(1); assert b.recv(9) == b''
""",
        network=True,
    )
    assert outcome.warnings == []


def test_tcp_group_freezes_and_gives_back() -> None:
    in_own_network(_thaw)


def _thaw() -> None:
    from checkpoint.files.table import FileTable
    from checkpoint.files.tcp import TcpGroup
    from tests.system.files_children import _Pid

    with children(1) as (source,):
        source.bare()
        keep = source.do(
            """
l = socket.socket(); l.bind(('10.9.9.1', 9000)); l.listen(7)
a = socket.socket(); a.connect(('10.9.9.1', 9000)); b, _ = l.accept()
gone = socket.socket(); gone.connect(('10.9.9.1', 9000)); x, _ = l.accept()
keep.update(a=a.fileno(), b=b.fileno())
"""
        )
        source.stop()
        with FileTable() as table:
            table.add_process(_Pid(source.pid))
            table.records()
            group = TcpGroup(table)
            assert group.connections == 4
            assert group.local_addresses == {"10.9.9.1"}
            assert len(group.listeners) == 1
            group.freeze()
            group.export()
            assert len(group.records()) == 4
            group.thaw()
            group.thaw()
        os.kill(source.pid, 18)
        source.do("a.send(b'x'); b.settimeout(3); assert b.recv(9) == b'x' and a.getsockopt(1, 36) == 0", keep)
        assert b"blackhole" not in subprocess.run(["ip", "rule"], capture_output=True, check=True).stdout
