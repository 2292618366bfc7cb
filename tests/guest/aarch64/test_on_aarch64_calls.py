"""A table of system calls on aarch64: by the machine's routine, and the same by plain calls."""

import ctypes
import errno
import mmap
import os
import struct

import pytest

from tcpstate.kernel import batch
from tcpstate.kernel.calls import CallError, CallTable
from tcpstate.kernel.machine import ROUTINE, SYS, aarch64


@pytest.fixture(params=["routine", "plain"], autouse=True)
def way(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setenv(batch.NO_BATCH, "1")
    else:
        assert batch._machine_routine() is not None
    return request.param


def test_it_is_this_machine_s():
    assert os.uname().machine == "aarch64"
    assert ROUTINE is aarch64.ROUTINE


def test_results_come_back_in_order():
    table = CallTable()
    pid = table.call(SYS.getpid)
    thread = table.call(SYS.gettid)
    batch.run(table)
    assert (pid.value, thread.value) == (os.getpid(), os.gettid() if hasattr(os, "gettid") else thread.value)


def test_a_result_is_the_argument_of_later_calls():
    reader, writer = os.pipe()
    table = CallTable()
    copy = table.call(SYS.dup3, writer, 700, os.O_CLOEXEC)
    data = table.put(b"through it")
    table.call(SYS.write, copy, data, 10)
    table.call(SYS.close, copy)
    batch.run(table)
    assert os.read(reader, 100) == b"through it"
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(700)
    os.close(reader)
    os.close(writer)


def test_a_table_ends_at_its_first_error():
    table = CallTable()
    table.call(SYS.close, 1 << 20, ignore=True)
    table.call(SYS.close, 1 << 21, label="closing nothing")
    never = table.room(8)
    table.call(SYS.clock_gettime, 1, never)
    with pytest.raises(CallError, match="closing nothing") as caught:
        batch.run(table)
    assert (caught.value.errno, caught.value.index) == (errno.EBADF, 1)


def test_six_arguments_arrive():
    table = CallTable()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    place = table.call(SYS.mmap, 0, 8192, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    batch.run(table)
    ctypes.memset(place.value, 7, 8192)
    table = CallTable()
    room = table.room(16)
    table.call(SYS.clock_gettime, 1, room)
    table.call(SYS.munmap, place.value, 8192)
    batch.run(table)
    assert struct.unpack("<qq", room.bytes())[0] > 0
