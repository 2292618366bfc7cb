"""Tables that are built once: refilled, larger than a slab, one per thread."""

import os
import struct
import threading
from fcntl import F_GETFL

import pytest

from tcpstate.kernel import batch, columns
from tcpstate.kernel.columns import Reusable, RowError
from tcpstate.kernel.machine import SYS
from tcpstate.rows import portions


@pytest.fixture(params=["0", "1"], ids=["machine code", "plain calls"], autouse=True)
def way(request, monkeypatch):
    monkeypatch.setenv(batch.NO_BATCH, request.param)


def copying():
    """Each row reads what it wrote to a pipe."""

    def build(rows):
        out, into, word, got = rows.column(), rows.column(), rows.room(8), rows.room(8)
        rows.call(SYS.write, out, word, 8)
        result = rows.call(SYS.read, into, got, 8)
        return out, into, word, rows.reader((got, "Q")), result

    return Reusable(build)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 200])
def test_it_is_filled_anew_for_any_number_of_rows(count):
    table = copying()
    reader, writer = os.pipe()
    for turn in range(3):
        rows, (out, into, word, values, result) = table.of(count)
        words = [(turn * 1000 + i).to_bytes(8, "little") for i in range(count)]
        out.set([writer] * count)
        into.set([reader] * count)
        word.set_bytes(words)
        rows.run()
        assert [v.to_bytes(8, "little") for (v,) in values.iter_unpack(rows.memory)] == words
        assert result.values() == [8] * count
    os.close(reader)
    os.close(writer)


def test_the_row_that_fails_is_counted_over_all_slabs():
    table = Reusable(lambda rows: (fd := rows.column(), rows.call(SYS.fcntl, fd, 1, 0, label="looking"))[:1])
    rows, (fd,) = table.of(150)
    fd.set([0] * 140 + [1 << 20] * 10)
    with pytest.raises(RowError, match="looking") as caught:
        rows.run()
    assert caught.value.row == 140


def test_a_value_that_is_too_long_is_refused():
    _, (_, _, word, _, _) = copying().of(1)
    with pytest.raises(ValueError, match="longer"):
        word.set_bytes([bytes(9)])


def test_a_column_of_another_length_is_refused():
    rows, (out, into, word, _, _) = copying().of(3)
    out.set([1])
    into.set([1])
    word.set_bytes([b"a", b"b", b"c"])
    with pytest.raises(ValueError, match="size"):
        rows.run()


def test_each_thread_has_its_own():
    table = copying()
    found = [table.of(1)[0]]
    thread = threading.Thread(target=lambda: found.append(table.of(1)[0]))
    thread.start()
    thread.join()
    assert found[0] is not found[1]
    assert table.of(2)[0] is found[0]


@pytest.fixture
def two_lanes(monkeypatch):
    monkeypatch.setattr(columns, "WIDE", 300)
    monkeypatch.setattr(columns, "processors", lambda: 2)


def counting():
    """Each row copies the descriptor that it is given: its status flags are read, and a word of its own comes back."""

    def build(rows):
        fd, word = rows.column(), rows.room(12)
        return fd, word, rows.call(SYS.fcntl, fd, F_GETFL, 0, label="looking"), rows.reader((word, "III"))

    return Reusable(build)


@pytest.mark.parametrize("count", [299, 300, 301, 512, 1000])
def test_a_wide_table_runs_on_two_threads_and_each_row_has_its_own(two_lanes, monkeypatch, count):
    ran = set()
    walk = batch.walk

    def seen(first, end):
        ran.add(threading.get_ident())
        return walk(first, end)

    monkeypatch.setattr(batch, "walk", seen)
    files = [os.open("/dev/null", flags) for flags in (os.O_RDONLY, os.O_WRONLY)]
    table = counting()
    for turn in range(2):
        ran.clear()
        rows, (fd, word, result, reader) = table.of(count)
        fd.set([files[(i + turn) % 2] for i in range(count)])
        words = [struct.pack("III", i, turn, i * i) for i in range(count)]
        word.set_bytes(words)
        rows.run()
        assert [value & os.O_ACCMODE for value in result.values()] == [(i + turn) % 2 for i in range(count)]
        assert list(reader.iter_unpack(rows.memory)) == [struct.unpack("III", w) for w in words]
        assert len(ran) == (2 if count >= 300 else 1)
    for file in files:
        os.close(file)


@pytest.mark.parametrize("bad", [[0], [700], [140, 700], [700, 999]])
def test_of_failures_on_two_threads_one_that_happened_is_told(two_lanes, bad):
    table = counting()
    rows, (fd, *_) = table.of(1000)
    fd.set([1 << 20 if i in bad else 0 for i in range(1000)])
    with pytest.raises(RowError, match="looking") as caught:
        rows.run()
    assert caught.value.row in bad
    rows, (fd, _, result, _) = table.of(1000)
    fd.set([0] * 1000)
    rows.run()
    assert len(result.values()) == 1000


def test_where_no_thread_can_be_had_one_does_it_all(two_lanes, monkeypatch):
    def full(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    rows, (fd, word, result, reader) = counting().of(1000)
    fd.set([0] * 1000)
    word.set_bytes([struct.pack("III", i, 0, 0) for i in range(1000)])
    rows.run()
    assert [i for i, _, _ in reader.iter_unpack(rows.memory)] == list(range(1000))
    assert min(result.values()) >= 0


def test_what_goes_wrong_on_the_other_thread_is_raised_here(two_lanes):
    rows, (fd, *_) = counting().of(1000)
    fd.set([0] * 140)
    with pytest.raises(ValueError, match="size"):
        rows.run()
    assert threading.active_count() == 1


@pytest.mark.parametrize("lengths", [[], [1], [5, 5, 5, 5], [10], [11, 1], [3, 20, 3], [1] * 25])
def test_portions_are_all_of_it_in_order_and_small(monkeypatch, lengths):
    monkeypatch.setattr("tcpstate.rows._PORTION", 10)
    parts = [lengths[part] for part in portions(lengths)]
    assert [length for part in parts for length in part] == lengths
    assert all(part and (len(part) == 1 or sum(part) <= 10) for part in parts)
