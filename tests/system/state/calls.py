"""System calls that Python has no name for, for the cases. Imports the standard library only."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable

__all__ = ["anonymous", "call", "flags_of", "libc", "prctl", "status", "threaded", "told_of"]

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def call(number: int, *args: object) -> int:
    """syscall(2). OSError."""
    plain = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = int(libc.syscall(ctypes.c_long(number), *plain))
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def prctl(option: int, *args: object) -> int:
    """prctl(2). OSError."""
    given = [*args, 0, 0, 0, 0][:4]
    return call(157, option, *given)


def status(name: str, tid: int | None = None) -> str:
    """A line of /proc/self/status, or of a thread."""
    path = "/proc/self/status" if tid is None else f"/proc/self/task/{tid}/status"
    with open(path) as file:
        return next(line.partition(":")[2].strip() for line in file if line.startswith(f"{name}:"))


def anonymous(pages: int, *, prot: int = 3, flags: int = 0x22, fd: int = -1, offset: int = 0, at: int = 0) -> int:
    """mmap(2): address of so many pages."""
    return call(9, at, pages * 4096, prot, flags, fd, offset)


def flags_of(address: int) -> list[str]:
    """VmFlags of the mapping in which an address lies."""
    return told_of(address, "VmFlags")


def told_of(address: int, name: str) -> list[str]:
    """The words of a line of smaps, of the mapping in which an address lies."""
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            first = line.split(" ")[0]
            if "-" in first and not first.endswith(":"):
                start, _, end = first.partition("-")
                inside = int(start, 16) <= address < int(end, 16)
            elif inside and line.startswith(f"{name}:"):
                return line.split()[1:]
    raise LookupError(hex(address))


class threaded:  # noqa: N801 - used as a function
    """A thread that sets something up, waits, and looks: ``first`` and ``then`` run in it. ``tid`` is its number."""

    def __init__(self, first: Callable[[], object], then: Callable[[object], None]) -> None:
        self._first, self._then = first, then
        self._ready, self._go = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        self.tid = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        self.tid = threading.get_native_id()
        try:
            found = self._first()
            self._ready.set()
            self._go.wait()
            self._then(found)
        except BaseException as error:
            self._failure = error
        finally:
            self._ready.set()

    def verify(self) -> None:
        """Let it look; what it raised."""
        self._go.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
