"""Two listings of the kernel's, of thousands of rows, compared: what of the one is not in the other.

Both are nearly the same, so they are compared as bytes, in stretches as long as they agree; only rows that differ are
looked at.  Which row comes first is told by its key, by which both are sorted.  Whatever their order: a row of the one
that is not told to differ is in the other, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

__all__ = ["differing"]

_Key = TypeVar("_Key", int, tuple[int, int])
#: rows of the first stretch, and of the longest
_FIRST: Final = 16
_LONGEST: Final = 4096


def differing(old: bytes, new: bytes, size: int, key: Callable[[bytes], _Key]) -> tuple[list[bytes], list[bytes]]:
    """(rows of ``old`` that ``new`` lacks, rows of ``new`` that ``old`` lacks), of ``size`` bytes each."""
    gone: list[bytes] = []
    fresh: list[bytes] = []
    if old == new:
        return gone, fresh
    at, now = 0, 0
    while at < len(old) and now < len(new):
        agreeing = _agreeing(old, at, new, now, size)
        at += agreeing
        now += agreeing
        one, other = old[at : at + size], new[now : now + size]
        if not one or not other:
            break
        first, second = key(one), key(other)
        if first <= second:
            gone.append(one)
            at += size
        if second <= first:
            fresh.append(other)
            now += size
    gone += [old[i : i + size] for i in range(at, len(old), size)]
    fresh += [new[i : i + size] for i in range(now, len(new), size)]
    return gone, fresh


def _agreeing(old: bytes, at: int, new: bytes, now: int, size: int) -> int:
    """How many bytes of whole rows are the same from these places on."""
    done, step = 0, _FIRST * size
    most = min(len(old) - at, len(new) - now)
    while done < most and old[at + done : at + done + step] == new[now + done : now + done + step]:
        done += step
        step = min(2 * step, _LONGEST * size)
    if done >= most:
        return most
    # somewhere in the next stretch they differ
    while step > size:
        half = step // (2 * size) * size
        if old[at + done : at + done + half] == new[now + done : now + done + half]:
            done += half
            step -= half
        else:
            step = half
    return min(done, most)
