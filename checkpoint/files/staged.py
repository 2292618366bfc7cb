"""Shared memory in rounds of pre-copy: the target's half.

Contents that are told before the stop are made as those of FILES are, and written while the processes run at the
source.  FILES says which of its contents go on from there; the others are given up.

Decisions: docs/design/precopy.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from checkpoint.errors import BadFileRecord, FileRebuildFailed
from checkpoint.files.abi import Seal
from checkpoint.files.content import Content, ContentKind, punch, put
from checkpoint.files.treefiles import TreeFiles
from checkpoint.image.frames import PageRun, Runs
from tcpstate.slotted import dataclass

__all__ = ["STAGED_MAX", "Staged", "StagedContents", "goes_on"]

#: contents that may be told ahead
STAGED_MAX = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedContents:
    """The record CONTENTS: by number, contents whose bytes follow (PAGES of the space ``staged``) while the processes
    run; those that were told before stay."""

    contents: dict[int, Content]

    def __post_init__(self) -> None:
        for number, content in self.contents.items():
            if not 0 <= number < STAGED_MAX:
                raise ValueError(f"content {number} is out of range")
            if content.kind not in (ContentKind.MEMFD, ContentKind.SHARED) or content.huge:
                raise ValueError("such contents are not told ahead")


def goes_on(told: Content, now: Content) -> bool:
    """Whether a file that was made as ``told`` can become ``now``, with other bytes."""
    if (told.kind, told.name, told.huge) != (now.kind, now.name, now.huge):
        return False
    if told.kind is ContentKind.SHARED:
        return told.size == now.size
    # whether a memfd can be sealed is settled when it is made
    return (told.seals == Seal.SEAL) == (now.seals == Seal.SEAL)


class Staged:
    """The files. ``path``: maps the source's paths to ours."""

    def __init__(self, path: Callable[[str], str]) -> None:
        self._path = path
        self._made: dict[int, tuple[Content, int]] = {}

    def tell(self, record: StagedContents) -> None:
        """Make those that are told. BadFileRecord if one is there already, FileRebuildFailed."""
        for number, content in record.contents.items():
            if number in self._made:
                raise BadFileRecord("a content is told twice", object=f"content {number}")
            self._made[number] = content, content.make(self._path)

    def _of(self, number: int) -> tuple[Content, int]:
        if number not in self._made:
            raise BadFileRecord("bytes of a content that was not told", object=f"content {number}")
        return self._made[number]

    def write(self, run: PageRun) -> None:
        """Bytes of one of them. BadFileRecord, FileRebuildFailed."""
        content, fd = self._of(run.id)
        # a memfd may have grown since it was told
        limit = content.size if content.kind is ContentKind.SHARED else 1 << 62
        put(content, fd, run.runs, run.data, size=limit, name=f"content {run.id}")

    def drop(self, runs: Runs) -> None:
        """Holes. BadFileRecord, FileRebuildFailed."""
        _, fd = self._of(runs.id)
        punch(fd, runs.runs, f"content {runs.id}")

    def provide(self, files: TreeFiles, give: Callable[[int, int], None]) -> None:
        """Those contents of FILES that were told here: ``give`` takes index and descriptor. BadFileRecord."""
        for index, number in files.staged.items():
            give(index, self._hand_over(number, files.contents[index]))

    def _hand_over(self, number: int, now: Content) -> int:
        """The file, as large as it is ``now``; its descriptor is the caller's."""
        told, fd = self._of(number)
        if not goes_on(told, now):
            raise BadFileRecord("another file was told ahead", object=f"content {number}")
        del self._made[number]
        if now.kind is ContentKind.MEMFD:
            try:
                os.ftruncate(fd, now.size)
                os.fchown(fd, now.uid, now.gid)
                os.fchmod(fd, now.mode)
            except OSError as error:
                os.close(fd)
                raise FileRebuildFailed(f"memfd: {error.strerror}", object=now.name) from error
        return fd

    def close(self) -> None:
        """What nobody wanted. May be repeated."""
        while self._made:
            os.close(self._made.popitem()[1][1])
