"""Tables of system calls: how they are laid out, and what comes back from a walk."""

from __future__ import annotations

import errno
import struct

import pytest

from tcpstate.kernel.calls import ENTRY_SIZE, IGNORE_ERROR, CallError, CallTable, indirect

BASE = 0x7F0000000000


def entries(image: bytearray, table: CallTable) -> list[tuple[int, ...]]:
    start, end = (a - BASE for a in table.entries(BASE))
    return [struct.unpack_from("<7QqQQ", image, o) for o in range(start, end, ENTRY_SIZE)]


def test_arguments_are_numbers_places_and_earlier_results() -> None:
    table = CallTable()
    place = table.put(b"abc") + 1
    first = table.call(1, -1, place)
    table.call(2, first, 5, first, ignore=True, out=place)
    image = table.image(BASE)
    one, two = entries(image, table)
    assert one[:3] == (1, 2**64 - 1, BASE + 1)
    ret = table.entries(BASE)[0] + 56
    assert two[:4] == (2, ret, 5, ret)
    assert two[8] == BASE + 1
    assert two[9] == IGNORE_ERROR | indirect(0) | indirect(2)
    assert len(image) == table.size


def test_results_and_data_come_back() -> None:
    table = CallTable()
    room = table.room(8)
    call = table.call(7)
    with pytest.raises(RuntimeError, match="has not run"):
        _ = call.value
    image = table.image(BASE)
    image[0:8] = struct.pack("<Q", 77)
    struct.pack_into("<q", image, table.entries(BASE)[0] - BASE + 56, 42)
    table.load(image, 1)
    assert (call.value, call.ok, room.u64(), room.u32()) == (42, True, 77, 77)


def test_a_failed_call_is_named_and_those_after_it_have_not_run() -> None:
    table = CallTable()
    table.call(1, label="the first")
    bad = table.call(2, label="the second")
    after = table.call(3)
    image = table.image(BASE)
    struct.pack_into("<q", image, table.entries(BASE)[0] - BASE + ENTRY_SIZE + 56, -errno.EPERM)
    with pytest.raises(CallError, match="the second") as caught:
        table.load(image, 1)
    assert (caught.value.errno, caught.value.index) == (errno.EPERM, 1)
    assert not bad.ok
    with pytest.raises(RuntimeError):
        _ = after.value


def test_seven_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="six"):
        CallTable().call(1, 1, 2, 3, 4, 5, 6, 7)
