"""Running a table of system calls in our own process.

The routine of :mod:`tcpstate.kernel.machine` walks the table in one go, without the interpreter and without its lock.
Where executable memory is refused (a security module, ``TCPMIG_NO_BATCH=1``) plain calls walk the same table, slower.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
from collections.abc import Callable

from tcpstate.kernel.calls import ENTRY, ENTRY_SIZE, IGNORE_ERROR, RET_OFFSET, CallTable, indirect
from tcpstate.kernel.machine import ROUTINE

__all__ = ["NO_BATCH", "libc", "run", "syscall", "walk"]

#: environment variable: anything but empty or ``0`` makes plain calls walk the tables
NO_BATCH = "TCPMIG_NO_BATCH"

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

_Routine = Callable[[int, int], int]


def syscall(nr: int, *args: int) -> int:
    """One system call by number; OSError if it fails."""
    result: int = libc.syscall(ctypes.c_long(nr), *[ctypes.c_ulong(a) for a in args])
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


@functools.cache
def _machine_routine() -> _Routine | None:
    """The routine in executable memory of ours, for the life of the process; None if that is refused."""
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    code.write(ROUTINE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    # Never writable and executable at once: that is what security modules look for first.
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if libc.mprotect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC):
        return None
    prototype = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)
    function = prototype(address)
    # the mapping must live as long as the function
    function._code = code  # type: ignore[attr-defined]
    return function


def _plain_walk(first: int, end: int) -> int:
    """What the machine routine does, call by call."""
    here = first
    while here < end:
        nr, *args, _, out, flags = ENTRY.unpack(ctypes.string_at(here, ENTRY_SIZE))
        for i in range(6):
            if flags & indirect(i):
                args[i] = ctypes.c_uint64.from_address(args[i]).value
        try:
            result = syscall(nr, *args)
        except OSError as error:
            result = -(error.errno or errno.EIO)
        ctypes.c_int64.from_address(here + RET_OFFSET).value = result
        if out:
            ctypes.c_int64.from_address(out).value = result
        if result < 0 and not flags & IGNORE_ERROR and result >= -4095:
            return here
        here += ENTRY_SIZE
    return here


def walk(first: int, end: int) -> int:
    """Make the calls of the entries from address ``first`` up to ``end``.

    Returns the address of the entry that failed, or ``end``.

    Entries, and all that they point to, must lie in memory of this process that stays where it is.
    """
    routine = None if os.environ.get(NO_BATCH, "0") not in ("", "0") else _machine_routine()
    return (routine or _plain_walk)(first, end)


def run(table: CallTable) -> None:
    """Make the calls of ``table`` in this process and load the results into it.

    Raises :class:`~tcpstate.kernel.calls.CallError` at the first call that fails and does not ignore errors.
    """
    memory = (ctypes.c_char * (table.size + table.ALIGN))()
    base = ctypes.addressof(memory)
    base += -base % table.ALIGN
    image = table.image(base)
    ctypes.memmove(base, bytes(image), len(image))
    first, end = table.entries(base)
    stopped = walk(first, end)
    table.load(ctypes.string_at(base, len(image)), (stopped - first) // ENTRY_SIZE)
