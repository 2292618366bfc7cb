"""Pointers inside the data area of a table of system calls."""

from __future__ import annotations

import struct

from tcpstate.kernel.calls import CallTable


def test_pointer_holds_the_address_of_its_target_wherever_the_table_is_placed():
    table = CallTable()
    payload = table.put(b"payload")
    record = table.put(struct.pack("<QQ", 7, 0))
    table.pointer(record + 8, payload + 3)
    for base in (0x1000, 0x7F00_0000_0000):
        image = table.image(base)
        assert struct.unpack_from("<QQ", image, record.offset) == (7, base + payload.offset + 3)
