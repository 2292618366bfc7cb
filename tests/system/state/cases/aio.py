"""Contexts of native asynchronous I/O (io_setup): their rings, and what has finished in them."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator

from tests.system.state.calls import call
from tests.system.state.case import Here, case

SETUP, DESTROY, GETEVENTS, SUBMIT = 206, 207, 208, 209
READ, POLL = 0, 5
EVENT = struct.Struct("=QQqq")
NR_AT = 4  # in the head of a ring


class Context:
    """One context, with a file of its own to read from."""

    def __init__(self, here: Here, requests: int, name: str = "file") -> None:
        number = ctypes.c_ulong()
        call(SETUP, requests, ctypes.byref(number))
        self.id = number.value
        with open(here.path(name), "wb") as file:
            file.write(bytes(range(256)))
        self.fd = os.open(here.path(name), os.O_RDONLY)
        self.buffer = ctypes.create_string_buffer(256)
        self._kept: list[object] = []

    @property
    def head(self) -> tuple[int, ...]:
        return struct.unpack("=8I", ctypes.string_at(self.id, 32))

    @property
    def room(self) -> int:
        """Events that can wait to be fetched."""
        return self.head[1] - 1

    def submit(self, *marks: int, eventfd: int = -1) -> int:
        """Reads of one byte each: the file's byte of that number. How many the kernel took."""
        requests = [
            struct.pack(
                "=QIIHhIQQqQII",
                *(mark, 0, 0, READ, 0, self.fd, ctypes.addressof(self.buffer) + mark % 256, 1, mark % 256, 0),
                *((1, eventfd) if eventfd >= 0 else (0, 0)),
            )
            for mark in marks
        ]
        memory = ctypes.create_string_buffer(b"".join(requests), 64 * len(requests))
        pointers = (ctypes.c_ulong * len(requests))(*(ctypes.addressof(memory) + 64 * n for n in range(len(requests))))
        self._kept += [memory, pointers]
        return call(SUBMIT, self.id, len(requests), pointers)

    def fetch(self, least: int = 0, most: int = 4096) -> list[tuple[int, int]]:
        """(mark, result) of what has finished."""
        events = ctypes.create_string_buffer(EVENT.size * most)
        count = call(GETEVENTS, self.id, least, most, events, ctypes.byref((ctypes.c_long * 2)(5, 0)))
        return [(mark, result) for mark, _, result, _ in EVENT.iter_unpack(events.raw[: EVENT.size * count])]

    def works(self) -> None:
        assert self.fetch() == []
        self.buffer[17] = b"\0"
        assert self.submit(17) == 1
        assert self.fetch(1) == [(17, 1)]
        assert self.buffer[17] == b"\x11"

    def full(self) -> None:
        """It takes as much as it has room for, and no more: each CPU asks for an eighth or less at a time."""
        taken = self.submit(*range(self.room))
        assert self.room * 3 // 4 <= taken <= self.room, (taken, self.room)
        try:
            more = self.submit(1)
        except BlockingIOError:
            more = 0
        assert more == 0
        assert self.fetch() == [(mark, 1) for mark in range(taken)]
        self.works()


@case("memory/rings")
def an_empty_ring(here: Here) -> Iterator[None]:
    context = Context(here, 10)
    yield
    context.works()
    context.full()


@case("memory/rings")
def events_that_nobody_has_fetched(here: Here) -> Iterator[None]:
    context = Context(here, 10)
    context.submit(*range(40, 60))
    assert context.fetch(1, 5) == [(mark, 1) for mark in range(40, 45)]
    yield
    assert context.fetch() == [(mark, 1) for mark in range(45, 60)]
    context.works()
    context.full()


@case("memory/rings")
def a_ring_that_has_come_round(here: Here) -> Iterator[None]:
    context = Context(here, 1)
    for _ in range(3):
        context.submit(*range(context.room - 20))
        context.fetch()
    context.submit(*range(100))
    assert len(context.fetch(1, 30)) == 30
    assert context.head[3] < context.head[2], "the events are at both ends"
    yield
    assert context.fetch() == [(mark, 1) for mark in range(30, 100)]
    context.works()
    context.full()


@case("memory/rings")
def a_full_ring(here: Here) -> Iterator[None]:
    context = Context(here, 1)
    context.submit(1, 2, 3)
    context.fetch()
    room = context.submit(*range(context.room))
    yield
    try:
        more = context.submit(9)
    except BlockingIOError:
        more = 0
    assert more == 0
    assert context.fetch() == [(mark, 1) for mark in range(room)]
    context.works()


@case("memory/rings")
def several_rings(here: Here) -> Iterator[None]:
    """Of different sizes; one that was between them is no more."""
    first, gone, last = (Context(here, requests, f"{requests}") for requests in (2000, 3, 200))
    call(DESTROY, gone.id)
    first.submit(*range(1500))
    last.submit(5, 6)
    numbers = first.head[0], last.head[0]
    yield
    assert (first.head[0], last.head[0]) == numbers
    assert first.fetch() == [(mark, 1) for mark in range(1500)]
    assert last.fetch() == [(5, 1), (6, 1)]
    for context in (first, last):
        context.works()
        context.full()
    again = Context(here, 3, "again")
    assert again.head[0] not in numbers
    again.works()


@case("memory/rings")
def what_an_eventfd_has_told(here: Here) -> Iterator[None]:
    context = Context(here, 10)
    counter = os.eventfd(0)
    context.submit(7, 8, eventfd=counter)
    yield
    assert os.eventfd_read(counter) == 2
    assert context.fetch() == [(7, 1), (8, 1)]
    context.submit(9, eventfd=counter)
    assert os.eventfd_read(counter) == 1


@case("memory/rings")
def fetched_without_a_call(here: Here) -> Iterator[None]:
    """As libaio does: the program moves the head by itself."""
    context = Context(here, 10)
    context.submit(*range(50))
    ctypes.c_uint32.from_address(context.id + 8).value = 20
    yield
    assert context.fetch() == [(mark, 1) for mark in range(20, 50)]
    context.full()
