"""Local sockets, and internet sockets with both ends in the tree."""

from __future__ import annotations

import array
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator

from tests.system.state.case import Here, case

UNIX, STREAM, DGRAM, SEQ = socket.AF_UNIX, socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET


@case("files/unix-socket")
def stream_pair_with_bytes_both_ways(here: Here) -> Iterator[None]:
    a, b = socket.socketpair()
    a.send(b"x" * 50000)
    b.send(b"back")
    yield
    assert b.recv(1 << 17, socket.MSG_WAITALL | socket.MSG_DONTWAIT) == b"x" * 50000
    assert a.recv(99) == b"back"
    a.send(b"on")
    assert b.recv(99) == b"on"


@case("files/unix-socket")
def packets_keep_their_borders(here: Here) -> Iterator[None]:
    a, b = socket.socketpair(UNIX, SEQ)
    for part in (b"1", b"22", b"x" * 3000):
        a.send(part)
    yield
    assert [b.recv(9999) for _ in range(3)] == [b"1", b"22", b"x" * 3000]
    a.close()
    assert b.recv(9) == b""


@case("files/unix-socket")
def datagrams_from_several(here: Here) -> Iterator[None]:
    service = socket.socket(UNIX, DGRAM)
    service.bind(here.path("service"))
    named = socket.socket(UNIX, DGRAM)
    named.bind(here.path("client"))
    named.connect(here.path("service"))
    named.send(b"from a name")
    anonymous = socket.socket(UNIX, DGRAM)
    anonymous.sendto(b"from nobody", here.path("service"))
    yield
    assert service.recvfrom(99) == (b"from a name", here.path("client"))
    assert service.recvfrom(99) == (b"from nobody", None)
    service.sendto(b"answer", here.path("client"))
    assert named.recv(99) == b"answer"


@case("files/unix-socket")
def listener_with_a_path(here: Here) -> Iterator[None]:
    listener = socket.socket(UNIX)
    listener.bind(here.path("sock"))
    os.chmod(here.path("sock"), 0o640)
    listener.listen(7)
    client = socket.socket(UNIX)
    client.connect(here.path("sock"))
    served, _ = listener.accept()
    client.send(b"asked")
    yield
    assert served.recv(99) == b"asked"
    assert os.stat(here.path("sock")).st_mode & 0o777 == 0o640
    other = socket.socket(UNIX)
    other.connect(here.path("sock"))
    new, _ = listener.accept()
    other.send(b"hello")
    assert new.recv(9) == b"hello"
    assert served.getsockname() == here.path("sock")


@case("files/unix-socket")
def abstract_name_not_accepted_yet(here: Here) -> Iterator[None]:
    name = f"\0tcpmig-{os.getpid()}"
    listener = socket.socket(UNIX, SEQ)
    listener.bind(name)
    listener.listen()
    client = socket.socket(UNIX, SEQ)
    client.connect(name)
    yield
    served, _ = listener.accept()
    client.send(b"at last")
    assert served.recv(99) == b"at last"
    assert client.getpeername() == name.encode()


@case("files/unix-socket")
def deleted_path(here: Here) -> Iterator[None]:
    sock = socket.socket(UNIX, DGRAM)
    sock.bind(here.path("gone"))
    os.unlink(here.path("gone"))
    friend = socket.socket(UNIX, DGRAM)
    friend.bind(here.path("friend"))
    yield
    assert sock.getsockname() == here.path("gone")
    assert os.listdir(here.folder) == ["friend"]
    sock.sendto(b"x", here.path("friend"))
    assert friend.recvfrom(9) == (b"x", here.path("gone"))


@case("files/unix-socket")
def half_closed(here: Here) -> Iterator[None]:
    a, b = socket.socketpair()
    a.send(b"rest")
    a.shutdown(socket.SHUT_WR)
    yield
    assert b.recv(9) == b"rest"
    assert b.recv(9) == b""
    b.send(b"still heard")
    assert a.recv(99) == b"still heard"


@case("files/unix-socket")
def peer_is_gone(here: Here) -> Iterator[None]:
    a, b = socket.socketpair()
    b.send(b"last")
    b.close()
    yield
    assert a.recv(9) == b"last"
    assert a.recv(9) == b""
    try:
        a.send(b"x")
    except BrokenPipeError:
        return
    raise AssertionError("somebody hears")


