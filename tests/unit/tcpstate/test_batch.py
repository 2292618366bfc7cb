"""Tables run in our own process, by machine code and by plain calls: the same results."""

import errno
import os

import pytest

from tcpstate.kernel import batch
from tcpstate.kernel.calls import CallError, CallTable
from tcpstate.kernel.columns import RowError, Rows
from tcpstate.kernel.machine import SYS


@pytest.fixture(params=["machine code", "plain calls"])
def way(request, monkeypatch):
    monkeypatch.setenv(batch.NO_BATCH, "0" if request.param == "machine code" else "1")
    if request.param == "machine code":
        assert batch._machine_routine() is not None
    return request.param


def test_results_feed_later_calls(way):
    table = CallTable()
    ends = table.room(8)
    text = table.put(b"hello")
    table.call(SYS.pipe2, ends, os.O_CLOEXEC)
    copy = table.call(SYS.fcntl, 0, 1030, 100)
    closed = table.call(SYS.close, copy)
    me = table.call(SYS.getpid, out=table.room(8))
    batch.run(table)
    assert closed.ok
    assert me.value == os.getpid()
    reader, writer = ends.u32(), ends.u32(4)
    second = CallTable()
    place = second.room(5)
    second.call(SYS.write, writer, second.put(text.bytes()), 5)
    got = second.call(SYS.read, reader, place, 5)
    batch.run(second)
    assert (got.value, place.bytes()) == (5, b"hello")
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("argument", range(6))
def test_each_argument_can_be_a_result(way, argument):
    # mmap(0, 4096, PROT_NONE, PRIVATE|ANONYMOUS, -1, 0) with one argument taken from an earlier result
    values = [0, 4096, 0, 0x22, 0xFFFFFFFFFFFFFFFF, 0]
    table = CallTable()
    # the results: 0 by lseek, a negative number by a failing call, any other by the size of a file
    with open("/dev/null", "rb") as null:
        zero = table.call(SYS.lseek, null.fileno(), 0, os.SEEK_SET)
        if argument in (0, 2, 5):
            values[argument] = zero
        elif argument == 4:
            values[argument] = table.call(SYS.close, -1 & 0xFFFFFFFF, ignore=True)
        else:
            size = table.call(SYS.memfd_create, table.path("x"), 0)
            want = values[argument]
            table.call(SYS.ftruncate, size, want)
            values[argument] = table.call(SYS.lseek, size, 0, os.SEEK_END)
            table.call(SYS.close, size)
        mapped = table.call(SYS.mmap, *values)
        table.call(SYS.munmap, mapped, 4096)
        batch.run(table)
    assert mapped.value > 0


def test_it_stops_at_the_first_error_and_names_it(way):
    table = CallTable()
    fine = table.call(SYS.getpid)
    ignored = table.call(SYS.close, 0xFFFFFFFF, ignore=True)
    table.call(SYS.fsync, 0xFFFFFFFF, label="syncing nothing")
    never = table.call(SYS.getpid)
    with pytest.raises(CallError) as caught:
        batch.run(table)
    assert (caught.value.errno, caught.value.index) == (errno.EBADF, 2)
    assert "syncing nothing" in str(caught.value)
    assert fine.value == os.getpid()
    assert ignored.value == -errno.EBADF
    with pytest.raises(RuntimeError):
        assert never.value


def test_an_empty_table_runs(way):
    batch.run(CallTable())


def test_rows_have_their_own_arguments_and_records(way):
    pipes = [os.pipe() for _ in range(100)]
    words = [b"%04d" % i for i in range(100)]
    rows = Rows(100)
    out = rows.numbers([w for _, w in pipes])
    into = rows.numbers([r for r, _ in pipes])
    wrote = rows.call(SYS.write, out, rows.data(words), rows.numbers([4] * 100))
    got = rows.room(8)
    # the length is the result of the same row's first call
    rows.call(SYS.read, into, got, wrote)
    failed = rows.call(SYS.read, 0xFFFFFFFF, got, 1, ignore=True)
    rows.run()
    assert got.all() == [word + bytes(4) for word in words]
    assert wrote.values() == [4] * 100
    assert failed.values() == [-errno.EBADF] * 100
    for pipe in pipes:
        for fd in pipe:
            os.close(fd)


def test_a_row_that_fails_is_named(way):
    rows = Rows(3)
    rows.call(SYS.fsync, rows.numbers([1 << 20, 1 << 20, 1 << 20]), ignore=True)
    rows.call(SYS.dup3, rows.numbers([0, 1 << 20, 0]), rows.numbers([900, 901, 902]), 0, label="copying")
    with pytest.raises(RowError) as caught:
        rows.run()
    assert (caught.value.row, caught.value.errno, caught.value.label) == (1, errno.EBADF, "copying")
    os.close(900)


def test_no_rows_are_no_calls():
    rows = Rows(0)
    field = rows.room(4)
    result = rows.call(SYS.getpid)
    rows.run()
    assert (field.all(), result.values()) == ([], [])
