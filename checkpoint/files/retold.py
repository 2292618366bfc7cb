"""Connections that were told ahead of the stop and have changed since: of most of them only numbers are told again.

See :mod:`tcpstate.retold`.  Docs: docs/design/connection-precopy.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from checkpoint.errors import BadFileRecord
from checkpoint.files.base import OpenFile
from checkpoint.files.peers import StandIn
from checkpoint.files.tcpfile import TcpFile
from checkpoint.files.treefiles import AheadFiles
from tcpstate import retold
from tcpstate.retold import ROW, told_again
from tcpstate.slotted import dataclass

__all__ = ["Retold", "join", "split"]


Options = dict[str, tuple[int, ...]]
#: those of a server's connections are few; the list of them is searched
_OPTIONS_MAX: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Retold:
    """Connections told ahead, as they are now.

    indexes  which
    numbers  of each a row (:data:`tcpstate.retold.ROW`)
    queues   of each what is in its send queue, and then what is in its receive queue
    options  what some have, numbered from 1; 0 are those that were told
    """

    indexes: tuple[int, ...]
    numbers: bytes
    queues: bytes
    options: tuple[Options, ...] = ()

    def __post_init__(self) -> None:
        if len(self.indexes) * ROW.size != len(self.numbers):
            raise ValueError("indexes and numbers of connections do not agree")


def split(files: Mapping[int, OpenFile], told: Sequence[OpenFile]) -> tuple[dict[int, OpenFile], Retold | None]:
    """What is told of ``files`` (by index): those that must be whole, and the others, the first of whose files were
    ``told`` ahead."""
    whole: dict[int, OpenFile] = {}
    indexes, rows, queues, options = list[int](), list[bytes](), list[bytes](), list[Options]()
    for index, file in files.items():
        row = _row(told[index], file, options) if index < len(told) else None
        if row is None or not isinstance(file, TcpFile) or file.connection is None:
            whole[index] = file
            continue
        indexes.append(index)
        rows.append(row)
        queues += (file.connection.send_queue, file.connection.receive_queue)
    if not indexes:
        return whole, None
    return whole, Retold(
        indexes=tuple(indexes), numbers=b"".join(rows), queues=b"".join(queues), options=tuple(options)
    )


def _row(before: OpenFile, now: OpenFile, options: list[Options]) -> bytes | None:
    if not isinstance(before, TcpFile) or not isinstance(now, TcpFile):
        return None
    first, last = before.connection, now.connection
    if first is None or last is None:
        return None
    # pieces of its queues come as pages, or a stand-in for its other end goes with it
    if now.received or now.to_send or now.stand_in is not StandIn.NONE or now.flags != before.flags:
        return None
    which = 0
    if last.options != first.options:
        if last.options not in options:
            if len(options) == _OPTIONS_MAX:
                return None
            options.append(last.options)
        which = 1 + options.index(last.options)
    return retold.numbers(first, last, which)


def join(retold: Retold | None, told: AheadFiles | None) -> dict[int, OpenFile]:
    """The files that :func:`split` told so, by index. BadFileRecord."""
    if retold is None:
        return {}
    files: Sequence[OpenFile] = () if told is None else told.files
    queues, at = memoryview(retold.queues), 0
    found: dict[int, OpenFile] = {}
    for index, row in zip(retold.indexes, ROW.iter_unpack(retold.numbers), strict=True):
        before = files[index] if 0 <= index < len(files) else None
        if not isinstance(before, TcpFile) or before.connection is None or index in found:
            raise BadFileRecord("numbers of a connection that was not told, or twice", object=f"file {index}")
        middle = at + row[-3]
        end = middle + row[-2]
        if row[-1] > len(retold.options):
            raise BadFileRecord("options that were not told", object=before.conn_id)
        options = retold.options[row[-1] - 1] if row[-1] else before.connection.options
        if end > len(queues):
            raise BadFileRecord("queues are shorter than was told", object=before.conn_id)
        try:
            now = told_again(before.connection, row, options, bytes(queues[at:middle]), bytes(queues[middle:end]))
        except ValueError as error:
            raise BadFileRecord(f"it cannot go on so: {error}", object=before.conn_id) from None
        found[index] = TcpFile(flags=before.flags, family=before.family, conn_id=before.conn_id, connection=now)
        at = end
    if at != len(queues):
        raise BadFileRecord("queues are longer than was told", object="FILES_DELTA")
    return found
