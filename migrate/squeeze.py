"""Compression of the image's bytes on their way (zstd), where it makes a slow line faster. No sockets; the clock is
the caller's.

What a line carries and what compression gains is measured on the bytes themselves, all the time: a chunk is sent
compressed if compressing it and sending what is left takes less time than sending it as it is.  On a line as fast as
memory the answer is no, and costs :data:`_TRIALS` of the time once the line has shown what it can do.

Source: RFC 8878 (zstd).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final

from migrate.errors import BadFrame

__all__ = ["FEATURE", "Squeeze", "agreed", "expand"]

#: of :func:`migrate.hostfacts.features`: this program reads compressed image bytes
FEATURE: Final = "zstd"

#: the quickest of its ordinary levels; higher ones gain a tenth and take twice as long
_LEVEL = 1
#: shorter chunks are records, or little in every case
SHORTEST = 64 << 10
#: the part of the time that may go into compressing a chunk now and then to see what it gains, as long as none is
_TRIALS = 0.02
#: bytes after which the line has shown its rate: what the buffers on the way take at once says nothing
_SHOWN = 8 << 20
#: seconds of sending that a rate is measured over, at least, ..
_WINDOW = 0.05
#: .. again after so many seconds (compressed bytes may not fill the line: they do not tell), ..
_AGAIN = 20.0
#: .. and bytes per second above which no trial is made: more than zstd can do on one processor
_FAST = 600e6
#: compressed has to be so much quicker: it takes a processor that others can use
_GAIN = 0.8


class Squeeze:
    """Decides for each chunk, and compresses it.

    clock  seconds, monotonic
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        import zstandard

        # the size of the content is in the result: the reader checks it before it takes any memory
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True)
        self._clock = clock
        self._shown = 0
        self._window = (0, 0.0)
        self._measured = 0.0
        #: bytes per second of the line; 0: not known yet
        self.line = 0.0
        #: bytes per second that are compressed, and what is left of one; 0: not known yet
        self.pace, self.left = 0.0, 1.0
        #: seconds of sending that must pass before the next trial
        self._patience = 0.0
        #: bytes before and after, of the chunks that went compressed
        self.squeezed = (0, 0)

    def sent(self, count: int, seconds: float) -> None:
        """``count`` bytes have gone into the line as they were, which took so long."""
        self._shown += count
        self._patience -= seconds
        if self._shown <= _SHOWN:
            return
        bytes_, took = self._window[0] + count, self._window[1] + seconds
        self._window = bytes_, took
        if took >= _WINDOW or bytes_ >= _FAST * _WINDOW:
            self.line = bytes_ / max(took, 1e-9)
            self._window = 0, 0.0
            self._measured = self._clock()

    @property
    def pays(self) -> bool:
        """Whether the next chunk is likely to be quicker compressed."""
        if not self.line or not self.pace:
            return False
        return 1 / self.pace + self.left / self.line < _GAIN / self.line

    def chunk(self, pieces: Sequence[bytes | bytearray | memoryview]) -> bytes | None:
        """These bytes compressed, or None: they are to be sent as they are, and told to :meth:`sent`."""
        length = sum(map(len, pieces))
        if length < SHORTEST or not self.line or self.line >= _FAST:
            return None
        began = self._clock()
        if not self.pays:
            if self._patience > 0:
                return None
        elif began > self._measured + _AGAIN:
            self._shown = 0
            self._measured = math.inf  # until it is
            return None
        elif self._measured == math.inf:
            return None
        # piece by piece: put together before, they would be copied
        one = self._compressor.compressobj(size=length)
        packed = b"".join([*map(one.compress, pieces), one.flush()])
        took = max(self._clock() - began, 1e-9)
        pace, left = length / took, len(packed) / length
        self._patience = took / _TRIALS
        # half of it new: memory changes its nature from one mapping to the next
        self.pace, self.left = ((self.pace + pace) / 2, (self.left + left) / 2) if self.pace else (pace, left)
        if len(packed) >= length:
            return None
        self.squeezed = self.squeezed[0] + length, self.squeezed[1] + len(packed)
        return packed


def agreed(wanted: bool, theirs: Collection[str]) -> Squeeze | None:
    """What compresses, if the user does not mind and the other side (its features) reads it."""
    return Squeeze() if wanted and FEATURE in theirs else None


def expand(data: bytes | bytearray | memoryview, limit: int) -> bytes:
    """What was compressed. BadFrame unless it is one zstd frame that tells its size, at most ``limit`` bytes, truly."""
    import zstandard

    try:
        size = zstandard.frame_content_size(data)
        if not 0 < size <= limit:
            raise BadFrame(f"compressed image bytes claim to be {size} bytes")
        # what has no more room than it claims cannot become more
        found: bytes = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadFrame(f"compressed image bytes cannot be read: {error}") from error
    return found
