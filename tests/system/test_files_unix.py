"""Local sockets of every kind, set up by one process, captured, rebuilt, given to another process and tried there."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from checkpoint.errors import FileMissing, PeerOutsideTree
from checkpoint.files.rebuild import Rebuilder
from checkpoint.files.verdicts import verdicts
from checkpoint.verdict import Status
from tests.system.files_children import children, round_trip
from tests.system.files_essence import captured, same


@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_SEQPACKET", "SOCK_DGRAM"])
def test_unix_pair_with_queues_both_ways(kind: str) -> None:
    same(
        f"""
a, b = socket.socketpair(socket.AF_UNIX, socket.{kind})
for i in range(5): a.send(b'to b %d ' % i * 1000)
b.send(b'to a'); b.setblocking(False)
keep.update(a=a.detach(), b=b.detach())
""",
        f"""
a, b = socket.socket(fileno=keep['a']), socket.socket(fileno=keep['b'])
got = b''.join(b.recv(1 << 20) for _ in range(1 if socket.{kind} == socket.SOCK_STREAM else 5))
assert got == b''.join(b'to b %d ' % i * 1000 for i in range(5))
assert a.recv(99) == b'to a'
a.send(b'new'); assert b.recv(99) == b'new'
""",
    )


def test_unix_datagrams_keep_their_borders_also_empty_ones() -> None:
    same(
        """
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
for part in (b'one', b'', b'three', b'', b'x' * 50000): a.send(part)
keep.update(a=a.detach(), b=b.detach())
""",
        """
b = socket.socket(fileno=keep['b'])
assert [b.recv(99999) for _ in range(5)] == [b'one', b'', b'three', b'', b'x' * 50000]
""",
    )


def test_unix_listener_with_accepted_connections(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    same(
        f"""
l = socket.socket(socket.AF_UNIX); l.bind({path!r}); l.listen(17); os.chmod({path!r}, 0o741)
c = socket.socket(socket.AF_UNIX); c.connect({path!r}); s, _ = l.accept()
c.send(b'request'); s.send(b'answer')
x = socket.socket(socket.AF_UNIX); x.bind('\\0tcpmig-files-test'); x.listen(3)
y = socket.socket(socket.AF_UNIX); y.connect('\\0tcpmig-files-test'); z, _ = x.accept(); z.send(b'abstract')
keep.update(l=l.detach(), c=c.detach(), s=s.detach(), x=x.detach(), y=y.detach(), z=z.detach())
""",
        f"""
l, c, s, x, y, z = (socket.socket(fileno=keep[k]) for k in 'lcsxyz')
assert l.getsockname() == s.getsockname() == c.getpeername() == {path!r}
assert s.recv(99) == b'request' and c.recv(99) == b'answer' and y.recv(99) == b'abstract'
assert y.getpeername() == z.getsockname() == b'\\0tcpmig-files-test'
n = socket.socket(socket.AF_UNIX); n.connect({path!r}); m, _ = l.accept(); n.send(b'hi'); assert m.recv(9) == b'hi'
n = socket.socket(socket.AF_UNIX); n.connect('\\0tcpmig-files-test'); m, _ = x.accept()
n.send(b'hi'); assert m.recv(9) == b'hi'
assert stat.S_IMODE(os.stat({path!r}).st_mode) == 0o741
""",
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.sock"]


def test_original_keeps_its_name_until_the_release(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")

    with children() as (source, _):
        source.bare()
        source.do(f"l = socket.socket(socket.AF_UNIX); l.bind({path!r}); l.listen(5)")
        source.stop()
        records = captured(source.pid)
        rebuilder = Rebuilder(records)
        rebuilder.rebuild()
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)  # into the original's backlog
        before = os.stat(path).st_ino
        rebuilder.release()
        assert os.stat(path).st_ino != before
        rebuilder.close()
        rebuilder = Rebuilder(records)
        rebuilder.rebuild()
        now = os.stat(path).st_ino
        rebuilder.abort()
        assert os.stat(path).st_ino == now
        assert [e.name for e in tmp_path.iterdir()] == ["s.sock"]


def test_unix_relative_removed_and_datagram_names(tmp_path: Path) -> None:
    setup = f"""
os.chdir({str(tmp_path)!r}); os.mkdir('sub'); os.chdir('sub')
l = socket.socket(socket.AF_UNIX); l.bind('../rel'); l.listen(2)
g = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); g.bind('gone'); os.unlink('gone')
d = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); d.bind({str(tmp_path / "d")!r})
e = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); e.connect({str(tmp_path / "d")!r})
f = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); f.bind({str(tmp_path / "f")!r})
f.sendto(b'from f', {str(tmp_path / "d")!r})
e.send(b'from e'); f.sendto(b'', {str(tmp_path / "d")!r})
keep.update(l=l.detach(), g=g.detach(), d=d.detach(), e=e.detach(), f=f.detach())
"""
    check = f"""
