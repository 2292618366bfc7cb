"""Epoll instances and tables of descriptors read in one go: what fdinfo and the iterator over files say."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import signal
import socket
from collections.abc import Iterator

import pytest

from checkpoint.files.base import parse_info, read_info
from checkpoint.files.epoll import entry_of
from checkpoint.kernel import epolltree, filetable
from checkpoint.kernel.epolltree import Reader
from checkpoint.kernel.tablereader import TableReader
from tcpstate.kernel.sockets import SO

ROOM = 300


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    with Reader(ROOM) as made:
        yield made


def told_by_fdinfo(fd: int) -> list[tuple[int, int, int]]:
    lines, _ = parse_info(read_info(os.getpid(), fd))
    entries = [entry_of(line) for line in lines if line.startswith("tfd:")]
    return [(one.number, one.events, one.data) for one in entries if one is not None]


def told_by_bpf(reader: Reader, fd: int) -> list[tuple[int, int, int]]:
    data = reader.read(os.getpid(), fd)
    assert data is not None
    found = list(epolltree.rows(data))
    assert [epolltree.key_of(raw) for raw, _ in epolltree.pairs(data)] == sorted((w.file, w.number) for w in found)
    return [(one.number, one.events, one.data) for one in found]


@pytest.mark.parametrize("seed", range(3))
def test_it_is_what_fdinfo_says_whatever_was_done(reader: Reader, seed: int) -> None:
    chance = random.Random(seed)
    with contextlib.ExitStack() as ends, select.epoll() as epoll:
        files: list[int] = []
        assert told_by_bpf(reader, epoll.fileno()) == []
        for _ in range(400):
            what = chance.randrange(5)
            if what < 2 or not files:
                files.append(os.eventfd(0))
                ends.callback(os.close, files[-1])
                epoll.register(files[-1], chance.choice([0, 1, 5, select.EPOLLET | 4, select.EPOLLONESHOT | 1]))
            elif what < 4:
                with contextlib.suppress(FileNotFoundError):
                    epoll.modify(chance.choice(files), chance.randrange(8))
            else:
                with contextlib.suppress(FileNotFoundError):
                    epoll.unregister(chance.choice(files))
                    files.append(os.dup(files[0]))
                    ends.callback(os.close, files[-1])
                    epoll.register(files[-1], 1)
            if chance.random() < 0.1:
                assert told_by_bpf(reader, epoll.fileno()) == told_by_fdinfo(epoll.fileno())
        assert told_by_bpf(reader, epoll.fileno()) == told_by_fdinfo(epoll.fileno())


def test_the_address_of_a_watched_file_is_that_of_the_descriptor_that_leads_to_it(reader: Reader) -> None:
    event, other = os.eventfd(0), os.eventfd(0)
    with select.epoll() as epoll:
        epoll.register(event, select.EPOLLIN)
        twin = os.dup(event)
        os.dup2(other, event)  # the entry's number leads elsewhere now
        (one,) = epolltree.rows(reader.read(os.getpid(), epoll.fileno()) or b"")
        files = {row.fd: row.file for row in filetable.rows(filetable.read(os.getpid()))}
    assert one.number == event
    assert one.file == files[twin] != files[event]
    for fd in (event, twin, other):
        os.close(fd)


def _many_descriptors() -> None:
    socks = [socket.socket() for _ in range(150)]
    for sock in socks[::2]:
        sock.getsockopt(socket.SOL_SOCKET, SO.COOKIE, 8)
        os.set_inheritable(sock.fileno(), True)
    for sock in socks[::3]:
        sock.close()
    socks[1].setblocking(False)
    fcntl.fcntl(socks[2].fileno(), fcntl.F_SETOWN, os.getpid())
    fcntl.flock(socks[4], fcntl.LOCK_EX)
    with select.epoll() as epoll:
        os.dup2(epoll.fileno(), 900)
    for sock in socks[1::3] + socks[2::3]:
        sock.detach()


def test_a_table_that_is_read_in_one_go_is_what_the_iterator_says() -> None:
    """Sockets with and without a cookie, files, an epoll instance, a lock, an owner, gaps; of a process that rests,
    and of one with more descriptors than there is room for."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            _many_descriptors()
            os.write(told, b"!")
            signal.pause()
        os._exit(1)
    os.close(told)
    assert os.read(ready, 1) == b"!"
    with TableReader(150) as reader, TableReader(20) as small:
        wanted = filetable.table(child)
        assert len(wanted) > 90 * filetable.SIZE
        assert reader.read(child) == wanted
        assert small.read(child) == wanted
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert reader.read(child) == b""
    os.close(ready)


def test_what_has_no_room_is_not_told(reader: Reader) -> None:
    events = [os.eventfd(0) for _ in range(ROOM + 1)]
    with select.epoll() as epoll:
        for event in events:
            epoll.register(event, select.EPOLLIN)
        assert reader.read(os.getpid(), epoll.fileno()) is None
        epoll.unregister(events[0])
        assert told_by_bpf(reader, epoll.fileno()) == told_by_fdinfo(epoll.fileno())
        closed = epoll.fileno()
    assert [reader.read(os.getpid(), fd) for fd in (closed, events[0], 1 << 20)] == [None] * 3
    for event in events:
        os.close(event)
