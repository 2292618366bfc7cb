"""Numbers of processes, as a tree in a PID namespace of its own sees them, and as we do.

The engine works with our numbers; records have the tree's own.  In our PID namespace the two are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from checkpoint import procfs
from checkpoint.errors import NoSuchProcess
from checkpoint.files.base import OpenFile
from checkpoint.files.treefiles import TreeFiles
from checkpoint.image.format import PageRun
from checkpoint.image.frames import Runs, Space
from checkpoint.ipc.base import SystemV
from checkpoint.memory.layout import MemoryLayout
from checkpoint.namespaces.here import pairs_of
from checkpoint.records import LiveTree, ProcessRecord
from checkpoint.tree import Task

__all__ = ["Numbers"]

#: spaces of page frames that belong to a process, by its number
_OF_PROCESSES = frozenset({Space.MEMORY})
#: what in a process's place in the tree is a number; 0 stands for nobody everywhere
_NAMED = ("pid", "ppid", "pgid", "sid", "files", "directories")


class Numbers:
    """From our numbers to the tree's.

    pids  its processes, by our numbers

    Of what is done to records, nothing is if the tree is in our PID namespace.
    """

    def __init__(self, pids: Sequence[int] = ()) -> None:
        self._theirs: dict[int, int] = {}
        self.same = not pids or len(procfs.read_status(pids[0])["NSpid"].split()) == 1
        for pid in () if self.same else pids:
            try:
                self._theirs.update(pairs_of(pid))
                for tid in procfs.threads(pid):
                    self._theirs.update(pairs_of(pid, tid))
            except NoSuchProcess:
                continue  # of a tree that runs: it has just ended

    def __call__(self, number: int) -> int:
        """Of a process, thread, group or session; 0 of what is outside of the tree's namespace."""
        return number if self.same else self._theirs.get(number, 0)

    def task(self, task: Task) -> Task:
        """Its place in the tree."""
        if self.same:
            return task
        named = {name: self(getattr(task, name)) for name in _NAMED}
        return dataclasses.replace(task, **named)

    def processes(self, records: Iterable[ProcessRecord]) -> tuple[ProcessRecord, ...]:
        """The processes of a tree."""
        return tuple(one if self.same else dataclasses.replace(one, task=self.task(one.task)) for one in records)

    def live(self, tree: LiveTree) -> LiveTree:
        """A tree that runs."""
        if self.same:
            return tree
        members = [
            dataclasses.replace(
                one,
                task=self.task(one.task),
                layout=None if one.layout is None else self.layout(one.layout),
                # one that came after the numbers were looked at has none
                threads=tuple(filter(None, map(self, one.threads))),
            )
            for one in tree.processes
        ]
        return dataclasses.replace(tree, processes=tuple(members), files=self.files(tree.files))

    def layout(self, layout: MemoryLayout) -> MemoryLayout:
        """The memory of a process."""
        return layout if self.same else dataclasses.replace(layout, pid=self(layout.pid))

    def files(self, files: TreeFiles) -> TreeFiles:
        """The open files of the tree."""
        return files if self.same else files.renumbered(self)

    def some_files(self, files: Mapping[int, OpenFile]) -> dict[int, OpenFile]:
        """Some of them, by index."""
        return {index: file if self.same else file.renumbered(self) for index, file in files.items()}

    def objects(self, objects: Iterable[SystemV]) -> tuple[SystemV, ...]:
        """System V objects."""
        return tuple(one if self.same else one.renumbered(self) for one in objects)

    def dropped(self, runs: Runs) -> Runs:
        """Pages that are given back."""
        if self.same or runs.space not in _OF_PROCESSES:
            return runs
        return dataclasses.replace(runs, id=self(runs.id))

    def pages(self, runs: Iterable[PageRun]) -> Iterator[PageRun]:
        """Pages."""
        for run in runs:
            # never copied when nothing changes: a run is valid for a moment only, and there are thousands
            plain = self.same or run.space not in _OF_PROCESSES
            yield run if plain else dataclasses.replace(run, id=self(run.id))
