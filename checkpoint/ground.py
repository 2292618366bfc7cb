"""The memory of processes that still run elsewhere, built in advance (pre-copy): the target's half.

Each round (:class:`~checkpoint.records.LiveTree`) brings the stubs' memory to what it tells; pages follow.  When the
originals stand still, :meth:`Ground.finish` brings it to the final layout, in the same way.  A tree that has changed
cannot be grown on: the stubs are ended, and everything begins anew.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from checkpoint.errors import BadLayout, ImageIncomplete, NumbersInUserNamespace, PidTaken
from checkpoint.files.rebuild import Rebuilder
from checkpoint.files.regular import RegularFile
from checkpoint.files.table import TreeFiles
from checkpoint.files.terminal import Pair
from checkpoint.grow import Birth, grow
from checkpoint.image.format import PageRun
from checkpoint.image.frames import Runs, Space
from checkpoint.kernel.mman import Advice
from checkpoint.memory import layout
from checkpoint.memory.crew import Crew
from checkpoint.memory.delta import delta, without
from checkpoint.memory.layout import Descriptors, MemoryLayout
from checkpoint.memory.pages import PageWriter
from checkpoint.namespaces.memoryfs import ensure
from checkpoint.namespaces.spaces import Spaces
from checkpoint.namespaces.users import UserSpace
from checkpoint.namespaces.ways import Ways
from checkpoint.newpids import settle, with_init
from checkpoint.records import LiveTree, MapsDelta, ProcessRecord, fits, same_file
from checkpoint.spawn import Stub
from checkpoint.state import birth
from checkpoint.tree import INIT
from tcpstate.kernel.calls import CallError, CallTable
from tcpstate.kernel.machine import SYS

__all__ = ["Ground"]

#: bytes kept free above each heap: it grows, and must not meet what is ours in the stub
_HEAP_ROOM = 4 << 30
#: seconds in which the numbers of processes that were ended are free again: zombies of theirs are reaped by init
_REAPED = 2.0
#: bytes of pages that are worth the way to another thread
_MANY = 512 << 10
#: calls in one table
_AT_ONCE = 2048


class Ground:
    """See the module's docstring.

    stubs  the processes, by PID; filled and emptied here, ended by whoever owns it
    path   maps a path of the source to one here
    warn   told, in one sentence, of whatever will differ
    new_pids  the tree gets a PID namespace if it has none of its own (checkpoint.newpids)
    """

    def __init__(
        self,
        stubs: dict[int, Stub],
        path: Callable[[str], str],
        warn: Callable[[str], None],
        *,
        new_pids: bool = False,
    ) -> None:
        self._stubs = stubs
        self._new_pids = new_pids
        self._has_init = False
        self._users: UserSpace | None = None
        self._path = path
        self._warn = warn
        #: pseudo terminals that sessions were given, by their numbers at the source
        self.terminals: dict[int, Pair] = {}
        self._told: LiveTree | None = None
        self._layouts: dict[int, MemoryLayout] = {}
        self._writers: dict[int, PageWriter] = {}
        self._crew = Crew()

    def apply(self, tree: LiveTree) -> None:
        """One round. BadLayout, PidTaken, FileMissing, ..."""
        ways = Ways(self._path, tree.spaces.mounts)
        files = Rebuilder(tree.files, path=ways, warn=self._warn)
        try:
            told = self._told
            if told is None or not fits(told, (one.task for one in tree.processes), tree.layouts, tree.spaces):
                self._begin(tree, files.descriptor, ways)
            else:
                self._go_in(tree, ways)
                for one in tree.processes:
                    if one.layout is not None:
                        self.forget(MapsDelta(pid=one.task.pid, stale=one.stale))
                        self._change(one.layout, tree.files, files.descriptor)
            birth.bear_ahead(self._stubs, tree.threads, self._warn)
        finally:
            files.close()
        self._told = tree

    def _go_in(self, tree: LiveTree, ways: Ways) -> None:
        """The tree stands: its files are opened in it, and those are there whose bytes come with its file systems."""
        ways.root = self.root(tree.spaces)
        for file in tree.files.files:
            if isinstance(file, RegularFile) and ways.carried(file.path):
                with contextlib.suppress(OSError):  # who opens it says what is in the way
                    ensure(ways.root, file.path, tree.spaces.owner)

    def root(self, spaces: Spaces) -> str:
        """Our path of the root directory of what stands here; empty: it is ours."""
        own_mounts = spaces.mounts is not None or self._has_init
        return f"/proc/{next(iter(self._stubs.values())).pid}/root" if own_mounts else ""

    def _begin(self, tree: LiveTree, descriptor_of: Descriptors, ways: Ways) -> None:
        taken = [(m.start, m.end) for one in tree.layouts.values() for m in one.mappings]
        taken += [(one.fields.start_brk, one.fields.brk + _HEAP_ROOM) for one in tree.layouts.values()]
        self.grow_anew(tree.processes, taken, tree.spaces)
        self._go_in(tree, ways)
        for pid, one in tree.layouts.items():
            layout.build(one, self._stubs[pid], descriptor_of)
            self.is_now(one)

    def grow_anew(self, births: Sequence[Birth], taken: Sequence[tuple[int, int]], spaces: Spaces) -> None:
        """End what stands here, and grow this tree, in namespaces of its own if it had some. PidTaken, ..."""
        self._has_init = self._new_pids and not spaces.pids
        if self._has_init and spaces.users is not None:
            raise NumbersInUserNamespace("its tree is in a user namespace", object="--new-pid-namespace")
        if self._has_init:
            births = with_init(births)
        # the numbers of what has just been ended may still be those of the dead
        deadline = time.monotonic() + (_REAPED if self._stubs else 0)
        while True:
            self.clear()
            try:
                self._grow(births, taken, spaces)
                return
            except PidTaken:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_REAPED / 200)

    def _grow(self, births: Sequence[Birth], taken: Sequence[tuple[int, int]], spaces: Spaces) -> None:
        users = self._users = spaces.user_space()
        if users is None or spaces.pids:
            settle = functools.partial(self._settle, spaces=spaces)
            ways = Ways(self._path, spaces.mounts)

            def ptmx() -> str:
                ways.root = self.root(spaces)
                return ways.ptmx

            grow(births, taken, self._stubs, self._warn, self.terminals, settle, users, ptmx)
            return
        # who is in a user namespace may not choose the numbers of its children outside: they are born before
        grow(births, taken, self._stubs, self._warn, self.terminals, users=users)
        first, *others = self._stubs.values()
        for stub in (first, *others):
            users.enter(stub)
        spaces.enter(first, self._path, self._warn)
        for stub in others:
            spaces.follow(stub, first)

    def _settle(self, root: Stub, spaces: Spaces) -> None:
        if self.init is not None:
            settle(root)
        spaces.enter(root, self._path, self._warn)

    @property
    def init(self) -> Stub | None:
        """The first process of a PID namespace that the tree did not have; None: there is none."""
        return self._stubs.get(INIT) if self._has_init else None

    def is_now(self, one: MemoryLayout) -> None:
        """The memory of this process is laid out so."""
        self._layouts[one.pid] = one
        self._writers[one.pid] = PageWriter(self._stubs[one.pid], one)

    def clear(self) -> None:
        """End the stubs."""
        self._crew.close()
        while self._stubs:
            # leaves first: a process's end is only complete when its parent's is not
            self._stubs.popitem()[1].kill()
        self.close()
        self._layouts.clear()
        self._writers.clear()
        self._told = None

    def close(self) -> None:
        """Our descriptors, and the keeper of a user namespace; those whose processes live have been taken by the files
        by now."""
        self._crew.close()
        users, self._users = self._users, None
        if users is not None:
            users.close()
        while self.terminals:
            self.terminals.popitem()[1].close()

    def takes(self, records: Iterable[ProcessRecord], layouts: Mapping[int, MemoryLayout], spaces: Spaces) -> bool:
        """Whether what stands here can become these processes."""
        return self._told is not None and fits(self._told, (record.task for record in records), layouts, spaces)

    def forget(self, made_anew: MapsDelta) -> None:
        """Memory that was made anew at the source: what is here is void, and unmapped with the next change."""
        known = self._layouts.get(made_anew.pid)
        if known is None:
            raise ImageIncomplete(f"process {made_anew.pid} was not told of before")
        pid, stale = made_anew.pid, [(start, end - start) for start, end in made_anew.stale]
        self.writer(pid).check(Space.MEMORY, pid, stale)
        self._run(pid, [(SYS.munmap, start, length) for start, length in stale])
        self._layouts[pid] = without(known, made_anew.stale)

    def _run(self, pid: int, calls: Sequence[tuple[int, ...]]) -> None:
        for at in range(0, len(calls), _AT_ONCE):
            table = CallTable()
            for nr, *args in calls[at : at + _AT_ONCE]:
                table.call(nr, *args, label=f"{SYS(nr).name} {args[0]:x}")
            try:
                self._stubs[pid].run(table)
            except CallError as error:
                raise BadLayout(f"the kernel refused {error.strerror}", object=f"pid {pid}") from error

    def _change(self, now: MemoryLayout, files: TreeFiles, descriptor_of: Descriptors) -> None:
        told = self._told
        if told is None:
            raise ImageIncomplete("no round came before")
        old, new = told.files.files, files.files
        if max(now.files) >= len(new):
            raise BadLayout(f"file {max(now.files)} of {len(new)} is mapped", object=f"pid {now.pid}")
        before = self._layouts[now.pid]
        change = delta(before, now, lambda a, b: same_file(old[a], new[b]))
        if change.gone or change.fresh or layout.of_all(before) != layout.of_all(now):
            stub = self._stubs[now.pid]
            layout.change(now, stub, change.gone, change.fresh, change.guards, descriptor_of)
            stub.forget_maps()
        self.is_now(now)

    def finish(self, now: MemoryLayout, files: TreeFiles, descriptor_of: Descriptors) -> None:
        """The layout of a process that stands still at the source; if :meth:`takes`. BadLayout."""
        self._change(now, files, descriptor_of)

    def writer(self, pid: int) -> PageWriter:
        """What puts pages into a process. ImageIncomplete if its memory was not told."""
        writer = self._writers.get(pid)
        if writer is None:
            raise ImageIncomplete(f"pages of process {pid} came before its memory was laid out, or it has none")
        return writer

    def write(self, run: PageRun, done: Callable[[], None] | None = None) -> bool:
        """Pages of a round; whether they are still being written, until ``done`` is called, by another thread: so many
        are, if there is one to call. BadLayout, MemoryUnwritable, perhaps of an earlier run, or from :meth:`settle`."""
        writer = self.writer(run.id)
        if done is None or len(run.data) < _MANY:
            writer.write(run)
            return False

        _ = self._stubs[run.id].mem_fd  # opened once, and here

        def work() -> None:
            writer.write(run)
            done()

        self._crew.do(work)
        return True

    def settle(self) -> None:
        """Until all pages are written. BadLayout, MemoryUnwritable."""
        self._crew.wait()

    def drop(self, runs: Runs) -> None:
        """Pages that are as in a fresh mapping again. BadLayout."""
        self.writer(runs.id).check(runs.space, runs.id, runs.runs)
        self._run(runs.id, [(SYS.madvise, start, length, Advice.DONTNEED) for start, length in runs.runs])
