"""A process tree put together again from the frames of an image, as they come: from a file, or from a migration's line.

::

    apply(frame)      for each frame.  LIVE lays out memory while the originals run, PAGES fill it (checkpoint.ground),
                      AHEAD brings idle connections.  With the last MAPPINGS (or with STATES, if it takes more than was
                      built before) the tree grows, of stubs with the right numbers, its memory laid out and its files
                      open; PAGES fill it; FILES_DELTA brings the connections
                      COPIED says that the processes can be completed: threads and state, registers set.  STATES says it
                      of some of them, if they are told apart
    prepare()         that, if it was not done yet; connections rebuilt in repair and compared
    survive()         from here on the death of the tool does not end the processes
    release()         connections live: their addresses are local by now
    connect(..)       sockets that were connecting go on
    tell_windows()    peers hear that there is room, once the network knows where the addresses are
    run()             threads let go
    abort()           nothing is left; possible until release()

Until ``survive`` the stubs die with the tool (PTRACE_O_EXITKILL); from then on until ``run`` its death leaves them
stopped (a SIGSTOP is queued to each thread).
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence

from checkpoint import newpids
from checkpoint.collector import CollectorPause
from checkpoint.completing import Completion
from checkpoint.errors import ImageIncomplete, RebuildDiffers
from checkpoint.files.aheadbuild import BuiltAhead
from checkpoint.files.base import OpenFile
from checkpoint.files.held import HeldSocket
from checkpoint.files.install import install
from checkpoint.files.policy import External
from checkpoint.files.rebuild import Rebuilder
from checkpoint.files.staged import Staged, StagedContents
from checkpoint.files.table import TreeFiles
from checkpoint.files.tcpfile import TcpFile
from checkpoint.files.told import whole
from checkpoint.files.treefiles import AheadFiles
from checkpoint.ground import Ground
from checkpoint.image.frames import Frame, Kind, PageRun, Runs, Space
from checkpoint.ipc import table as ipc
from checkpoint.ipc.base import SystemV
from checkpoint.latermemory import LaterMemory, PageBringer
from checkpoint.memory import layout
from checkpoint.memory.layout import MemoryLayout
from checkpoint.namespaces.ways import Ways
from checkpoint.records import FilesDelta, LiveTree, Manifest, MapsDelta, ProcessRecord, StatesRecord, TreeRecord
from checkpoint.spawn import Stub
from checkpoint.state import birth, clocks
from checkpoint.state.cgroup import Cgroups
from checkpoint.stubnote import noted
from checkpoint.traces import Made, NoteWriter, Rules, Trace, write
from tcpstate.rebuild import Difference
from tcpstate.record import ConnectionRecord
from tcpstate.segment import Segment
from tcpstate.silence import Blackhole

__all__ = ["Restore"]

_log = logging.getLogger(__name__)


class Restore:
    """The target's half of a dump. See the module's docstring for the order of calls.

    path   maps a path of the source to one here
    warn   told, in one sentence, of whatever will differ from the original
    held   asked, when the open files are known, for the sockets of theirs that were kept on this host
    check  look for missing and differing files before anything is built; a migration has done that before its stop
    note   told, before anything that would outlast our death is changed, what undoing it takes (checkpoint.traces)
    overwrite  shipped files replace differing ones
    external   what is put in the place of files that did not follow
    bringer    brings pages of an image file after the processes have begun to run; None: all is written before
    new_pids   the tree gets a PID namespace, if it has none of its own: its numbers may be taken here
    """

    def __init__(
        self,
        *,
        path: Callable[[str], str] = lambda path: path,
        warn: Callable[[str], None] | None = None,
        check: bool = True,
        note: NoteWriter | None = None,
        overwrite: bool = False,
        held: Callable[[TreeFiles], Mapping[int, HeldSocket]] | None = None,
        external: Sequence[External] = (),
        bringer: PageBringer | None = None,
        new_pids: bool = False,
    ) -> None:
        self.note = note
        self._new_pids = new_pids
        self._overwrite = overwrite
        self._external = tuple(external)
        self._bringer, self.later = bringer, None if bringer is None else LaterMemory()
        self.warnings: list[str] = []
        self.manifest: Manifest | None = None
        self.stubs: dict[int, Stub] = {}
        self._devices: dict[str, str] = {}
        self._path = path
        self._check = check
        self._held = held
        self._warn = self._keep_warning if warn is None else warn
        self._tree: TreeRecord | None = None
        self._completion = Completion()
        self._files: TreeFiles | None = None
        self._layouts: dict[int, MemoryLayout] = {}
        self._rebuilder: Rebuilder | None = None
        self._ahead: BuiltAhead | None = None
        self._blackhole = Blackhole()
        self._pause = CollectorPause()
        self._complete = self._processes_complete = False
        self._ground = self._new_ground()
        self._staged = Staged(lambda path: self._path(path))
        self._clocks_go_on = False
        self._ipc: list[SystemV] = []
        self._inside = contextlib.ExitStack()

    def _keep_warning(self, text: str) -> None:
        self.warnings.append(text)
        _log.warning("%s", text)

    def place(self, path: Callable[[str], str], *, overwrite: bool, devices: Mapping[str, str] | None = None) -> None:
        """Before the first frame: where the source's paths are here, what its interfaces are called, and the like."""
        self._path, self._overwrite, self._devices = path, overwrite, dict(devices or {})
        self._ground = self._new_ground()

    def _new_ground(self) -> Ground:
        return Ground(self.stubs, self._path, self._warn, new_pids=self._new_pids)

    def make_ready(self) -> None:
        """What takes milliseconds and can be done before the first frame comes: rules that silence connections until
        their release. OSError."""
        if not self._blackhole.priorities:
            self._blackhole.ensure(lambda rules: write(self.note, Trace.RULES, Rules(priorities=rules)))

    # -- frames ---------------------------------------------------------------------------------------------------

    def apply(self, frame: Frame) -> None:
        """Take one frame in, and do what it allows. ImageError, ImageIncomplete, BadLayout, PidTaken, ..."""
        if frame.kind != Kind.PAGES:
            self._ground.settle()  # all else goes on from memory as it was told
        match frame.kind:
            case Kind.PAGES:
                if self._write(frame.pages(), frame.release):
                    return  # the frame's buffer is in use, a queue's until the connections are rebuilt
            case Kind.MANIFEST:
                self.manifest = frame.decode(Manifest)
            case Kind.LIVE:
                self._live(frame.decode(LiveTree))
            case Kind.AHEAD:
                self._build_ahead(frame.decode(AheadFiles))
            case Kind.CONTENTS:
                self._staged.tell(frame.decode(StagedContents))
            case Kind.MAPS_DELTA:
                self._ground.forget(frame.decode(MapsDelta))
            case Kind.PAGES_LATER:
                self._drop(frame.runs())  # what came of them in an earlier round is old
                self._waiting.told(frame.runs())
            case Kind.PAGES_DROP:
                self._drop(frame.decode(Runs))
            case Kind.TREE:
                self._pause.begin()
                self._tree = frame.decode(TreeRecord)
            case Kind.FILES:
                self._files = self._whole(frame.decode(TreeFiles))
            case Kind.MAPPINGS:
                one = frame.decode(MemoryLayout)
                self._layouts[one.pid] = one
                if self._laid_out and self._may_begin:
                    self._build()
            case Kind.STATES:
                self._take_states(frame.decode(StatesRecord))
            case Kind.COPIED:
                self._end_copy()
            case Kind.FILES_DELTA:
                ahead = None if self._ahead is None else self._ahead.told
                self._files_rebuilder.take(frame.decode(FilesDelta).whole(ahead))
            case Kind.END:
                self.end()
        frame.release()

    def end(self) -> None:
        """The image is complete and right: its END was read."""
        self._complete = True

    def _living(self) -> Sequence[ProcessRecord]:
        if self._tree is None:
            raise ImageIncomplete("the record TREE did not come where it is needed")
        return self._tree.living

    @property
    def _files_rebuilder(self) -> Rebuilder:
        if self._rebuilder is None:
            raise ImageIncomplete("the records TREE, FILES and MAPPINGS did not come where they are needed")
        return self._rebuilder

    def _live(self, tree: LiveTree) -> None:
        if self._tree is not None:
            raise ImageIncomplete("a round of running processes came after they were stopped")
        if not self._clocks_go_on:
            # too late rather than too early: a clock must not run backwards
            self._enter_clocks(tree.clocks, max(0, time.monotonic_ns() - tree.at) if tree.at else 0)
        self._ground.apply(tree)

    def _build_ahead(self, told: AheadFiles) -> None:
        if self._tree is not None or self._ahead is not None:
            raise ImageIncomplete("files were told ahead of the stop after it, or twice")
        self.make_ready()
        self._ahead = BuiltAhead(told, self._devices, self._path)
        self._ahead.install(self.stubs)

    def _whole(self, files: TreeFiles) -> TreeFiles:
        try:
            return whole(files, None) if self._ahead is None else self._ahead.go_on(files)
        except ValueError as error:
            raise ImageIncomplete(f"the record FILES does not go on from AHEAD: {error}") from None

    def _enter_clocks(self, wanted: clocks.Clocks, elapsed: int) -> None:
        clocks.enter(wanted, elapsed)
        self._clocks_go_on = True

    def bring(self, bringer: PageBringer) -> None:
        """Somebody will bring the pages that PAGES_LATER tells of. Before the first frame."""
        self._bringer, self.later = bringer, LaterMemory()

    @property
    def _waiting(self) -> LaterMemory:
        if self.later is None:
            raise ImageIncomplete("pages were left for later, and nobody is here to bring them")
        return self.later

    @property
    def _laid_out(self) -> bool:
        return self._layouts.keys() == {record.task.pid for record in self._living()}

    @property
    def _may_begin(self) -> bool:
        """Whether it can begin before the states come: the clocks go on since the rounds, no file names a thread."""
        first = 0 if self._ahead is None else self._ahead.count
        return self._clocks_go_on and self._files is not None and not any(f.tids for f in self._files.files[first:])

    def _take_states(self, told: StatesRecord) -> None:
        self._completion.take(self._tree, told)
        if told.apart:
            self._complete_processes()
            return
        if not self._clocks_go_on:
            self._enter_clocks(told.clocks, 0)  # they stood until now
        if self._rebuilder is None:
            self._build()

    def _drop(self, runs: Runs) -> None:
        if self._completion.begun:
            raise ImageIncomplete("pages were dropped after the end of the copy")
        if runs.space is Space.CONTENT:
            self._files_rebuilder.drop_content(runs.id, runs.runs)
        elif runs.space is Space.STAGED:
            self._staged.drop(runs)
        else:
            self._ground.drop(runs)

    # -- building -------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        if self._files is None or self._tree is None or self.manifest is None or not self._laid_out:
            raise ImageIncomplete("a record MANIFEST, FILES or MAPPINGS did not come where it is needed")
        taken = [area for one in self._layouts.values() for area in one.areas]
        if self.later is not None:
            self.later.laid_out(self._layouts)
        held = {} if self._held is None else self._held(self._files)
        if any(isinstance(file, TcpFile) and file.conn_id for file in self._files.files):
            self.make_ready()
        goes_on = self._ground.takes(self._tree.processes, self._layouts, self._tree.spaces)
        if self._ahead is not None and not goes_on:
            self._ahead.uninstall()
        self._ways = Ways(self._path, self._tree.spaces.mounts)
        self._rebuilder = Rebuilder(
            self._files,
            path=self._ways,
            warn=self._warn,
            blackhole=self._blackhole,
            held=held,
            terminals=self._ground.terminals,
            note_path=self._note_made,
            overwrite=self._overwrite,
            devices=self._devices,
            external=self._external,
            stubs=self.stubs,
            ahead=self._ahead,
        )
        self._staged.provide(self._files, self._rebuilder.provide_content)
        self._rebuilder.own_ipc = own_ipc = self._tree.spaces.ipc is not None
        for warning in self._rebuilder.check() if self._check else ():
            self._warn(warning)
        ipc.check(() if own_ipc else self._tree.ipc)
        if not goes_on:
            self._ground.grow_anew(self._tree.processes, taken, self._tree.spaces)
        # the tree stands in its namespaces: so do we, as far as its objects and files are made in them
        self._ways.root = self._ground.root(self._tree.spaces)
        self._tree.move_in(next(iter(self.stubs.values())).pid, self._inside)
        ipc.make(self._tree.ipc, None if own_ipc else self._note_made, self._ipc.append)
        self._bear_named_threads(self._rebuilder.later)
        self._rebuilder.rebuild()
        for pid, one in self._layouts.items():
            if goes_on:
                self._ground.finish(one, self._files, self._rebuilder.descriptor)
            else:
                layout.build(one, self.stubs[pid], self._rebuilder.descriptor)
                self._ground.is_now(one)
        # last those whose tables others share: the descriptor by which files are taken is closed with them
        for record in sorted(self._living(), key=lambda record: not record.task.files):
            pid = record.task.pid
            install(self._rebuilder, pid, self.stubs[pid], shared=bool(record.task.files))
        for run in () if self.later is None else self.later.at_once():
            self._write(run)

    def _note_made(self, path: str) -> None:
        """Something is about to be made that must not outlast a failure."""
        if lasting := self._ways.lasting(path):
            write(self.note, Trace.MADE, Made(path=lasting))

    def _bear_named_threads(self, files: Sequence[OpenFile]) -> None:
        """Threads that an open file refers to must be there before it."""
        named = frozenset[int]().union(*(file.tids for file in files))
        states = self._completion.states
        for pid, state in states.items() if named else ():
            birth.dismiss_ended(self.stubs, states)
            if named & {thread.tid for thread in state.threads[1:]}:
                birth.bear_threads(self.stubs[pid], state, self._warn)

    def _write(self, run: PageRun, done: Callable[[], None] | None = None) -> bool:
        """Put the bytes where they belong; whether they are needed from now on, perhaps until ``done`` is called."""
        if run.space in (Space.RECEIVED, Space.SENT):
            return self._files_rebuilder.take_queue(run)
        if self._completion.begun:
            raise ImageIncomplete("bytes of memory came after the end of the copy")
        if run.space is Space.CONTENT:
            self._files_rebuilder.write_content(run.id, run.runs, run.data)
        elif run.space is Space.STAGED:
            self._staged.write(run)
        return run.space is Space.MEMORY and self._ground.write(run, done)

    # -- the end --------------------------------------------------------------------------------------------------

    def prepare(self, *, elapsed: float = 0.0) -> list[tuple[str, Difference]]:
        """Everything but the release. ``elapsed``: seconds since the connections were exported.

        Returns (conn-ID, difference) for whatever the rebuilt connections read back otherwise than was sent.
        """
        if not self._complete:
            raise ImageIncomplete("the image has not come to its end")
        if not self._processes_complete:
            self._end_copy()
        self._files_rebuilder.complete(elapsed=elapsed)
        return self._files_rebuilder.compare()

    def _complete_processes(self) -> None:
        """Threads and state, registers last, of those whose state has come: their files are open, and all of their
        memory has come. What is still to be done to files is done in our own process."""
        if self._tree is None or self._rebuilder is None or self._processes_complete:
            raise ImageIncomplete("the end of the copy came where it is not expected")
        if not self._completion.begun:
            if self.later is not None and self._bringer is not None:
                self.later.arm(self.stubs, self._bringer)  # from here on the kernel itself may need what was left
            ipc.used(self._ipc, self.stubs)  # while they still may
        whole = self.later is None
        path = self._ways.within
        self._completion.complete(self._tree, self._layouts, self.stubs, whole=whole, warn=self._warn, path=path)

    def _end_copy(self) -> None:
        """The same of all that are left; their image is complete but for its connections."""
        self._complete_processes()
        states = self._completion.states
        if len(states) < len(self._living()):
            raise ImageIncomplete("the end of the copy came before the states of all processes")
        if self._ground.init is not None and self.manifest is not None:
            root = self.manifest.roots[0]
            newpids.complete(self._ground.init, root, states[root].get(Cgroups), self._warn)
        self._processes_complete = True
        self._secure(self._files_rebuilder)

    @property
    def init(self) -> int:
        """The number here of the first process of a PID namespace that the tree did not have; 0: there is none."""
        return 0 if self._ground.init is None else self._ground.init.pid

    def _secure(self, rebuilder: Rebuilder) -> None:
        """Nothing is injected any more: from :meth:`survive` on our death leaves the processes stopped."""
        stops = {record.task.pid: record.stop_signal for record in self._living()}
        write(self.note, Trace.STUBS, noted(self.stubs, stops, self._roots(), rebuilder, self._devices))
        for stub in self.stubs.values():
            stub.queue_sigstops()

    def _roots(self) -> dict[int, int]:
        return {} if self.manifest is None else {root: self.stubs[root].pid for root in self.manifest.roots}

    @staticmethod
    def differs(connection: str, difference: Difference) -> RebuildDiffers:
        """The error that a difference of :meth:`prepare` is."""
        what, expected, found = difference.what, difference.expected, difference.found
        return RebuildDiffers(f"{what} was {expected!r}, reads back {found!r}", object=connection)

    def survive(self) -> None:
        """The processes outlive the tool from now on."""
        for stub in self.stubs.values():
            stub.survive_tool()

    @property
    def ports(self) -> set[int]:
        """The local ports of the tree's connections and listeners."""
        return self._files_rebuilder.tcp_ports

    @property
    def connections(self) -> list[ConnectionRecord]:
        """The rebuilt connections, after :meth:`prepare`."""
        return self._files_rebuilder.connections

    @property
    def built_ahead(self) -> int:
        """How many connections more stand, as they were built before the stop."""
        return self._files_rebuilder.built_ahead

    @property
    def taken(self) -> int:
        """How many of them are the very sockets that were held."""
        return self._files_rebuilder.taken

    def release(self) -> None:
        """The addresses are local: connections send and answer again, listeners listen."""
        self._files_rebuilder.release()

    def replay(self, arrived: Sequence[Segment]) -> None:
        """After the release: the connections, and handshakes half done, get what was captured for them. OSError."""
        self._files_rebuilder.replay(arrived)

    @property
    def lost(self) -> list[tuple[str, str]]:
        """(conn-ID, reason) of connections that the release could not bring back."""
        return list(self._files_rebuilder.lost)

    def connect(self, arrived: Sequence[Segment] = ()) -> None:
        """The addresses are announced: sockets that were connecting go on. ``arrived``: what was captured since the
        freeze. ConnectNotRepeated."""
        self._files_rebuilder.connect(arrived)

    def tell_windows(self) -> None:
        """The addresses are announced: peers that wait for room hear that there is some. OSError."""
        self._files_rebuilder.tell_windows()

    def run(self) -> dict[int, int]:
        """Let the processes go. Root PIDs in the image to PIDs here."""
        for record in self._living():
            if record.stop_signal:
                os.kill(self.stubs[record.task.pid].pid, record.stop_signal)
        pids = self._roots()
        for stub in self.stubs.values():
            stub.release()
        self._pause.end()
        self.stubs = {}
        return pids

    def abort(self) -> None:
        """Nothing is left of what was built. May be repeated."""
        if self._rebuilder is not None:
            self._rebuilder.abort()  # while the tree's own mounts are there
            self._rebuilder = None
        self._ground.clear()
        self._close_ahead()
        ipc.remove(self._ipc)
        self._ipc.clear()
        self._inside.close()
        self._ground.close()
        self._blackhole.remove()
        self._pause.end()

    def _close_ahead(self) -> None:
        self._staged.close()
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()

    def close(self) -> None:
        """Close our descriptors."""
        self._close_ahead()
        if self._rebuilder is not None:
            self._rebuilder.close()
            self._rebuilder = None
        self._inside.close()
        self._ground.close()
        self._blackhole.remove()
        self._pause.end()
