"""What the engine relies on for native asynchronous I/O: contexts as a BPF iterator shows them, and rings that move."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import pytest

from checkpoint.kernel import aio
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS

POLL = 5
REMAP_FIXED_MAYMOVE = 3


class Context:
    def __init__(self, requests: int = 1) -> None:
        number = ctypes.c_ulong()
        syscall(SYS.io_setup, requests, ctypes.addressof(number))
        self.id = number.value
        self._kept: list[object] = []

    def submit(self, fd: int, opcode: int = 0, length: int = 0, count: int = 1) -> int:
        request = aio.IOCB.pack(1, 0, 0, opcode, 0, fd, int(opcode == POLL), length, 0, 0, 0, 0)
        memory = ctypes.create_string_buffer(request, len(request))
        pointers = (ctypes.c_ulong * count)(*[ctypes.addressof(memory)] * count)
        self._kept += [memory, pointers]
        return syscall(SYS.io_submit, self.id, count, ctypes.addressof(pointers))

    def head(self) -> tuple[int, ...]:
        return aio.RING.unpack(ctypes.string_at(self.id, aio.RING.size))


@pytest.fixture
def context() -> Iterator[Context]:
    made = Context()
    yield made
    syscall(SYS.io_destroy, made.id)


def seen(context: Context) -> aio.Context:
    (found,) = [one for one in aio.contexts(os.getpid()) if one.address == context.id]
    return found


def test_a_context_is_told_as_its_ring_tells_it(context: Context) -> None:
    found = seen(context)
    number, nr, _, tail, magic, *_ = context.head()
    assert (found.number, found.nr, found.tail, found.limit) == (number, nr, tail, 1)
    assert magic == aio.RING_MAGIC
    assert not found.under_way
    assert not found.waiting


def test_a_read_of_dev_null_moves_the_tail_and_is_done_at_once(context: Context) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        assert context.submit(fd, count=50) == 50
    finally:
        os.close(fd)
    assert (seen(context).tail, context.head()[3], seen(context).under_way) == (50, 50, 0)


def test_a_request_that_waits_for_a_file_is_seen_until_it_is_done(context: Context) -> None:
    reading, writing = os.pipe()
    try:
        assert context.submit(reading, POLL) == 1
        assert (seen(context).under_way, seen(context).waiting) == (1, True)
        os.write(writing, b"x")
        while seen(context).under_way:
            pass
        assert not seen(context).waiting
    finally:
        os.close(reading)
        os.close(writing)


def test_a_context_goes_along_with_its_ring(context: Context) -> None:
    size = 4096
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    place = libc.mmap(None, ctypes.c_size_t(size), 0, 0x22, -1, ctypes.c_long(0))
    assert syscall(SYS.mremap, context.id, size, size, REMAP_FIXED_MAYMOVE, place) == place
    context.id = place
    assert seen(context).address == place
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        assert context.submit(fd) == 1
    finally:
        os.close(fd)


def test_numbers_are_given_from_the_lowest_that_is_free() -> None:
    made = [Context() for _ in range(3)]
    try:
        numbers = [context.head()[0] for context in made]
        assert numbers == sorted(numbers)
        syscall(SYS.io_destroy, made[1].id)
        made[1] = Context()
        assert made[1].head()[0] == numbers[1]
    finally:
        for context in made:
            syscall(SYS.io_destroy, context.id)


def test_memory_that_a_child_inherits_is_no_context_of_its() -> None:
    context = Context()
    child = os.fork()
    if child == 0:
        os._exit(len(aio.contexts(os.getpid())))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    syscall(SYS.io_destroy, context.id)
