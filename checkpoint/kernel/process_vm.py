"""process_vm_readv(2) and process_vm_writev(2): copies between our memory and another process's, without a detour.

The kernel takes the pages of the other process as they are; it needs read (write) permission of the mapping, so that
PROT_NONE and read-only private memory must go through /proc/PID/mem.

Source: mm/process_vm_access.c.
"""

from __future__ import annotations

import array
import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["IOV_MAX", "address_of", "readv", "writev"]

#: ranges that one call takes (UIO_MAXIOV)
IOV_MAX = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_SIGNATURE: list[type[ctypes._SimpleCData[Any]]] = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
]
_readv = _libc.process_vm_readv
_readv.restype = ctypes.c_ssize_t
_readv.argtypes = _SIGNATURE
_writev = _libc.process_vm_writev
_writev.restype = ctypes.c_ssize_t
_writev.argtypes = _SIGNATURE


class _PyBuffer(ctypes.Structure):
    """Py_buffer (cpython/pybuffer.h): the only way to the address of a buffer that is read-only."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_PYBUF_SIMPLE = 0
_PYBUF_WRITABLE = 1
_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int]
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = [ctypes.POINTER(_PyBuffer)]
_release_buffer.restype = None


@contextmanager
def address_of(data: bytes | bytearray | memoryview, *, writable: bool = False) -> Iterator[int]:
    """The address of the bytes of ``data``, which stays where it is inside the block. BufferError if it is not
    contiguous, or not writable."""
    buffer = _PyBuffer()
    _get_buffer(data, buffer, _PYBUF_WRITABLE if writable else _PYBUF_SIMPLE)
    try:
        yield buffer.buf or 0
    finally:
        _release_buffer(buffer)


def readv(pid: int, local: int, ranges: Sequence[tuple[int, int]]) -> int:
    """Copy [(address, length)] of process ``pid`` to our address ``local``, one after the other; bytes copied.

    Fewer than asked for: the rest begins with memory that cannot be read. OSError: EFAULT if that is the first page,
    ESRCH, EPERM.
    """
    return _transfer(_readv, "process_vm_readv", pid, local, ranges)


def writev(pid: int, local: int, ranges: Sequence[tuple[int, int]]) -> int:
    """Copy from our address ``local`` to [(address, length)] of process ``pid``; as :func:`readv`."""
    return _transfer(_writev, "process_vm_writev", pid, local, ranges)


def _transfer(
    function: ctypes._NamedFuncPointer, name: str, pid: int, local: int, ranges: Sequence[tuple[int, int]]
) -> int:
    if not 0 < len(ranges) <= IOV_MAX:
        raise ValueError(f"{name} takes 1 to {IOV_MAX} ranges, not {len(ranges)}")
    there = array.array("Q", [word for each in ranges for word in each])
    here = array.array("Q", [local, sum(length for _, length in ranges)])
    result: int = function(pid, here.buffer_info()[0], 1, there.buffer_info()[0], len(ranges), 0)
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{name} of {pid}: {os.strerror(error)}")
    return result
