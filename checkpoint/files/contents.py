"""The bytes of files that travel along, read for an image."""

from __future__ import annotations

from collections.abc import Iterator

from checkpoint.files.table import FileTable
from checkpoint.image.format import PageRun
from checkpoint.image.frames import Space
from checkpoint.memory.pages import chunks

__all__ = ["of_contents"]


def of_contents(files: FileTable) -> Iterator[PageRun]:
    """All of them, holes left out. A run is valid until the next one is asked for."""
    for index in range(len(files.contents)):
        for runs in chunks((start, start + length) for start, length in files.content_runs(index)):
            data = b"".join(files.read_content(index, start, length) for start, length in runs)
            if data:
                yield PageRun(space=Space.CONTENT, id=index, runs=runs, data=memoryview(data))
