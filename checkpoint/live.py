"""The memory of running process trees, copied in rounds (pre-copy): the source's half.

::

    begin()      the trees stand still for a moment, in which tracking of writes begins
    round()      layouts and files as they are now, and the pages written since the round before (in the first one: all)
    written()    how much has been written since
    finish(..)   for each process, once the trees are stopped: what is still to be sent
    close()      tracking ends, nothing of it is left

What a round tells is a snapshot of something that moves: a mapping may be gone before its pages are read.  Nothing
relies on it: the last comparison is made while the trees stand still, from what was told last and what is true then.

Source: the rounds of C. Clark et al., Live Migration of Virtual Machines (NSDI 2005); PROCESS.md 3 and 4.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from checkpoint import livestart, preflight, procfs
from checkpoint.described import Sharing, task_of
from checkpoint.errors import NoSuchProcess, TrackingImpossible, TreeUnsteady
from checkpoint.files.base import OpenFile
from checkpoint.files.contentrounds import ContentRounds
from checkpoint.files.policy import NO_POLICY, Policy
from checkpoint.files.pty import masters_of
from checkpoint.files.regular import RegularFile
from checkpoint.files.staged import StagedContents
from checkpoint.files.table import FileTable, TreeFiles
from checkpoint.image.format import PageRun
from checkpoint.image.frames import Runs, Space
from checkpoint.memory import layout, pages, scan, softdirty, tracking, vmflags
from checkpoint.memory.delta import delta, without
from checkpoint.memory.layout import Mapping as Mapped
from checkpoint.memory.layout import MemoryLayout
from checkpoint.memory.ranges import Range, difference, intersection, joined, total
from checkpoint.memory.tracking import LARGE, Area, Tracking, Untracked
from checkpoint.memory.vma import Vma
from checkpoint.namespaces.numbers import Numbers
from checkpoint.namespaces.spaces import Spaces
from checkpoint.records import LiveProcess, LiveTree, ProcessRecord, fits, same_file
from checkpoint.state import clocks
from checkpoint.state.base import State
from checkpoint.tracee import Process, Tree
from checkpoint.tree import Task
from tcpstate.slotted import dataclass

__all__ = ["LiveCopy", "Remaining", "Round"]

_log = logging.getLogger(__name__)

#: how often a tree may change its processes before the rounds are given up
_ATTEMPTS = 4
#: how often mappings are read again that changed while they were read
_LOOKS = 100
#: rounds in which pages that were given back are looked for in large memory: the first, and then each of so many
_FIRST, _AT_TIMES = 3, 4
#: ranges in one PAGES_DROP frame
_DROPS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Round:
    """One round.

    tree     what is told first; its clocks were read at ``read_ns`` of our CLOCK_MONOTONIC, nanoseconds
    drops    pages that are as in a fresh mapping again
    runs     the pages, read as they are asked for
    contents shared memory (checkpoint.files.contentrounds), compared as it is asked for
    """

    tree: LiveTree
    read_ns: int
    drops: list[Runs]
    runs: Iterator[PageRun]
    contents: Iterator[StagedContents | Runs | PageRun]


@dataclass(frozen=True, slots=True)
class Remaining:
    """What the target lacks of a process that stands still.

    stale   (start, end) of memory that it has, but that was made anew since
    drops   pages that are as in a fresh mapping again
    ranges  (start, end) of pages to be sent
    """

    stale: list[Range]
    drops: list[Runs]
    ranges: list[Range]

    @property
    def bytes(self) -> int:
        """To be sent."""
        return total(self.ranges)


class _Running(Process):
    """A process that runs, for reading what it maps."""

    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        self.stat = procfs.read_stat(pid)

    @property
    def maps(self) -> list[Vma]:
        if self._maps is None:
            self.foreseen = vmflags.foresee(self.pid, self.foreseen, tracked=True)
            self._maps = list(self.foreseen.values())
        return self._maps


class LiveCopy:
    """See the module's docstring. ``roots``: PIDs of the trees' roots; ``policy``: which files will travel;
    ``contents``: copies shared memory."""

    def __init__(self, roots: Sequence[int], policy: Policy = NO_POLICY, contents: ContentRounds | None = None) -> None:
        self._contents = contents
        self._roots = tuple(roots)
        self._policy = policy
        self._trackings: dict[int, Tracking | softdirty.Tracking] = {}
        self._first: dict[int, tuple[State, ...]] = {}
        self._processes: dict[int, _Running] = {}
        self._told: LiveTree | None = None
        self._attempts = 0
        self._rounds = 0

    # -- begin and end

    def begin(self) -> None:
        """Begin to track all processes, which stand still for that moment.

        TrackingImpossible, and what stopping a tree raises; everything runs on as it did.
        """
        lacking = tracking.available()
        old = softdirty.available() if lacking else ""
        if old:
            raise TrackingImpossible(f"this kernel lacks {lacking}, and {old}")
        tree = Tree.stop(self._roots)
        try:
            for process in tree.processes:
                self._trackings[process.pid], self._first[process.pid] = livestart.begin(process, by_bits=bool(lacking))
        except BaseException:
            self.close()
            raise
        finally:
            tree.resume()

    def close(self) -> None:
        """End the tracking. May be repeated."""
        while self._trackings:
            self._trackings.popitem()[1].close()
        while self._processes:
            self._processes.popitem()[1].close()

    @property
    def pids(self) -> set[int]:
        """The processes that are tracked."""
        return set(self._trackings)

    # -- rounds

    def round(self) -> Round:
        """What the target has to hear now. TreeUnsteady if the tree has never been the same twice."""
        while True:
            try:
                self._begin_round()
                found = self._look()
            except (NoSuchProcess, OSError):
                if all(map(procfs.lives, self.pids)):
                    raise
                found = None  # a child ended while it was looked at
            if found is not None:
                return found
            # the target begins anew, and so must what it is told
            self._again()

    def _begin_round(self) -> None:
        """Where marks of pages are read and removed in two steps, nobody may write in between."""
        waiting = [track for track in self._trackings.values() if isinstance(track, softdirty.Tracking)]
        if self._told is None or not waiting:
            return
        tree = Tree.stop(self._roots)
        try:
            for process in tree.processes:
                track = self._trackings.get(process.pid)
                if isinstance(track, softdirty.Tracking):
                    track.look()
        finally:
            tree.resume()

    def _look(self) -> Round | None:
        """None if the tree is not the one that is tracked, or not one that the target can go on from."""
        tasks = self._tasks()
        if {t.pid for t, _ in tasks if t.wait_code is None} != self.pids:
            return None
        layouts, records = self._observe()
        told = self._told
        spaces = Spaces.of(self._roots)
        if told is not None and not fits(told, (task for task, _ in tasks), layouts, spaces):
            return None
        members: list[LiveProcess] = []
        drops: list[Runs] = []
        ranges: dict[int, list[Range]] = {}
        numbers = {task.pid for task, _ in tasks}
        for task, exit_signal in tasks:
            if task.wait_code is not None:
                members.append(LiveProcess(task=task, exit_signal=exit_signal))
                continue
            found, one = self._collect(told, layouts[task.pid], records)
            threads, first = livestart.threads(task.pid, numbers), self._first[task.pid]
            members.append(
                LiveProcess(
                    task=task,
                    exit_signal=exit_signal,
                    layout=one,
                    stale=tuple(found.stale),
                    threads=threads if first else (),
                    first=first,
                )
            )
            drops += found.drops
            ranges[task.pid] = found.ranges
        self._rounds += 1
        read_ns = time.monotonic_ns()
        seen = clocks.read(self._roots[0])
        self._told = LiveTree(number=self._rounds, processes=tuple(members), files=records, clocks=seen, spaces=spaces)
        number = Numbers([task.pid for task, _ in tasks])
        drops = [number.dropped(one) for one in drops]
        contents = iter(()) if self._contents is None else self._contents.round()
        return Round(number.live(self._told), read_ns, drops, number.pages(self._read(ranges)), contents)

    def _again(self) -> None:
        self._attempts += 1
        if self._attempts >= _ATTEMPTS:
            raise TreeUnsteady(f"processes came or went in each of {_ATTEMPTS} rounds", object=f"pid {self._roots[0]}")
        self.close()
        self._told = None
        self.begin()

    def _tasks(self) -> list[tuple[Task, int]]:
        """(place in the tree, exit signal), parents before children; children that have ended stand at the end, as in a
        tree that is stopped."""
        living: list[tuple[Task, int]] = []
        dead: list[tuple[Task, int]] = []
        pids = preflight.pids(self._roots)
        masters = masters_of(pids)
        sharing = Sharing()
        for pid in pids:
            try:
                stat = procfs.read_stat(pid)
            except NoSuchProcess:
                continue
            code = stat.exit_code if stat.zombie else None
            task = task_of(stat, masters if code is None else set(), sharing, code)
            (living if code is None else dead).append((task, stat.exit_signal))
        return living + dead

    def _observe(self) -> tuple[dict[int, MemoryLayout], TreeFiles]:
        """All layouts, and the files behind them, as they are now."""
        looks = 0
        while True:
            files = FileTable()
            try:
                layouts = {pid: self._layout(pid, files) for pid in self._trackings}
                records = files.records()
                if self._contents is not None:
                    self._contents.see(files.contents)
                return _plain(layouts, records, self._policy)
            except (FileNotFoundError, ValueError):
                # unmapped between two looks; or read in parts that do not fit together
                looks += 1
                if looks == _LOOKS:
                    raise TreeUnsteady("its mappings change all the time", object=f"pid {self._roots[0]}") from None
            finally:
                files.close()

    def _layout(self, pid: int, files: FileTable) -> MemoryLayout:
        process = self._processes.get(pid)
        if process is None:
            process = self._processes[pid] = _Running(pid)
        process.forget_maps()
        process.stat = procfs.read_stat(pid)
        heap = next((vma.end for vma in process.maps if vma.name == "[heap]"), process.stat.start_brk)
        return layout.capture(process, files, brk=heap, rings=False)

    def _collect(self, told: LiveTree | None, now: MemoryLayout, files: TreeFiles) -> tuple[Remaining, MemoryLayout]:
        """What has to be told of one process, and its layout without what cannot be tracked: that comes at the end."""
        track = self._trackings[now.pid]
        found = _Pages()
        hopeless: list[Range] = []
        kept, fresh = _compare(told, now, files)
        # what was given back is found in the stop, too: to look for it takes as long as for what was written
        gone = self._rounds < _FIRST or self._rounds % _AT_TIMES == 0
        for mapping in _worth_a_look(track, now, kept):
            try:
                found.add(mapping, track.protect(mapping.start, mapping.end, anonymous=mapping.anonymous, gone=gone))
            except Untracked:
                found.stale.append((mapping.start, mapping.end))
                fresh.append(mapping)
        for mapping in fresh:
            try:
                # huge pages are told and protected as wholes, but written and given back in parts
                if mapping.huge or not track.add(mapping.start, mapping.end):
                    raise Untracked
                found.full += track.protect(mapping.start, mapping.end, anonymous=mapping.anonymous).full
            except Untracked:
                hopeless.append((mapping.start, mapping.end))
        return found.remaining(now.pid), without(now, joined(hopeless))

    def _read(self, ranges: Mapping[int, list[Range]]) -> Iterator[PageRun]:
        for pid, wanted in ranges.items():
            yield from pages.read_live(self._processes[pid], pid, wanted, buffers=2)

    def written(self) -> dict[int, int]:
        """Bytes written since the last round, by process; of shared memory, all as the root's."""
        found: dict[int, int] = {}
        for one in () if self._told is None else self._told.processes:
            track = self._trackings.get(one.task.pid)
            if one.layout is None or track is None:
                continue
            try:
                found[one.task.pid] = track.count(*_asked(one.layout, _private(one.layout.mappings)))
            except (NoSuchProcess, OSError):
                if procfs.lives(one.task.pid):
                    raise
                continue  # it has ended since, and the next round begins anew
        if found and self._contents is not None:
            found[next(iter(found))] += self._contents.written()
        return found

    # -- the end

    def takes(self, records: Iterable[ProcessRecord], layouts: Mapping[int, MemoryLayout], spaces: Spaces) -> bool:
        """Whether the target can go on from what it was told, now that the trees stand still."""
        return self._told is not None and fits(self._told, (r.task for r in records), layouts, spaces)

    def separable(self, tree: Tree, files: Iterable[OpenFile]) -> bool:
        """Whether the target can complete one process and then another: no thread has the number that one of another
        process had when it was told last, none shares its files or directories with another process, and no file names
        one: it would be built when all states are there."""
        told = () if self._told is None else self._told.processes
        if any(one.task.files or one.task.directories for one in told) or any(file.tids for file in files):
            return False
        owners = {tid: one.task.pid for one in told for tid in one.threads}
        return all(
            owners.get(thread.tid, process.pid) == process.pid
            for process in tree.processes
            for thread in process.threads[1:]
        )

    def left(
        self,
        processes: Sequence[Process],
        records: Iterable[ProcessRecord],
        layouts: Mapping[int, MemoryLayout],
        files: TreeFiles,
        spaces: Spaces,
    ) -> dict[int, Remaining]:
        """What the target lacks of each process, by PID, now that the trees stand still; of none if it cannot go on
        from what it was told, and begins anew."""
        if self.takes(records, layouts, spaces):
            return {process.pid: self.finish(process, layouts[process.pid], files) for process in processes}
        _log.info("the processes have changed at the last moment: all of their memory is copied again")
        return {}

    def finish(self, process: Process, now: MemoryLayout, files: TreeFiles) -> Remaining:
        """What the target lacks of a process that stands still; if :meth:`takes`."""
        track = self._trackings[now.pid]
        found = _Pages()
        kept, fresh = _compare(self._told, now, files)
        seen, stale = _written(track, now, kept)
        found.add_all(kept, seen)
        found.stale += stale
        made_anew = set(stale)
        fresh += [mapping for mapping in kept if (mapping.start, mapping.end) in made_anew]
        fresh.sort(key=lambda mapping: mapping.start)
        found.full += scan.private_pages(process.pagemap_fd, fresh)
        return found.remaining(now.pid)


