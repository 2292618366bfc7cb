"""The same system calls for thousands of sockets: a table made of columns.

A :class:`Rows` holds ``count`` rows, one per socket; each row makes the same calls with its own arguments and has its
own record of memory for what they read and write.  The table is filled by one strided assignment per argument, not
call by call, so that building it costs less than running it (0.2 - 4 us per row).

::

    rows = Rows(len(socks))
    fd = rows.numbers([s.fileno() for s in socks])
    mss = rows.getsockopt(fd, Level.TCP, Tcp.MAXSEG, 4)
    rows.run()
    mss.u32()         # a list, one number per row
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tcpstate.kernel import batch
from tcpstate.kernel.calls import ENTRY_SIZE, IGNORE_ERROR, RET_OFFSET, indirect
from tcpstate.kernel.machine import SYS

__all__ = ["Column", "Field", "RowError", "RowResult", "Rows", "Shared"]

_WORD = 8
_WORDS = ENTRY_SIZE // _WORD
_RET_WORD = RET_OFFSET // _WORD
_FLAGS_WORD = _WORDS - 1
_MASK = (1 << 64) - 1


class RowError(OSError):
    """A call of a row failed; it and the rows after it were not finished.

    row, label  which row's call
    """

    def __init__(self, error: int, row: int, label: str) -> None:
        super().__init__(error, f"{label}: {os.strerror(error)}")
        self.row = row
        self.label = label


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """An argument with its own value in each row."""

    values: array[int]


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """Bytes that the calls of all rows read."""

    memory: ctypes.Array[ctypes.c_char]

    @property
    def address(self) -> int:
        """Where they lie."""
        return ctypes.addressof(self.memory)


@dataclass(slots=True, eq=False)
class Field:
    """A place in each row's record. Before the run it may be filled, after it read.

    ``result``: what the call returned that wrote it, if :meth:`Rows.getsockopt` made it.
    """

    rows: Rows
    offset: int
    size: int
    length_field: Field | None = None
    result: RowResult | None = None
    _same: bytes = b""
    _each: array[int] | Sequence[bytes] | None = field(default=None)

    def u32(self, at: int = 0) -> list[int]:
        """The unsigned 32-bit number at byte ``at`` of each row."""
        return memoryview(self.rows.memory).cast("I")[self._every_row(at)].tolist()

    def i32(self, at: int = 0) -> list[int]:
        """The signed 32-bit number at byte ``at`` of each row."""
        return memoryview(self.rows.memory).cast("i")[self._every_row(at)].tolist()

    def _every_row(self, at: int) -> slice:
        return slice((self.offset + at) // 4, None, self.rows.record_size // 4)

    def value(self, row: int) -> bytes:
        """The field of one row; of a getsockopt's value only as much as the call returned."""
        start = row * self.rows.record_size + self.offset
        size = self.size if self.length_field is None else self.length_field.length_of(row)
        return bytes(self.rows.memory[start : start + size])

    def results(self) -> list[int]:
        """What the getsockopt that wrote it returned, per row. RuntimeError of other fields."""
        if self.result is None:
            raise RuntimeError("this field is not the value of a getsockopt")
        return self.result.values()

    def whole(self, row: int) -> bytes:
        """All bytes of the field of one row."""
        start = row * self.rows.record_size + self.offset
        return bytes(self.rows.memory[start : start + self.size])

    def fill(self, data: bytes) -> None:
        """What each row's field holds before the run."""
        self._same = data

    def length_of(self, row: int) -> int:
        """The 32-bit number of one row (this field is the length of another)."""
        value: int = struct.unpack_from("i", self.rows.memory, row * self.rows.record_size + self.offset)[0]
        return value

    def all(self) -> list[bytes]:
        """:meth:`value` of each row."""
        memory, step = bytes(self.rows.memory), self.rows.record_size
        starts = range(self.offset, self.offset + step * self.rows.count, step)
        if self.length_field is None:
            return [memory[start : start + self.size] for start in starts]
        lengths = self.length_field.u32()
        return [memory[start : start + length] for start, length in zip(starts, lengths, strict=True)]

    def differing(self, usual: bytes) -> list[int]:
        """The rows whose value is not ``usual``, found by whole columns."""
        size = len(usual)
        if size % 4:
            return [row for row, value in enumerate(self.all()) if value != usual]
        found: set[int] = set()
        columns = [(self.u32(4 * i), word) for i, word in enumerate(struct.unpack(f"{size // 4}I", usual))]
        if self.length_field is not None:
            columns.append((self.length_field.u32(), size))
        for column, word in columns:
            if column.count(word) != len(column):
                found.update(row for row, number in enumerate(column) if number != word)
        return sorted(found)


@dataclass(frozen=True, slots=True, eq=False)
class RowResult:
    """What a call returned, row by row; before the run an argument for later calls of the same row."""

    rows: Rows
    call: int

    def values(self) -> list[int]:
        """One result per row; negative: -errno (of a call that ignores errors)."""
        raw = self.rows.entries[self.call * _WORDS + _RET_WORD :: self.rows.calls * _WORDS]
        return array("q", raw.tobytes()).tolist()


Argument = int | Column | Field | Shared | RowResult


