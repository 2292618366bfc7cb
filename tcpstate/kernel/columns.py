"""The same system calls for thousands of sockets: a table made of columns.

A :class:`Rows` holds ``count`` rows, one per socket; each row makes the same calls with its own arguments and has its
own record of memory for what they read and write.  The table is filled by one strided assignment per argument, not
call by call, and only for a slab of rows: the next slab runs in the same table, which stays in the processor's cache.

Two threads take every other slab each if there are :data:`WIDE` rows or more, and two processors: the calls hold no
lock of the interpreter, and sockets know nothing of each other.

::

    rows = Rows(len(socks))
    fd = rows.numbers([s.fileno() for s in socks])
    mss = rows.getsockopt(fd, Level.TCP, Tcp.MAXSEG, 4)
    rows.run()
    mss.u32()         # a list, one number per row

A table that is wanted again and again is built once and then only filled; that is most of the cost where there are few
rows::

    def build(rows: Rows) -> tuple[Column, Field]:
        fd = rows.column()
        return fd, rows.getsockopt(fd, Level.TCP, Tcp.MAXSEG, 4)

    sizes = Reusable(build)

    rows, (fd, mss) = sizes.of(len(socks))
    fd.set(s.fileno() for s in socks)
    rows.run()
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field
from typing import Any, Generic, Protocol, TypeVar

from tcpstate.kernel import batch
from tcpstate.kernel.calls import ENTRY_SIZE, IGNORE_ERROR, RET_OFFSET, indirect
from tcpstate.kernel.lanes import WIDE, both, processors
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["Column", "Field", "Reusable", "RowError", "RowResult", "Rows", "Shared", "make_all", "numbers_of"]

T = TypeVar("T")

_WORD = 8
_WORDS = ENTRY_SIZE // _WORD
_RET_WORD = RET_OFFSET // _WORD
_FLAGS_WORD = _WORDS - 1
_MASK = (1 << 64) - 1
#: rows of a slab
_SLAB = 128


class RowError(OSError):
    """A call of a row failed; it was not finished, nor were most of the rows after it.

    row, label  which row's call
    """

    def __init__(self, error: int, row: int, label: str) -> None:
        super().__init__(error, f"{label}: {os.strerror(error)}")
        self.row = row
        self.label = label


@dataclass(slots=True, eq=False)
class Column:
    """An argument with its own value in each row."""

    values: array[int]

    def set(self, values: Iterable[int]) -> None:
        """What it is in the rows of the next run: one number per row. An array of 64-bit numbers is taken as it is."""
        self.values = _array("Q", values)


def _array(form: str, values: Iterable[int]) -> array[int]:
    """The values as unsigned numbers of this form, cut to its size."""
    if isinstance(values, array) and values.typecode == form:
        return values
    if not isinstance(values, list | range):
        values = list(values)
    try:
        return array(form, values)
    except OverflowError:
        mask = (1 << 8 * array(form).itemsize) - 1
        return array(form, [v & mask for v in values])


def numbers_of(socks: Sequence[HasNumber]) -> array[int]:
    """The descriptors of sockets, for :meth:`Column.set`: made once for all tables."""
    return array("Q", [s.fileno() for s in socks])


class HasNumber(Protocol):
    """A socket, a file."""

    def fileno(self) -> int:
        """Its descriptor."""


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
    _each: array[int] | None = field(default=None)
    _width: int = 1  # words of _each per row

    def part(self, offset: int, size: int) -> Field:
        """A place inside this one, for calls to point to."""
        if offset + size > self.size:
            raise ValueError(f"bytes {offset} to {offset + size} of a field of {self.size}")
        return Field(self.rows, self.offset + offset, size)

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

    def is_usual(self, row: int, usual: bytes) -> bool:
        """Whether :meth:`value` is ``usual``, told faster. RuntimeError of fields that no getsockopt writes."""
        length = self.length_field
        if length is None:
            raise RuntimeError("this field is not the value of a getsockopt")
        memory, at = self.rows.memory, row * self.rows.record_size
        return memory.startswith(usual, at + self.offset) and memory.startswith(
            len(usual).to_bytes(4, sys.byteorder), at + length.offset
        )

    def results(self) -> list[int]:
        """What the getsockopt that wrote it returned, per row. RuntimeError of other fields."""
        return self._call.values()

    def failed(self, row: int) -> bool:
        """Whether the getsockopt that was to write it failed in one row. RuntimeError of other fields."""
        return self.rows.returned[row * self.rows.calls + self._call.call] < 0

    @property
    def _call(self) -> RowResult:
        if self.result is None:
            raise RuntimeError("this field is not the value of a getsockopt")
        return self.result

    def whole(self, row: int) -> bytes:
        """All bytes of the field of one row."""
        start = row * self.rows.record_size + self.offset
        return bytes(self.rows.memory[start : start + self.size])

    def fill(self, data: bytes) -> None:
        """What each row's field holds before the run. Before the first run of the table only."""
        self._same = data

    def set(self, values: Iterable[int]) -> None:
        """A 32-bit number of its own for each row of the next run."""
        self._each, self._width = _array("I", values), 1

    def set_bytes(self, values: Sequence[bytes]) -> None:
        """Bytes of its own for each row of the next run, no more than the field holds."""
        sizes = set(map(len, values))
        longest = max(sizes, default=0)
        if longest > self.size:
            raise ValueError(f"a value is longer than the {self.size} bytes of its field")
        self._width = max(1, -(-longest // 4))
        padded = 4 * self._width
        if sizes != {padded}:
            values = [value.ljust(padded, b"\0") for value in values]
        self._each = array("I", b"".join(values))

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


@dataclass(frozen=True, slots=True, eq=False)
class RowResult:
    """What a call returned, row by row; before the run an argument for later calls of the same row."""

    rows: Rows
    call: int

    def values(self) -> list[int]:
        """One result per row; negative: -errno (of a call that ignores errors)."""
        return self.rows.returned[self.call :: self.rows.calls].tolist()


Argument = int | Column | Field | Shared | RowResult


class Rows:
    """``count`` rows of the same calls. See the module's docstring."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.record_size = 0
        #: after a run: the records of all rows, and what all calls returned
        self.memory = bytearray()
        self.returned: array[int] = array("q")
        self._slab = 0
        self._initial = b""
        self._lanes: list[_Lane] = []
        self._fields: list[Field] = []
        self._calls: list[tuple[int, tuple[Argument, ...], int]] = []
        self._labels: list[str] = []

    @property
    def calls(self) -> int:
        """Calls per row."""
        return len(self._calls)

    def column(self) -> Column:
        """An argument that is :meth:`Column.set` before each run."""
        return Column(array("Q"))

    def numbers(self, values: Iterable[int]) -> Column:
        """An argument: one number (a descriptor, a length, an address) per row."""
        column = _array("Q", values)
        if len(column) != self.count:
            raise ValueError(f"{len(column)} values for {self.count} rows")
        return Column(column)

    def shared(self, data: bytes) -> Shared:
        """Bytes that all rows read; they live as long as the table does."""
        return Shared(ctypes.create_string_buffer(data, max(1, len(data))))

    def reader(self, *parts: tuple[Field, str]) -> struct.Struct:
        """What reads the records of all rows at once (``reader.iter_unpack(rows.memory)``), a tuple per row: the parts
        in the order in which their fields were made, each with its format. Numbers are the machine's."""
        formats, at = ["="], 0
        for place, form in parts:
            formats.append(f"{place.offset - at}x{form}")
            at = place.offset + struct.calcsize("=" + form)
        return struct.Struct("".join(formats) + f"{self.record_size - at}x")

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
        made.set(values)
        return made

    def data(self, values: Sequence[bytes]) -> Field:
        """Bytes of its own in each row's record; as large as the longest."""
        made = self.room(max((len(v) for v in values), default=0) or 1)
        made.set_bytes(values)
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
        self.memory = bytearray()
        self.returned = array("q")
        if not self.count or not self._calls:
            return
        if not self._slab:
            self.place(self.count)
        self.memory = bytearray(self.count * self.record_size)
        self.returned = array("q", bytes(self.count * self.calls * _WORD))
        if self.count < WIDE or processors() < 2:
            self._run_lane(self._lanes[0], range(0, self.count, self._slab), self.count, [])
            return
        if len(self._lanes) == 1:
            self._lanes.append(self._lane())
        # not one half after the other but turn by turn: the first rows of a table are the first that fail
        self._run_both(self._lanes[0], self._lanes[1])

    def _run_both(self, mine: _Lane, theirs: _Lane) -> None:
        """Every other slab on another thread."""
        failed: list[BaseException] = []

        def run(number: int) -> None:
            lane, first = (mine, theirs)[number], number * self._slab
            try:
                self._run_lane(lane, range(first, self.count, 2 * self._slab), self.count, failed)
            except BaseException as error:
                failed.append(error)

        both(run)
        if failed:
            # the failure of a call tells more than what came after it
            rows = [error for error in failed if isinstance(error, RowError)]
            raise min(rows, key=lambda error: error.row) if len(rows) == len(failed) else failed[0]

    def _run_lane(self, lane: _Lane, starts: range, end: int, failed: list[BaseException]) -> None:
        for start in starts:
            if failed:
                return
            self._run_slab(lane, start, min(self._slab, end - start))

    def place(self, count: int) -> None:
        """Give the table its place in memory, for runs of about ``count`` rows. It takes no more calls then."""
        self._slab = slab = min(_SLAB, count)
        template = bytearray(self.record_size)
        for f in self._fields:
            template[f.offset : f.offset + len(f._same)] = f._same
        self._initial = bytes(template) * slab
        self._lanes = [self._lane()]

    def _lane(self) -> _Lane:
        records, slab = bytearray(self._initial), self._slab
        base = ctypes.addressof(ctypes.c_char.from_buffer(records)) if records else 0
        row = array("Q")
        for nr, args, flags in self._calls:
            words = [nr, 0, 0, 0, 0, 0, 0, 0, 0, flags]
            for i, arg in enumerate(args):
                if isinstance(arg, int):
                    words[1 + i] = arg & _MASK
                elif isinstance(arg, Shared):
                    words[1 + i] = arg.address
                elif isinstance(arg, RowResult):
                    words[_FLAGS_WORD] |= indirect(i)
            row.extend(words)
        entries = row * slab
        inputs = []
        start, _ = entries.buffer_info()
        for index, (_, args, _) in enumerate(self._calls):
            for i, arg in enumerate(args):
                word = index * _WORDS + 1 + i
                place = slice(word, None, len(row))
                if isinstance(arg, Column):
                    inputs.append((word, arg))
                elif isinstance(arg, Field):
                    entries[place] = _steps(base + arg.offset, self.record_size, slab)
                elif isinstance(arg, RowResult):
                    at = start + (arg.call * _WORDS + _RET_WORD) * _WORD
                    entries[place] = _steps(at, len(row) * _WORD, slab)
        return _Lane(records, entries, inputs)

    def _run_slab(self, lane: _Lane, start: int, count: int) -> None:
        """Rows ``start`` to ``start + count``: filled, run, and what they brought kept."""
        size, step, entries, records = self.record_size, self.record_size // 4, lane.entries, lane.records
        records[:] = self._initial
        with memoryview(records).cast("I") as words:
            for f in self._fields:
                if f._each is not None:
                    width = f._width
                    values = memoryview(f._each)[start * width : (start + count) * width]
                    for at in range(width):
                        first = f.offset // 4 + at
                        words[first : first + step * (count - 1) + 1 : step] = values[at::width]
        row_words = self.calls * _WORDS
        for word, column in lane.inputs:
            entries[word : count * row_words : row_words] = column.values[start : start + count]
        first, _ = entries.buffer_info()
        end = first + count * row_words * _WORD
        stopped = batch.walk(first, end)
        self.memory[start * size : (start + count) * size] = memoryview(records)[: count * size]
        results = entries[_RET_WORD : count * row_words : _WORDS]
        self.returned[start * self.calls : (start + count) * self.calls] = array("q", results.tobytes())
        if stopped != end:
            index = (stopped - first) // ENTRY_SIZE
            error = (1 << 64) - entries[index * _WORDS + _RET_WORD]
            row, call = divmod(index, self.calls)
            raise RowError(error if 0 < error < 4096 else errno.EIO, start + row, self._labels[call])


@dataclass(frozen=True, slots=True, eq=False)
class _Lane:
    """One place of a table in memory: records, calls, and which words of a row's calls are columns."""

    records: bytearray
    entries: array[int]
    inputs: list[tuple[int, Column]]


class Reusable(Generic[T]):
    """A table that each thread builds once. ``build`` makes its calls in the rows it is given, with
    :meth:`Rows.column`, :meth:`Rows.room` and :meth:`Field.set` for what differs from run to run, and returns what the
    user wants to fill and read.

    What a run brought must be read before the same table is asked for again.
    """

    def __init__(self, build: Callable[[Rows], T]) -> None:
        self._build = build
        self._made = threading.local()
        _reusable.append(self)

    def of(self, count: int) -> tuple[Rows, T]:
        """The table for ``count`` rows, and what ``build`` returned."""
        made: tuple[Rows, T] | None = getattr(self._made, "table", None)
        if made is None:
            rows = Rows(_SLAB)
            made = self._made.table = rows, self._build(rows)
            rows.place(_SLAB)
        made[0].count = count
        return made


_reusable: list[Reusable[Any]] = []


def make_all() -> None:
    """Let this thread build every :class:`Reusable` table now, not at its first use."""
    for table in _reusable:
        table.of(0)


def _steps(start: int, step: int, count: int) -> array[int]:
    return array("Q", range(start, start + step * count, step))
