"""Tables of system calls: built here, walked by the batch routine, in our own process or in a stopped one.

A table is a data area followed by entries.  An argument is a number, a place in the data area (:class:`Data`), or the
result of an earlier call (:class:`Result`), which the routine loads through a pointer when it gets there.  Addresses
are resolved when the table is placed, so the same table can be built before it is known where it will run.

Entry, 80 bytes, little endian::

    0  nr        8..55  a0 .. a5        56  ret        64  out        72  flags

After each call the result goes to ``ret`` and, where ``out`` is not zero, to the eight bytes at ``out``.  The walk
stops at the first error (-4095 .. -1) unless the entry ignores errors.  Flags: bit 0 ignore an error; bit 8+i: argument
i is the address of the argument.
"""

from __future__ import annotations

import errno
import itertools
import os
import struct
from typing import ClassVar, NamedTuple

__all__ = ["ENTRY_SIZE", "IGNORE_ERROR", "CallError", "CallTable", "Data", "Result", "indirect"]

ENTRY = struct.Struct("<7QqQQ")
ENTRY_SIZE = ENTRY.size
_POINTER = struct.Struct("<Q")
RET_OFFSET = 56
IGNORE_ERROR = 1
#: what stands as the result of a call before it is made
NOT_MADE = -1
_MASK = (1 << 64) - 1


def indirect(argument: int) -> int:
    """The flag that says that argument 0 .. 5 is to be loaded from the address in the entry."""
    return 1 << (8 + argument)


class CallError(OSError):
    """A call of a table failed; the calls after it were not made.

    index, label  which call
    """

    def __init__(self, error: int, index: int, label: str) -> None:
        super().__init__(error, f"{label or f'call {index}'}: {os.strerror(error)}")
        self.index = index
        self.label = label


class Data(NamedTuple):
    """A place in the data area of a table. ``data + 8`` is the place eight bytes further on."""

    table: CallTable
    offset: int
    size: int

    def __add__(self, offset: int) -> Data:  # type: ignore[override]
        return Data(self.table, self.offset + offset, self.size - offset)

    def bytes(self, size: int | None = None) -> bytes:
        """What stands there: before the run as put, after it as the calls left it."""
        end = self.offset + (self.size if size is None else size)
        return bytes(self.table._data[self.offset : end])

    def u32(self, at: int = 0) -> int:
        """The unsigned 32-bit number at byte ``at``."""
        return int.from_bytes(self.bytes(at + 4)[at:], "little")

    def u64(self, at: int = 0) -> int:
        """The unsigned 64-bit number at byte ``at``."""
        return int.from_bytes(self.bytes(at + 8)[at:], "little")


class Result(NamedTuple):
    """What a call of the table returned, once it has run; before that, a value to be passed to later calls."""

    table: CallTable
    index: int  # type: ignore[assignment]  # of the call; tuples have a method of that name

    @property
    def value(self) -> int:
        """The call's result; negative: -errno (of a call that ignores errors). RuntimeError if it has not run."""
        values = self.table._results
        if self.index >= len(values):
            raise RuntimeError(f"call {self.index} ({self.table._labels[self.index]}) has not run")
        return values[self.index]

    @property
    def ok(self) -> bool:
        """Whether the call succeeded."""
        return not -4096 < self.value < 0


Argument = int | Data | Result


