"""Room for thousands of descriptors, of our own and of new processes. Source: getrlimit(2), RLIMIT_NOFILE."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Collection, Iterator
from typing import Final

from checkpoint.errors import TooManyDescriptors

__all__ = ["allow", "ensure_descriptors", "gaps"]

#: descriptors that the tool needs besides one per open file
_OWN_DESCRIPTORS: Final = 256


def ensure_descriptors(count: int) -> None:
    """Raise our own soft limit of descriptors so that ``count`` open files fit; TooManyDescriptors if they cannot."""
    needed = count + _OWN_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, needed))
            return
        raise TooManyDescriptors(f"{needed} descriptors are needed, the hard limit is {hard}", object="RLIMIT_NOFILE")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(needed, soft), hard))


def allow(pid: int, highest: int) -> None:
    """Raise a new process's own soft limit for the time being; its real limits are given to it later.
    TooManyDescriptors."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft > highest:
        return
    if hard != resource.RLIM_INFINITY and hard <= highest:
        hard = highest + 1
    try:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, hard))
    except (ValueError, OSError):
        raise TooManyDescriptors(f"descriptor {highest} is beyond the limit", object=f"pid {pid}") from None


def gaps(kept: Collection[int], end: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the numbers below ``end`` that are not among those."""
    start, found = 0, sorted(kept)
    if found and found[-1] - found[0] == len(found) - 1:
        # thousands, one after the other
        if found[0]:
            yield 0, found[0]
        start, found = found[-1] + 1, []
    for number in found:
        if start < number:
            yield start, number
        start = number + 1
    if start < end:
        yield start, end