os.chdir({str(tmp_path)!r})
l, g, d, e, f = (socket.socket(fileno=keep[k]) for k in 'lgdef')
assert l.getsockname() == '../rel' and g.getsockname() == 'gone' and not os.path.exists('sub/gone')
assert d.recvfrom(99) == (b'from f', {str(tmp_path / "f")!r}), 1
assert d.recvfrom(99)[0] == b'from e'
assert d.recvfrom(99) == (b'', {str(tmp_path / "f")!r})
e.send(b'again'); assert d.recv(99) == b'again'
n = socket.socket(socket.AF_UNIX); n.connect('rel'); assert l.accept()
"""
    # the new process stands in the directory that the relative names start from
    same(setup, check, enter=str(tmp_path / "sub"))


def test_unix_half_closed_gone_and_waiting_peers(tmp_path: Path) -> None:
    path = str(tmp_path / "w.sock")
    same(
        f"""
a, b = socket.socketpair(); a.send(b'last words'); a.shutdown(socket.SHUT_WR)
c, gone = socket.socketpair(); gone.send(b'bequest'); gone.close()
l = socket.socket(socket.AF_UNIX); l.bind({path!r}); l.listen(5)
w = socket.socket(socket.AF_UNIX); w.connect({path!r})
fresh = socket.socket(socket.AF_UNIX)
keep.update(a=a.detach(), b=b.detach(), c=c.detach(), l=l.detach(), w=w.detach(), f=fresh.detach())
""",
        """
a, b, c, l, w, f = (socket.socket(fileno=keep[k]) for k in 'abclwf')
assert b.recv(99) == b'last words' and b.recv(99) == b''
b.send(b'still open'); assert a.recv(99) == b'still open'
assert c.recv(99) == b'bequest' and c.recv(99) == b''
try: c.send(b'x')
except BrokenPipeError: pass
else: raise AssertionError
s, _ = l.accept(); w.send(b'hello'); assert s.recv(9) == b'hello'
try: f.send(b'x')
except OSError as error: assert error.errno == errno.ENOTCONN
else: raise AssertionError
""",
    )


def test_unix_descriptors_in_flight(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    outcome = round_trip(
        f"""
a, b = socket.socketpair()
fd = os.open({str(tmp_path / "file")!r}, os.O_RDONLY); os.lseek(fd, 6, 0)
r, w = os.pipe()
a.send(b'before '); socket.send_fds(a, [b'with'], [fd, w]); a.send(b' after')
os.close(fd); os.close(w)                           # they live in the message only
keep.update(a=a.detach(), b=b.detach(), r=r)
""",
        """
b = socket.socket(fileno=keep['b'])
first = b.recv(len(b'before '))
assert first == b'before '
data, fds, _, _ = socket.recv_fds(b, 4, 9)
assert data == b'with' and len(fds) == 2, (data, fds)
assert os.read(fds[0], 9) == b'6789'
os.write(fds[1], b'through'); assert os.read(keep['r'], 99) == b'through'
assert b.recv(99) == b' after'
""",
    )
    assert len(outcome.records.files) > len(outcome.records.tables[next(iter(outcome.records.tables))]) - 2


def test_unix_peer_outside_is_refused_by_name() -> None:
    a, b = socket.socketpair()
    with a, b, children(1) as (source,):
        source.do(f"os.dup2({b.fileno()}, 90); os.closerange(3, 90); os.closerange(91, 4096)")
        b.close()
        source.stop()
        with pytest.raises(PeerOutsideTree, match=f"pid {source.pid} fd 90"):
            captured(source.pid)


def test_unix_credentials_of_queued_messages() -> None:
    same(
        """
a, b = socket.socketpair(); b.setsockopt(1, 16, 1)
a.sendmsg([b'who'], [(1, 2, struct.pack('iII', 1, 7, 8))])
d, e = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); e.setsockopt(1, 16, 1)
d.sendmsg([b'one'], [(1, 2, struct.pack('iII', 1, 9, 10))])
d.sendmsg([b'two'], [(1, 2, struct.pack('iII', 1, 11, 12))])
keep.update(a=a.detach(), b=b.detach(), d=d.detach(), e=e.detach())
""",
        """
def got(fd):
    data, ancillary, _, _ = socket.socket(fileno=os.dup(fd)).recvmsg(99, 999)
    assert ancillary, (fd, data)
    return data, struct.unpack('iII', ancillary[0][2])
assert got(keep['b']) == (b'who', (1, 7, 8))
assert got(keep['e']) == (b'one', (1, 9, 10)) and got(keep['e']) == (b'two', (1, 11, 12))
""",
    )


def test_unix_datagram_socket_connected_to_a_service_of_the_host(tmp_path: Path) -> None:
    """syslog: the socket of the target's service takes its place, and the verdict says so."""
    path = str(tmp_path / "log")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
        service.bind(path)
        service.settimeout(2)
        with children(1) as (source,):
            source.bare()
            keep = source.do(
                f"""
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.connect({path!r}); keep['s'] = s.fileno()
"""
            )
            (verdict,) = [v for v in verdicts([source.pid]) if v.subject.endswith(f"fd {keep['s']}")]
            assert (verdict.status, path in verdict.text) == (Status.WARN, True)
        round_trip(
            f"s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.connect({path!r}); keep['s'] = s.detach()",
            "socket.socket(fileno=keep['s']).send(b'message')",
        )
        assert service.recv(99) == b"message"
        with children(1) as (source,):
            source.bare()
            source.do(f"s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.connect({path!r})")
            source.stop()
            records = captured(source.pid)
    Path(path).unlink()
    with pytest.raises(FileMissing):
        Rebuilder(records).check()
