"""An epoll instance read by BPF: what its fdinfo says, and the very files that it watches."""

from __future__ import annotations

import contextlib
import os
import random
import select
from collections.abc import Iterator

import pytest

from checkpoint.files.base import parse_info, read_info
from checkpoint.files.epoll import entry_of
from checkpoint.kernel import epolltree, filetable
from checkpoint.kernel.epolltree import Reader

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