class _Pages:
    """What is found of one process."""

    def __init__(self) -> None:
        self.stale: list[Range] = []
        self.full: list[Range] = []
        self.empty: list[Range] = []

    def add(self, mapping: Mapped, found: tracking.Found) -> None:
        self.full += found.full
        # locked memory cannot be given back: what it shows then is sent
        (self.full if "lo" in mapping.flags else self.empty).extend(found.empty)

    def add_all(self, mappings: Iterable[Mapped], found: tracking.Found) -> None:
        """The same of many mappings."""
        locked = [(mapping.start, mapping.end) for mapping in mappings if "lo" in mapping.flags]
        self.full += [*found.full, *intersection(found.empty, locked)]
        self.empty += difference(found.empty, locked)

    def remaining(self, pid: int) -> Remaining:
        empty = [(start, end - start) for start, end in joined(self.empty)]
        drops = [
            Runs(space=Space.MEMORY, id=pid, runs=tuple(empty[at : at + _DROPS_AT_ONCE]))
            for at in range(0, len(empty), _DROPS_AT_ONCE)
        ]
        return Remaining(joined(self.stale), drops, joined(self.full))


def _compare(told: LiveTree | None, now: MemoryLayout, files: TreeFiles) -> tuple[list[Mapped], list[Mapped]]:
    """(kept, fresh) private mappings."""
    before = None if told is None else told.layouts.get(now.pid)
    if told is None or before is None:
        kept: Iterable[Mapped] = ()
        fresh: Iterable[Mapped] = now.mappings
    else:
        old = told.files.files
        change = delta(before, now, lambda a, b: same_file(old[a], files.files[b]))
        kept, fresh = change.kept, change.fresh
    return _private(kept), _private(fresh)


