"""The file through which a test, the runner and the cases speak: mapped by all, so that nobody needs a call to read it.

A case may have any state, also one in which it can neither open nor read anything; its memory it can always look at.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

__all__ = ["DIED", "FAILED", "GO", "PASSED", "QUIT", "READY", "SLOT", "Control"]

#: orders, at the beginning of the file
GO, QUIT = 1, 2
#: what a case says, at the beginning of its slot; then the length of a text, and the text
READY, PASSED, FAILED, DIED = 1, 2, 3, 4
SLOT = 16 << 10
_WORD = struct.Struct("<I")


class Control:
    """The mapped file. Slot 0 holds the order, slot N + 1 what case N says."""

    def __init__(self, path: Path, slots: int = 0) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if slots:
                os.ftruncate(fd, SLOT * (slots + 1))
            self._memory = mmap.mmap(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)

    @property
    def order(self) -> int:
        return int(_WORD.unpack_from(self._memory)[0])

    @order.setter
    def order(self, value: int) -> None:
        _WORD.pack_into(self._memory, 0, value)

    def state(self, slot: int) -> int:
        return int(_WORD.unpack_from(self._memory, SLOT * (slot + 1))[0])

    def text(self, slot: int) -> str:
        at = SLOT * (slot + 1)
        (length,) = _WORD.unpack_from(self._memory, at + 4)
        return self._memory[at + 8 : at + 8 + length].decode(errors="replace")

    def say(self, slot: int, state: int, text: str = "") -> None:
        at = SLOT * (slot + 1)
        data = text.encode(errors="replace")[-(SLOT - 16) :]
        self._memory[at + 8 : at + 8 + len(data)] = data
        _WORD.pack_into(self._memory, at + 4, len(data))
        # last: who sees it may read the text
        _WORD.pack_into(self._memory, at, state)