def passed(sock: socket.socket, *fds: int, data: bytes = b"fd") -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def received(sock: socket.socket) -> tuple[bytes, list[int]]:
    data, fds, _, _ = socket.recv_fds(sock, 99, 9)
    return data, fds


@case("files/unix-socket", "files/pipe")
def descriptors_in_flight(here: Here) -> Iterator[None]:
    a, b = socket.socketpair(UNIX, SEQ)
    r, w = os.pipe()
    passed(a, r, w, data=b"two")
    passed(a, w, data=b"one")
    os.close(w)
    yield
    data, (r2, w2) = received(b)
    assert data == b"two"
    os.write(w2, b"through")
    # the same description as the one that stayed
    assert os.read(r, 99) == b"through"
    data, (w3,) = received(b)
    assert data == b"one"
    for fd in (w2, w3):
        os.close(fd)
    assert os.read(r2, 9) == b""


@case("files/unix-socket")
def a_socket_in_flight_in_itself(here: Here) -> Iterator[None]:
    a, b = socket.socketpair(UNIX, DGRAM)
    passed(a, b.fileno(), data=b"itself")
    yield
    data, (fd,) = received(b)
    assert data == b"itself"
    with socket.socket(fileno=fd) as again:
        a.send(b"twice")
        assert again.recv(99) == b"twice"


@case("files/unix-socket")
def credentials_with_each_message(here: Here) -> Iterator[None]:
    a, b = socket.socketpair(UNIX, DGRAM)
    b.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    a.sendmsg([b"who"], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, struct.pack("iII", os.getpid(), 7, 8))])
    yield
    data, ancillary, _, _ = b.recvmsg(99, 99)
    assert data == b"who"
    assert struct.unpack("iII", ancillary[0][2]) == (os.getpid(), 7, 8)
    assert b.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)


@case("files/unix-socket")
def options_of_a_local_socket(here: Here) -> Iterator[None]:
    a, b = socket.socketpair()
    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 55555)
    a.setsockopt(socket.SOL_SOCKET, 42, 3)  # SO_PEEK_OFF
    a.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("qq", 7, 250000))
    b.send(b"0123456")
    yield
    assert a.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 55555
    assert struct.unpack("qq", a.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16))[0] == 7
    assert a.recv(2, socket.MSG_PEEK) == b"34"


@case("files/udp")
def udp_with_unread_datagrams(here: Here) -> Iterator[None]:
    sock = socket.socket(socket.AF_INET, DGRAM)
    sock.bind(("127.0.0.1", 0))
    other = socket.socket(socket.AF_INET, DGRAM)
    other.bind(("127.0.0.1", 0))
    other.connect(sock.getsockname())
    for part in (b"first", b"second"):
        other.send(part)
    yield
    assert sock.recvfrom(99) == (b"first", other.getsockname())
    assert sock.recvfrom(99) == (b"second", other.getsockname())
    sock.sendto(b"back", other.getsockname())
    assert other.recv(99) == b"back"


@case("files/udp")
def udp6_connected_with_options(here: Here) -> Iterator[None]:
    sock = socket.socket(socket.AF_INET6, DGRAM)
    sock.bind(("::1", 0))
    sock.connect(("::1", sock.getsockname()[1]))
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 9)
    sock.setsockopt(17, 103, 1000)  # UDP_SEGMENT
    yield
    assert sock.getpeername() == sock.getsockname()
    assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS) == 9
    assert sock.getsockopt(17, 103) == 1000
    sock.send(b"to myself")
    assert sock.recv(99) == b"to myself"


@case("files/udp")
def udp_with_a_classic_filter(here: Here) -> Iterator[None]:
    import ctypes

    sock = socket.socket(socket.AF_INET, DGRAM)
    sock.bind(("127.0.0.1", 0))
    # ld len; jge 8 + 4: take it; else drop it
    code = b"".join(
        struct.pack("<HBBI", *one) for one in ((0x80, 0, 0, 0), (0x35, 0, 1, 12), (6, 0, 0, 0xFFFF), (6, 0, 0, 0))
    )
    text = ctypes.create_string_buffer(code, len(code))
    sock.setsockopt(socket.SOL_SOCKET, 26, struct.pack("<H6xQ", 4, ctypes.addressof(text)))
    yield
    for part in (b"no", b"taken"):
        sock.sendto(part, sock.getsockname())
    assert sock.recv(99) == b"taken"
    assert not select.select([sock], [], [], 0)[0]


