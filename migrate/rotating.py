"""``checkpoint --every``: images one after the other, each building on the one before; the oldest go.

``FILE.000001``, ``FILE.000002``, ...; FILE itself is a symbolic link to the newest.  Every so many an image builds on
none, so that no chain grows without end and the oldest images can go: an image goes when it is not among the newest and
none of those that stay takes pages from it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import field

from checkpoint.errors import ImageError, ImageNotWritten
from migrate.errors import RotationName
from migrate.snapsummary import CheckpointSummary
from tcpstate.slotted import dataclass

__all__ = ["FULL", "KEEP", "Plan", "Rotation"]

_log = logging.getLogger(__name__)

#: images that stay, and how many there are from one that builds on none to the next
KEEP, FULL = 10, 10

_NUMBER = re.compile(r"\d{6,}\Z")


@dataclass(slots=True)
class Plan:
    """Which image builds on which; no files.

    keep  so many of the newest stay
    full  every so many an image builds on none
    """

    keep: int = KEEP
    full: int = FULL
    _chains: dict[int, tuple[int, ...]] = field(default_factory=dict)
    #: the newest is not to be built on
    broken: bool = False

    @property
    def parent(self) -> int | None:
        """The number of the image that the next one builds on."""
        newest = max(self._chains, default=None)
        if newest is None or self.broken or len(self._chains[newest]) + 1 >= self.full:
            return None
        return newest

    def made(self, number: int, parent: int | None) -> list[int]:
        """The next one is there; the numbers of those that go now."""
        self.broken = False
        self._chains[number] = () if parent is None else (*self._chains[parent], parent)
        stay = sorted(self._chains)[-self.keep :]
        needed = {*stay, *(older for one in stay for older in self._chains[one])}
        gone = sorted(self._chains.keys() - needed)
        for one in gone:
            del self._chains[one]
        return gone


class Rotation:
    """The files. Those of an earlier run are counted on from, and left alone.

    path  FILE. RotationName if there is something else of that name.
    """

    def __init__(self, path: str, plan: Plan) -> None:
        self._path = os.path.abspath(path)
        self._plan = plan
        if os.path.lexists(self._path) and not os.path.islink(self._path):
            raise RotationName("it would be a link to the newest image, and is something else", object=path)
        directory, name = os.path.split(self._path)
        ends = [entry.removeprefix(name + ".") for entry in os.listdir(directory) if entry.startswith(name + ".")]
        self._next = max((int(end) for end in ends if _NUMBER.match(end)), default=0) + 1

    def _file(self, number: int) -> str:
        return f"{self._path}.{number:06}"

    def another(self, make: Callable[[str, str], CheckpointSummary]) -> CheckpointSummary:
        """One more image: ``make(file, parent)`` writes it. OSError if the link or an old image cannot be changed."""
        number = self._next
        try:
            parent = self._plan.parent
            summary = make(self._file(number), "" if parent is None else self._file(parent))
        except ImageNotWritten:
            raise
        except ImageError as error:
            # somebody has taken or changed the one before
            _log.warning("%s: an image that builds on none is made", error)
            self._plan.broken = True
            parent = None
            summary = make(self._file(number), "")
        self._next = number + 1
        link = f"{self._path}.{secrets.token_hex(4)}.tmp"
        os.symlink(os.path.basename(self._file(number)), link)
        os.rename(link, self._path)
        for old in self._plan.made(number, parent):
            # by somebody else's hand
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._file(old))
        return summary
