"""The bytes of TCP queues outside the records: tens of megabytes are not packed, unpacked and copied on their way.

They travel as PAGES frames (spaces ``received`` and ``sent``, by index in FILES), like memory.  What a receive queue
holds already when the processes stop is sent before the freeze (:mod:`tcpstate.early`); FILES_DELTA tells with each
connection how many such bytes count, and that its record goes on behind them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from checkpoint.errors import BadFileRecord
from checkpoint.image.frames import DATA_MAX, PageRun, Space
from tcpstate.segment import SEQ_MASK

if TYPE_CHECKING:
    from checkpoint.files.tcpfile import TcpFile
    from tcpstate.record import ConnectionRecord

__all__ = ["LARGE", "Queues", "apart", "queue_runs"]

#: bytes of a queue from which on it is worth frames of its own
LARGE: Final = 64 << 10
#: pieces up to this length are copied, so that the buffer they came in can be used again
_COPIED: Final = 256 << 10
#: no socket buffer is larger
_QUEUE_MAX: Final = 1 << 31


def queue_runs(space: Space, index: int, data: memoryview, start: int) -> Iterator[PageRun]:
    """``data``, which lies ``start`` bytes into a queue, in frames."""
    for at in range(0, len(data), DATA_MAX):
        piece = data[at : at + DATA_MAX]
        yield PageRun(space=space, id=index, runs=((start + at, len(piece)),), data=piece)


def apart(record: TcpFile, index: int) -> tuple[TcpFile, list[PageRun]]:
    """A file whose connection was exported, with large queues taken out of it, and the frames of those."""
    connection = record.connection
    if connection is None:
        return record, []
    runs: list[PageRun] = []
    received, to_send, sent = record.received, 0, 0
    if len(connection.receive_queue) > LARGE:
        runs += queue_runs(Space.RECEIVED, index, memoryview(connection.receive_queue), received)
        received += len(connection.receive_queue)
        connection = dataclasses.replace(connection, receive_queue=b"")
    if len(connection.send_queue) > LARGE:
        runs += queue_runs(Space.SENT, index, memoryview(connection.send_queue), 0)
        to_send, sent = len(connection.send_queue), connection.sent
        connection = dataclasses.replace(connection, send_queue=b"", snd_nxt=connection.snd_una)
    if not runs:
        return record, []
    return dataclasses.replace(record, connection=connection, received=received, to_send=to_send, sent=sent), runs


class Queues:
    """What has come of queues."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[Space, int], list[memoryview]] = {}
        self._lengths: dict[tuple[Space, int], int] = {}

    def take(self, run: PageRun) -> bool:
        """One more piece; whether its memory is needed from now on. A piece at 0 begins anew. BadFileRecord."""
        key = run.space, run.id
        (start, length), *more = run.runs
        if start == 0:
            self._pieces[key] = []
            self._lengths[key] = 0
        if more or start != self._lengths.get(key) or start + length >= _QUEUE_MAX:
            raise BadFileRecord("the pieces of a queue do not follow each other", object=f"file {run.id}")
        copied = length <= _COPIED
        self._pieces[key].append(memoryview(bytes(run.data)) if copied else run.data)
        self._lengths[key] += length
        return not copied

    def whole(self, record: TcpFile, index: int) -> tuple[TcpFile, list[memoryview]]:
        """The file with what was taken out of it but for its early bytes: the pieces of those. BadFileRecord."""
        connection = self.to_send(record, index)
        if connection is None:
            return record, []
        early = self._of(Space.RECEIVED, index, record.received) if record.received else []
        return dataclasses.replace(record, connection=connection, received=0, to_send=0, sent=0), early

    def to_send(self, record: TcpFile, index: int) -> ConnectionRecord | None:
        """The connection with its send queue. BadFileRecord."""
        connection = record.connection
        if connection is not None and record.to_send:
            data = b"".join(self._of(Space.SENT, index, record.to_send))
            try:
                sent = (connection.snd_una + record.sent) & SEQ_MASK
                return dataclasses.replace(connection, send_queue=data, snd_nxt=sent)
            except ValueError as error:
                raise BadFileRecord(f"its send queue does not fit: {error}", object=record.conn_id) from None
        return connection

    def _of(self, space: Space, index: int, length: int) -> list[memoryview]:
        found = self._lengths.get((space, index), 0)
        if found != length:
            raise BadFileRecord(f"{found} bytes of a queue came, {length} were told", object=f"file {index}")
        return self._pieces[space, index]

    def clear(self) -> None:
        """Forget all."""
        self._pieces.clear()
        self._lengths.clear()
