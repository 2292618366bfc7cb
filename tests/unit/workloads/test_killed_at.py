"""A kill put into a table leaves what the other calls do as it was."""

import os
import signal

from tcpstate.kernel.calls import ENTRY, CallTable
from tcpstate.kernel.machine import SYS
from tests.workloads.killed_at import _insert_kill


def calls(table: CallTable) -> list[tuple[int, ...]]:
    """(number, first argument or the entry whose result it is) of each call, undo calls last."""
    image = table.image(0)
    first = table.entries(0)[0]
    found = []
    for at in range(first, len(image), ENTRY.size):
        nr, argument, *_, flags = ENTRY.unpack_from(image, at)
        found.append((nr, (argument - first) // ENTRY.size if flags >> 8 & 1 else argument))
    return found


def test_results_go_where_they_went() -> None:
    for index in range(3):
        table = CallTable()
        one = table.call(SYS.dup, 7)
        two = table.call(SYS.dup, one)
        table.call(SYS.close, two)
        table.undo(SYS.close, one)
        _insert_kill(table, index)
        found = calls(table)
        assert found.pop(index) == (SYS.kill, os.getpid())
        # entries behind the kill have moved by one
        at = {number: number + (number >= index) for number in range(3)}
        assert found == [(SYS.dup, 7), (SYS.dup, at[0]), (SYS.close, at[1]), (SYS.close, at[0])]
        assert table._calls[index][1][1] == signal.SIGKILL
