"""Memory that system calls write to, kept from call to call."""

from __future__ import annotations

import ctypes
import threading
from typing import Final

__all__ = ["Scratch"]

#: bytes that are kept at most
_KEPT: Final = 2 << 20


class Scratch(threading.local):
    """Where each thread reads queues to; kept, because the kernel zeroes every page of new memory."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(1)

    def of(self, size: int) -> ctypes.Array[ctypes.c_char]:
        """So many bytes of it, or more. Those that were handed out before are to be used no more."""
        if size > _KEPT:
            return ctypes.create_string_buffer(size)
        if size > len(self._memory):
            self._memory = ctypes.create_string_buffer(size)
        return self._memory