@case("files/tcp")
def connection_inside_the_tree(here: Here) -> Iterator[None]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    client.sendall(b"q" * 30000)
    server.sendall(b"answer")
    time.sleep(0.01)
    yield
    assert server.recv(30000, socket.MSG_WAITALL) == b"q" * 30000
    assert client.recv(99) == b"answer"
    client.sendall(b"more")
    assert server.recv(99) == b"more"
    client.close()
    assert server.recv(9) == b""


@case("files/tcp-listener")
def listener_of_tcp(here: Here) -> Iterator[None]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=17)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 3)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    yield
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT)
    client = socket.create_connection(listener.getsockname())
    client.send(b"in")
    served, _ = listener.accept()
    assert served.recv(9) == b"in"


def peer(sock: socket.socket) -> tuple[int, int, int, tuple[int, ...]]:
    """SO_PEERCRED and SO_PEERGROUPS: pid, uid, gid, groups."""
    pid, uid, gid = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    groups = sock.getsockopt(socket.SOL_SOCKET, 59, 256)
    return pid, uid, gid, struct.unpack(f"={len(groups) // 4}I", groups)


def become(uid: int, gid: int, *groups: int) -> None:
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


@case("aspect/peer-credentials")
def who_made_a_pair(here: Here) -> Iterator[None]:
    os.seteuid(2001)
    a, b = socket.socketpair()
    os.seteuid(0)
    told, tells = socket.socketpair()
    child = os.fork()
    if child == 0:
        become(2002, 2003, 7, 9)
        c, d = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        socket.send_fds(tells, [b"x"], [c.fileno(), d.fileno()])
        while True:
            signal.pause()
    _, (first, second), _, _ = socket.recv_fds(told, 1, 2)
    c, d = socket.socket(fileno=first), socket.socket(fileno=second)
    before = [peer(sock) for sock in (a, b, c, d)]
    assert before[0][:2] == (os.getpid(), 2001)
    assert before[2] == (child, 2002, 2003, (7, 9))
    yield
    assert [peer(sock) for sock in (a, b, c, d)] == before
    a.send(b"on")
    assert b.recv(9) == b"on"
    d.send(b"goes")
    assert c.recv(9) == b"goes"


@case("aspect/peer-credentials")
def who_listens_and_who_connects(here: Here) -> Iterator[None]:
    path = here.path("service")
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    os.chmod(path, 0o666)
    os.chmod(here.folder, 0o755)
    for folder in list(here.folder.parents)[:-2]:
        os.chmod(folder, 0o755)
    server.listen(5)
    told, tells = socket.socketpair()
    child = os.fork()
    if child == 0:
        become(2004, 2005, 11)
        accepted, waits = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        accepted.connect(path)
        waits.connect(path)
        socket.send_fds(tells, [b"x"], [accepted.fileno()])
        while True:
            signal.pause()
    _, (first,), _, _ = socket.recv_fds(told, 1, 1)
    accepted = socket.socket(fileno=first)
    served, _ = server.accept()
    assert peer(served) == (child, 2004, 2005, (11,))
    assert peer(accepted)[:3] == (os.getpid(), 0, 0)
    before = [peer(sock) for sock in (server, served, accepted)]
    yield
    assert [peer(sock) for sock in (server, served, accepted)] == before
    later, _ = server.accept()
    assert peer(later) == (child, 2004, 2005, (11,))
    fresh = socket.socket(socket.AF_UNIX)
    fresh.connect(path)
    assert peer(fresh)[:3] == (os.getpid(), 0, 0)
    accepted.send(b"still")
    assert served.recv(9) == b"still"


@case("aspect/peer-credentials")
def who_made_it_has_ended(here: Here) -> Iterator[None]:
    told, tells = socket.socketpair()
    child = os.fork()
    if child == 0:
        become(2006, 2007)
        a, b = socket.socketpair()
        socket.send_fds(tells, [b"x"], [a.fileno(), b.fileno()])
        os._exit(0)
    _, fds, _, _ = socket.recv_fds(told, 1, 2)
    os.waitpid(child, 0)
    ends = [socket.socket(fileno=fd) for fd in fds]
    yield
    # its number is nobody's any more; user and group are what is asked for
    assert [peer(sock)[1:3] for sock in ends] == [(2006, 2007)] * 2