def _written(
    track: Tracking | softdirty.Tracking, layout: MemoryLayout, mappings: Sequence[Mapped]
) -> tuple[tracking.Found, list[Range]]:
    """What was written in private mappings of a layout; (start, end) of those that are not tracked."""
    return track.written_in(*_asked(layout, mappings))


def _asked(layout: MemoryLayout, mappings: Sequence[Mapped]) -> tuple[list[Area], Iterable[Range]]:
    """Mappings of a layout, and the others."""
    areas = [(mapping.start, mapping.end, mapping.anonymous) for mapping in mappings]
    return areas, difference(((m.start, m.end) for m in layout.mappings), [(start, end) for start, end, _ in areas])


def _worth_a_look(
    track: Tracking | softdirty.Tracking, layout: MemoryLayout, kept: Sequence[Mapped]
) -> Iterator[Mapped]:
    """Those of ``kept`` in which something may have been written, or given back: to look at a mapping and to protect it
    takes two calls, and of the many small ones most were not touched. They are looked at together."""
    small = [mapping for mapping in kept if mapping.end - mapping.start < LARGE]
    seen, untracked = _written(track, layout, small)
    changed = joined([*seen.full, *seen.empty, *untracked])
    at = 0
    for mapping in kept:
        while at < len(changed) and changed[at][1] <= mapping.start:
            at += 1
        touched = at < len(changed) and changed[at][0] < mapping.end
        if touched or mapping.end - mapping.start >= LARGE:
            yield mapping