class Rows:
    """``count`` rows of the same calls. See the module's docstring."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.record_size = 0
        self.memory = bytearray()
        self.entries: array[int] = array("Q")
        self._fields: list[Field] = []
        self._calls: list[tuple[int, tuple[Argument, ...], int]] = []
        self._labels: list[str] = []

    @property
    def calls(self) -> int:
        """Calls per row."""
        return len(self._calls)

    def numbers(self, values: Iterable[int]) -> Column:
        """An argument: one number (a descriptor, a length, an address) per row."""
        column = array("Q", [v & _MASK for v in values])
        if len(column) != self.count:
            raise ValueError(f"{len(column)} values for {self.count} rows")
        return Column(column)

    def shared(self, data: bytes) -> Shared:
        """Bytes that all rows read; they live as long as the table does."""
        return Shared(ctypes.create_string_buffer(data, max(1, len(data))))

    def room(self, size: int) -> Field:
        """``size`` bytes in each row's record, zeroed."""
        made = Field(self, self.record_size, size)
        self.record_size += size + -size % _WORD
        self._fields.append(made)
        return made

    def constant(self, data: bytes) -> Field:
        """The same initial bytes in each row's record (for values that calls change: lengths)."""
        made = self.room(len(data))
        made._same = data
        return made

    def u32(self, values: Iterable[int]) -> Field:
        """A 32-bit number of its own in each row's record."""
        made = self.room(4)
        made._each = array("I", [v & 0xFFFFFFFF for v in values])
        return made

    def data(self, values: Sequence[bytes]) -> Field:
        """Bytes of its own in each row's record; as large as the longest."""
        made = self.room(max((len(v) for v in values), default=0) or 1)
        made._each = values
        return made

    def call(self, nr: int, *args: Argument, ignore: bool = False, label: str = "") -> RowResult:
        """One more call for each row; with ``ignore`` a failure does not stop the rows after it."""
        self._calls.append((nr, args, IGNORE_ERROR if ignore else 0))
        self._labels.append(label or f"system call {nr}")
        return RowResult(self, len(self._calls) - 1)

    def getsockopt(
        self, fd: Argument, level: int, option: int, size: int, *, ignore: bool = False, initial: bytes = b""
    ) -> Field:
        """Read an option of ``size`` bytes (at most) into each row's record; where that fails, ``initial`` stays."""
        value, length = self.room(size), self.constant(struct.pack("i", size))
        value._same = initial[:size]
        value.length_field = length
        value.result = self.call(
            SYS.getsockopt, fd, level, option, value, length, ignore=ignore, label=f"getsockopt {option!r}"
        )
        return value

    def setsockopt(self, fd: Argument, level: Argument, option: Argument, value: Argument, *, size: Argument = 4,
                   ignore: bool = False, label: str = "") -> RowResult:  # fmt: skip
        """Set an option. ``value``: a place, or a plain number for all rows."""
        if isinstance(value, int):
            value = self.shared(struct.pack("i", value))
        return self.call(
            SYS.setsockopt, fd, level, option, value, size, ignore=ignore, label=label or f"setsockopt {option!r}"
        )

    def run(self) -> None:
        """Make the calls, row by row. :class:`RowError` at the first failure that is not ignored."""
        if not self.count or not self._calls:
            return
        self._place_records()
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) if self.memory else 0
        self._place_entries(base)
        first, length = self.entries.buffer_info()
        end = first + length * _WORD
        stopped = batch.walk(first, end)
        if stopped != end:
            index = (stopped - first) // ENTRY_SIZE
            word = self.entries[index * _WORDS + _RET_WORD]
            error = (1 << 64) - word
            row, call = divmod(index, self.calls)
            raise RowError(error if 0 < error < 4096 else errno.EIO, row, self._labels[call])

    def _place_records(self) -> None:
        size = self.record_size
        template = bytearray(size)
        for f in self._fields:
            template[f.offset : f.offset + len(f._same)] = f._same
        self.memory = bytearray(bytes(template) * self.count)
        for f in self._fields:
            if isinstance(f._each, array):
                memoryview(self.memory).cast("I")[f.offset // 4 :: size // 4] = memoryview(f._each)
            elif f._each is not None:
                for row, data in enumerate(f._each):
                    start = row * size + f.offset
                    self.memory[start : start + len(data)] = data

    def _place_entries(self, base: int) -> None:
        template = array("Q")
        for nr, args, flags in self._calls:
            words = [nr, 0, 0, 0, 0, 0, 0, 0, 0, flags]
            for i, arg in enumerate(args):
                if isinstance(arg, int):
                    words[1 + i] = arg & _MASK
                elif isinstance(arg, Shared):
                    words[1 + i] = arg.address
                elif isinstance(arg, RowResult):
                    words[_FLAGS_WORD] |= indirect(i)
            template.extend(words)
        self.entries = template * self.count
        row_words = len(template)
        start, _ = self.entries.buffer_info()
        for index, (_, args, _) in enumerate(self._calls):
            for i, arg in enumerate(args):
                place = slice(index * _WORDS + 1 + i, None, row_words)
                if isinstance(arg, Column):
                    self.entries[place] = arg.values
                elif isinstance(arg, Field):
                    self.entries[place] = _steps(base + arg.offset, self.record_size, self.count)
                elif isinstance(arg, RowResult):
                    at = start + (arg.call * _WORDS + _RET_WORD) * _WORD
                    self.entries[place] = _steps(at, row_words * _WORD, self.count)


def _steps(start: int, step: int, count: int) -> array[int]:
    return array("Q", range(start, start + step * count, step))
