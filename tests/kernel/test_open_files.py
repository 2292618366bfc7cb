"""What the rooms of open files take for granted of Linux, one assumption each."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from checkpoint.files import abi
from tcpstate.kernel import batch
from tcpstate.kernel.machine import SYS

PEEK_OFF = 42


def test_kcmp_orders_descriptions() -> None:
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(6)]
    me = os.getpid()
    twin = os.dup(files[0])
    assert abi.kcmp(me, me, abi.Kcmp.FILE, files[0], twin) == 0
    order = {(a, b): abi.kcmp(me, me, abi.Kcmp.FILE, a, b) for a in files for b in files}
    assert all((order[a, b], order[b, a]) in ((0, 0), (1, 2), (2, 1)) for a in files for b in files)
    less = {a: sum(order[b, a] == 1 for b in files) for a in files}
    assert sorted(less.values()) == list(range(6)), "it is not one line"
    for fd in [*files, twin]:
        os.close(fd)


def test_one_read_brings_all_of_fdinfo() -> None:
    """However much it is: it is one record. A second read, to see that nothing follows, is not needed."""
    pipes = [os.pipe() for _ in range(300)]
    with select.epoll() as epoll:
        for end, _ in pipes:
            epoll.register(end)
        info = os.open(f"/proc/self/fdinfo/{epoll.fileno()}", os.O_RDONLY)
        found = os.read(info, 1 << 16)
        assert found.count(b"tfd:") == len(pipes)
        assert len(found) > 4 * mmap.PAGESIZE
        assert os.read(info, 1 << 16) == b""
        os.close(info)
    for ends in pipes:
        for end in ends:
            os.close(end)


def test_poll_tells_whether_the_other_end_of_a_pipe_exists() -> None:
    def events(fd: int) -> int:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return dict(poll.poll(0)).get(fd, 0)

    r, w = os.pipe()
    assert not events(r) & select.POLLHUP
    assert not events(w) & select.POLLERR
    os.write(w, b"x")
    other = os.dup(r)
    os.close(w)
    assert events(r) & select.POLLHUP
    os.close(r)
    os.close(other)
    r, w = os.pipe()
    os.close(r)
    assert events(w) & select.POLLERR
    os.close(w)


def test_tee_leaves_the_pipe_and_keeps_packets_apart() -> None:
    r, w = os.pipe2(os.O_DIRECT)
    os.write(w, b"one")
    os.write(w, b"two")
    copy_r, copy_w = os.pipe2(os.O_NONBLOCK)
    assert abi.tee(r, copy_w, 6) == 6
    assert [os.read(copy_r, 99), os.read(copy_r, 99)] == [b"one", b"two"]
    assert [os.read(r, 99), os.read(r, 99)] == [b"one", b"two"]
    for fd in (r, w, copy_r, copy_w):
        os.close(fd)


def test_asking_a_timerfd_makes_it_catch_up_in_its_phase() -> None:
    fd = abi.timerfd_create(time.CLOCK_MONOTONIC, 0)
    begun = time.monotonic_ns()
    abi.timerfd_settime(fd, 0, abi.TimerSpec(interval=50_000_000, value=10_000_000))
    time.sleep(0.13)
    info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    assert "ticks: 1\n" in info
    assert "it_value: (0, 0)" in info
    left = abi.timerfd_gettime(fd).value
    now = time.monotonic_ns()
    assert (begun + 10_000_000 - now - left) % 50_000_000 < 3_000_000 or (
        now + left - begun - 10_000_000
    ) % 50_000_000 < 3_000_000
    assert int.from_bytes(os.read(fd, 8), "little") >= 3
    os.close(fd)


def test_shared_anonymous_memory_can_be_reopened_as_what_it_is() -> None:
    with mmap.mmap(-1, 8192) as area:
        area[:5] = b"bytes"
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        fd = os.open(f"/proc/self/map_files/{start:x}-{start + 8192:x}", os.O_RDWR)
        assert os.readlink(f"/proc/self/fd/{fd}") == "/dev/zero (deleted)"
        with mmap.mmap(fd, 8192) as again:
            assert again[:5] == b"bytes"
            again[0:1] = b"B"
        assert area[:5] == b"Bytes"
        os.close(fd)


def test_a_fault_shows_where_a_piece_of_a_stream_with_descriptors_begins() -> None:
    a, b = socket.socketpair()
    a.send(b"before")
    socket.send_fds(a, [b"with"], [0])
    b.setsockopt(1, PEEK_OFF, 0)
    data, ancillary, _, _ = b.recvmsg(99, 99, socket.MSG_PEEK)
    fds = struct.unpack("i", ancillary[0][2])
    assert (data, len(fds)) == (b"beforewith", 1), "peeking no longer glues: the search for the border can go"
    from checkpoint.files.unixqueue import read

    taken: list[int] = []
    messages = read(b, 0, lambda fd: taken.append(fd) or 0, "here")  # type: ignore[func-returns-value]
    assert [(m.data, len(m.rights)) for m in messages] == [(b"before", 0), (b"with", 1)]
    for fd in [*fds, *taken]:
        os.close(fd)
    a.close()
    b.close()


def test_a_datagram_of_no_bytes_cannot_be_peeked_at_twice() -> None:
    """The reason why the queue of a UDP socket is read once only, at the freeze."""
    u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    u.bind(("127.0.0.1", 0))
    c = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    c.connect(u.getsockname())
    for part in (b"one", b"", b"two"):
        c.send(part)

    def walk() -> list[bytes]:
        u.setsockopt(1, PEEK_OFF, 0)
        found = []
        try:
            while True:
                found.append(u.recv(99, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return found

    assert walk() == [b"one", b"", b"two"]
    assert walk() == [b"one", b"two"]
    u.setsockopt(1, PEEK_OFF, -1)
    assert [u.recv(99) for _ in range(3)] == [b"one", b"", b"two"]
    u.close()
    c.close()


def test_a_name_bound_in_a_private_root_keeps_its_text_and_can_be_moved(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    sock = socket.socket(socket.AF_UNIX)

    def bind() -> None:
        abi.unshare_filesystem()
        os.chroot(tmp_path)
        sock.bind("/run/x.sock")

    before = os.stat("/").st_ino
    thread = threading.Thread(target=bind)
    thread.start()
    thread.join()
    assert os.stat("/").st_ino == before, "the root of the whole process changed"
    assert sock.getsockname() == "/run/x.sock"
    sock.listen(1)
    os.rename(tmp_path / "run" / "x.sock", tmp_path / "y")
    with socket.socket(socket.AF_UNIX) as c:
        c.connect(str(tmp_path / "y"))
        assert c.getpeername() == "/run/x.sock"
    sock.close()


def test_a_socket_can_be_reached_through_a_descriptor_of_its_directory(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    folder = os.open(deep, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as s, socket.socket(socket.AF_UNIX) as c:
        s.bind(f"/proc/self/fd/{folder}/s")
        s.listen(1)
        with pytest.raises(OSError, match="too long"):
            c.connect(str(deep / "s"))
        c.connect(f"/proc/self/fd/{folder}/s")
    os.close(folder)


def test_closing_any_descriptor_of_a_file_drops_its_record_locks(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    fcntl.lockf(fd, fcntl.LOCK_EX)
    assert "POSIX" in Path(f"/proc/self/fdinfo/{fd}").read_text()
    os.close(os.open(tmp_path / "f", os.O_RDONLY))
    assert "POSIX" not in Path(f"/proc/self/fdinfo/{fd}").read_text()
    os.close(fd)


def test_dup3_to_itself_fails_and_pidfd_getfd_returns_the_lowest_number() -> None:
    pidfd = os.pidfd_open(os.getpid())
    hole = os.open("/dev/null", os.O_RDONLY)
    os.close(hole)
    got = abi.pidfd_getfd(pidfd, 0)
    assert got == hole
    assert not os.get_inheritable(got)
    with pytest.raises(OSError, match="Invalid argument"):
        batch.syscall(SYS.dup3, got, got, 0)
    os.close(got)
    os.close(pidfd)


def test_an_epoll_entry_outlives_its_number_and_kcmp_finds_its_file() -> None:
    epoll, event, other = select.epoll(), os.eventfd(1), os.eventfd(0)
    epoll.register(event, select.EPOLLIN)
    twin = os.dup(event)
    os.dup2(other, event)
    assert epoll.poll(0) == [(event, select.EPOLLIN)]
    me = os.getpid()
    assert abi.kcmp_epoll(me, twin, me, epoll.fileno(), event, 0)
    assert not abi.kcmp_epoll(me, event, me, epoll.fileno(), event, 0)
    assert not abi.kcmp_epoll(me, twin, me, epoll.fileno(), event, 1)
    for fd in (event, twin, other):
        os.close(fd)


def test_the_backlog_of_a_listener_is_in_tcp_info_and_sock_diag(tmp_path: Path) -> None:
    from checkpoint.files.unixdiag import unix_sockets

    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as local, socket.socket(socket.AF_UNIX) as waiting:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen(123)
        assert struct.unpack_from("<I", tcp.getsockopt(6, 11, 280), 8 + 4 * 5) == (123,)
        local.bind(str(tmp_path / "s"))
        local.listen(45)
        waiting.connect(str(tmp_path / "s"))
        found = unix_sockets()[os.fstat(local.fileno()).st_ino]
        assert (found.wqueue, found.rqueue) == (45, 1)
        assert found.icons == (os.fstat(waiting.fileno()).st_ino,)