def _private(mappings: Iterable[Mapped]) -> list[Mapped]:
    return [mapping for mapping in mappings if not mapping.shared and not mapping.special]


def _plain(
    layouts: dict[int, MemoryLayout], records: TreeFiles, policy: Policy
) -> tuple[dict[int, MemoryLayout], TreeFiles]:
    """Only what can be mapped before the stop: memory that no file is behind, and files that the target has, too. Not
    those that are written to: they may have to travel."""
    numbers: dict[int, int] = {}
    for index, record in enumerate(records.files):
        if isinstance(record, RegularFile) and not record.written and record.path not in policy.apart:
            numbers[index] = len(numbers)
    files = TreeFiles(files=[records.files[index] for index in numbers], contents=[], tables={})
    found = {}
    for pid, one in layouts.items():
        left = [
            mapping if mapping.file is None else mapping.of_file(numbers[mapping.file])
            for mapping in one.mappings
            if mapping.file is None or mapping.file in numbers
        ]
        if one.exe_file not in numbers:
            raise TrackingImpossible("the program's file was deleted", object=f"pid {pid}")
        found[pid] = _with(one, left, numbers[one.exe_file])
    return found, files


def _with(one: MemoryLayout, mappings: Sequence[Mapped], exe_file: int | None = None) -> MemoryLayout:
    return dataclasses.replace(one, mappings=tuple(mappings), exe_file=one.exe_file if exe_file is None else exe_file)
