"""An endless stream of bytes that both ends know: any byte lost, doubled, altered or moved shows at its position.

The stream of a seed is a row of blocks.  Block n is a stamp of 16 bytes, (seed, n), and a piece of a pool of random
bytes made from the seed; where the piece begins depends on n.  Making a block is one copy, so that the stream is as
fast as memory; the stamp tells blocks apart, however long the stream is.
"""

from __future__ import annotations

import random
import struct

__all__ = ["BLOCK", "RandomStream"]

STAMP = struct.Struct("=QQ")
BLOCK = 1 << 15
POOL = 1 << 20
STEP = 7919  # a prime: successive pieces begin at places that come back only after a whole pool


class RandomStream:
    """One direction: `take` what is to be sent, or `check` what came; the position goes on with both."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.position = 0
        self._pool = random.Random(seed).randbytes(POOL + BLOCK)
        self._number = -1
        self._block = b""

    def _at(self, number: int) -> bytes:
        if number != self._number:
            start = number * STEP % POOL
            self._block = STAMP.pack(self.seed, number) + self._pool[start : start + BLOCK - STAMP.size]
            self._number = number
        return self._block

    def peek(self) -> memoryview:
        """What comes next: the rest of the current block, at least one byte."""
        number, offset = divmod(self.position, BLOCK)
        return memoryview(self._at(number))[offset:]

    def advance(self, count: int) -> None:
        """So many bytes of `peek` were sent."""
        self.position += count

    def check(self, data: bytes) -> str:
        """Compare what came with what had to come; empty if equal, else what differs and where."""
        view = memoryview(data)
        while view:
            expected = self.peek()[: len(view)]
            if view[: len(expected)] != expected:
                differs = next(i for i, (a, b) in enumerate(zip(view, expected, strict=False)) if a != b)
                return f"byte {self.position + differs} of stream {self.seed}: {self._whence(bytes(view[differs:]))}"
            self.position += len(expected)
            view = view[len(expected) :]
        return ""

    def _whence(self, data: bytes) -> str:
        """Where in the stream these bytes belong, for the report: tells a loss from a repetition from damage."""
        piece = data[:64]
        for number in range(max(0, self.position // BLOCK - 400), self.position // BLOCK + 400):
            found = self._at(number).find(piece)
            if found >= 0:
                return f"there begins what belongs to byte {number * BLOCK + found}"
        return f"{piece[:16].hex()} occurs nowhere near"