class CallTable:
    """System calls to be made one after another. See the module's docstring."""

    #: what a placed table's data area is aligned to
    ALIGN: ClassVar[int] = 16

    __slots__ = ("_calls", "_data", "_labels", "_pointers", "_results", "_undo", "asked")

    def __init__(self) -> None:
        #: whether somebody will ask for results or data, if all goes well
        self.asked = True
        self._data = bytearray()
        self._calls: list[tuple[int, tuple[Argument, ...], Data | None, int]] = []
        self._labels: list[str] = []
        self._pointers: list[tuple[int, Data]] = []
        self._results: list[int] = []
        self._undo: list[tuple[int, tuple[Argument, ...]]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def put(self, data: bytes | bytearray | memoryview, align: int = 8) -> Data:
        """Bytes that calls read (or write: they are read back after the run)."""
        self._data += bytes(-len(self._data) % align)
        offset = len(self._data)
        self._data += data
        return Data(self, offset, len(data))

    def room(self, size: int, align: int = 8) -> Data:
        """Zeroed bytes that calls write."""
        return self.put(bytes(size), align)

    def path(self, path: str | bytes) -> Data:
        """A path (or other text) with the zero byte at its end."""
        return self.put(os.fsencode(path) + b"\0", 1)

    def pointer(self, at: Data, to: Data) -> None:
        """The eight bytes at ``at`` shall hold the address of ``to`` (structures that point to others: iovecs, msghdrs,
        sock_fprog, clone_args)."""
        self._pointers.append((at.offset, to))

    def call(self, nr: int, *args: Argument, ignore: bool = False, out: Data | None = None, label: str = "") -> Result:
        """One more call. ``label`` names it in errors; ``out``: where in the data area the result goes as well."""
        if len(args) > 6:
            raise ValueError("a system call has at most six arguments")
        self._calls.append((nr, args, out, IGNORE_ERROR if ignore else 0))
        self._labels.append(label)
        return Result(self, len(self._calls) - 1)

    def extend(self, other: CallTable) -> None:
        """All calls of another table, which has no undo calls, after ours; its results and data stay its own's to ask
        for, where nothing is loaded."""
        self._labels += other._labels
        if not other._data and not any(isinstance(one, Result) for _, args, _, _ in other._calls for one in args):
            self._calls += other._calls
            return
        self._data += bytes(-len(self._data) % self.ALIGN)
        place, index = len(self._data), len(self._calls)
        self._data += other._data
        self._pointers += [(at + place, Data(self, to.offset + place, to.size)) for at, to in other._pointers]

        def moved(argument: Argument) -> Argument:
            if isinstance(argument, Data):
                return Data(self, argument.offset + place, argument.size)
            return Result(self, argument.index + index) if isinstance(argument, Result) else argument

        for nr, args, out, flags in other._calls:
            to = None if out is None else Data(self, out.offset + place, out.size)
            self._calls.append((nr, tuple(map(moved, args)), to, flags))

    def undo(self, nr: int, *args: Argument) -> None:
        """A call that takes back an earlier one (closes what that opened). Undo calls are made, in this order, only in
        another process, by itself, if the tool dies; their errors are ignored. The table itself is then finished
        first. The result of a call that was not made counts as -1, which no call takes for a descriptor or an address.
        """
        if len(args) > 6:
            raise ValueError("a system call has at most six arguments")
        self._undo.append((nr, args))

    @property
    def size(self) -> int:
        """Bytes that the placed table takes."""
        return self._entries_offset() + ENTRY_SIZE * (len(self._calls) + len(self._undo))

    def _entries_offset(self) -> int:
        return len(self._data) + -len(self._data) % self.ALIGN

    def entries(self, base: int) -> tuple[int, int]:
        """(first entry, end) of the table when placed at ``base``."""
        start = base + self._entries_offset()
        return start, start + ENTRY_SIZE * len(self._calls)

    def undo_entries(self, base: int) -> tuple[int, int]:
        """(first entry, end) of the undo calls of the table when placed at ``base``."""
        start = self.entries(base)[1]
        return start, start + ENTRY_SIZE * len(self._undo)

    def image(self, base: int) -> bytearray:
        """The table's bytes, for the address ``base`` (aligned to ALIGN)."""
        start = base + self._entries_offset()
        out = bytearray(self._data)
        for at, to in self._pointers:
            _POINTER.pack_into(out, at, base + to.offset)
        out += bytes(-len(out) % self.ALIGN)
        undo = ((nr, args, None, IGNORE_ERROR) for nr, args in self._undo)
        pack = ENTRY.pack
        for nr, args, result_to, flags in itertools.chain(self._calls, undo):
            values = [0, 0, 0, 0, 0, 0]
            for i, arg in enumerate(args):
                if isinstance(arg, int):
                    values[i] = arg & _MASK
                elif isinstance(arg, Data):
                    values[i] = base + arg.offset
                else:
                    values[i] = start + ENTRY_SIZE * arg.index + RET_OFFSET
                    flags |= indirect(i)
            out += pack(nr, *values, NOT_MADE, 0 if result_to is None else base + result_to.offset, flags)
        return out

    def load(self, image: bytes | bytearray | memoryview, done: int) -> None:
        """Take over a placed table as the routine left it. ``done``: the entries that it passed (a failed one is not
        counted). CallError if it stopped before the end."""
        offset = self._entries_offset()
        count = min(done + 1, len(self._calls))
        self._results = [struct.unpack_from("<q", image, offset + ENTRY_SIZE * i + RET_OFFSET)[0] for i in range(count)]
        self._data[:] = image[: len(self._data)]
        if done < len(self._calls):
            error = -self._results[done]
            raise CallError(error if 0 < error < 4096 else errno.EIO, done, self._labels[done])
