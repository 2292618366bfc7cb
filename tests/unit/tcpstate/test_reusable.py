"""Tables that are built once: refilled, larger than a slab, one per thread."""

import os
import threading

import pytest

from tcpstate.kernel import batch
from tcpstate.kernel.columns import Reusable, RowError
from tcpstate.kernel.machine import SYS


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
