"""A process tree taken apart into records and pages, while it stands still.

The stages, each a method, in the order in which they are called::

    check          verdicts on everything, from /proc; nothing is stopped
    prepare        what can be read or opened beforehand
    begin_live .. end_live    memory is copied in rounds while the processes run (:mod:`checkpoint.live`)
    find_listeners, hold_off, drain    no new connections; those that wait are accepted
    stop           all threads stopped; descriptors and mappings captured; nothing of ours left inside
    skeleton       records MANIFEST, TREE, FILES, MAPPINGS; then, while these are read, state is captured: STATES
    pages          memory and contents; the sockets still live and acknowledge: no peer runs into a time-out
    states         STATES, where the skeleton has left them: some processes at a time, after rounds
    secure         the tool's death leaves everything stopped from now on
    early_queues   what large receive queues hold already
    freeze         sockets quiet, then in repair; exported
    queues, delta  large queues; the record FILES_DELTA: sockets, and what else changed since the stop
    resume         everything as it was, or ...
    discard        ... the connections ended silently, the processes killed: the copy runs, or ...
    held, end      ... somebody keeps the connections and listeners, and the processes are killed

``resume`` undoes whatever has been done, at any stage.  Should the tool die, the kernel lets the threads go; from
``secure`` on a SIGSTOP is queued to each of them, so that they cannot meet a socket in repair.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import time
from collections.abc import Collection, Iterable, Iterator, Sequence

from checkpoint import preflight, procfs, waiting
from checkpoint.collector import CollectorPause
from checkpoint.described import frozen_tree, held_listeners, manifest, process_records, states_records, tree_record
from checkpoint.errors import NoSuchProcess, Refused, TreeChanged
from checkpoint.files.ahead import Ahead
from checkpoint.files.aheadtell import tell
from checkpoint.files.base import OpenFile
from checkpoint.files.contentrounds import ContentRounds
from checkpoint.files.held import HeldSocket
from checkpoint.files.identity import Evidence
from checkpoint.files.policy import NO_POLICY, AcceptQueues, Policy
from checkpoint.files.regular import known_evidence
from checkpoint.files.shipped import refuse_new
from checkpoint.files.table import FileTable, TreeFiles
from checkpoint.files.tcp import Original, TcpGroup
from checkpoint.files.treefiles import AheadFiles
from checkpoint.holdoff import Holdoff, LastSegments
from checkpoint.image.format import PageRun
from checkpoint.image.frames import Kind
from checkpoint.indoors import walk_out
from checkpoint.ipc import table as ipc
from checkpoint.latermemory import leave
from checkpoint.leftovers import clean
from checkpoint.live import LiveCopy, Remaining
from checkpoint.memory import layout, pages
from checkpoint.memory.layout import MemoryLayout
from checkpoint.memory.vma import Vma
from checkpoint.memory.vmflags import foresee
from checkpoint.namespaces.numbers import Numbers
from checkpoint.namespaces.spaces import Spaces
from checkpoint.records import FilesDelta, MapsDelta, StatesRecord
from checkpoint.state import table
from checkpoint.tracee import Tree
from checkpoint.traces import NoteWriter, Roots, Rules, Trace, Traced, peeked, write
from checkpoint.verdict import Verdict
from tcpstate.capture import replay, unknown
from tcpstate.errors import TcpmigError
from tcpstate.filters import remove_syn_filter
from tcpstate.kernel.route import local_addresses
from tcpstate.segment import Segment
from tcpstate.silence import Blackhole

__all__ = ["Dump"]

_log = logging.getLogger(__name__)

#: how often the stop is tried when connections still wait to be accepted at that moment
_STOP_ATTEMPTS = 5


class Dump:
    """One or more process trees on their way out. See the module's docstring for the order of calls.

    roots   PIDs of the trees' roots
    policy  what the user decided about files and connections that lead out of the trees
    note    told, before anything that would outlast our death is changed, what undoing it takes (checkpoint.traces)
    """

    def __init__(self, roots: Sequence[int], policy: Policy = NO_POLICY, note: NoteWriter | None = None) -> None:
        self.roots = tuple(roots)
        self.note = note
        self._policy = policy
        self._local: set[str] = set()
        self._evidence: dict[tuple[str, int, int, int], Evidence] = {}
        self.tree: Tree | None = None
        self.warnings: list[str] = []
        self._foreseen: dict[int, dict[bytes, Vma]] = {}
        self._live: LiveCopy | None = None
        self._ahead: Ahead | None = None
        self.remaining: dict[int, Remaining] = {}  #: what the target lacks, by PID, after :meth:`skeleton`
        self.alike = False  #: the target knows threads that are told by what is their own
        self.states_apart = False  #: and states that come after the pages, some processes at a time
        self.states: Iterator[StatesRecord] = iter(())  #: those; before :meth:`secure`
        self.leaves_pages, self.later = False, 0  #: pages stay here (set it before :meth:`skeleton`); bytes that do
        self._holdoff: Holdoff | None = None
        self._listeners, self._live_ports = list[socket.socket](), set[int]()
        self._places: list[list[tuple[int, int]]] = []
        self._table: FileTable | None = None
        self._group: TcpGroup | None = None
        self._blackhole = Blackhole()
        self._files: TreeFiles | None = None
        self._layouts: dict[int, MemoryLayout] = {}
        self._ipc, self._spaces = ipc.Objects(), Spaces()
        self.numbers = Numbers()
        self.last = LastSegments(())  #: closed connections, whose last segments are under way when the trees stop
        self._pause = CollectorPause()
        self.contents = ContentRounds()
        self._secured = False
        #: whether connections that still wait to be accepted move in the queue (set it before :meth:`drain`); else the
        #: application must accept them first, unless the policy lets them be reset
        self.keep_queues = False
        self.connections = 0  #: how many TCP connections the trees hold, once they are stopped
        self.ahead = 0  #: and how many of them are as they were told before, once they are frozen
        self.pids: tuple[int, ...] = ()  #: the processes, once they are stopped
        self.stopped_ns = self.exported_ns = 0  #: CLOCK_MONOTONIC, ns: first thread stopped; connections exported

    # -- before the stop ------------------------------------------------------------------------------------------

    def check(self) -> list[Verdict]:
        """A verdict on every thread, descriptor, mapping and connection. NoSuchProcess, Refused for the roots."""
        return preflight.check(self.roots, self._policy)

    def prepare(self) -> None:
        """Refuse what has to be refused, and read beforehand what is slow to read. Refused names the first reason."""
        if (refused := preflight.first_refusal(self.check())) is not None:
            raise refused
        self._policy = dataclasses.replace(self._policy, mounts=Spaces.of(self.roots).mounts)
        self._ipc.look(preflight.pids(self.roots))
        for pid in preflight.pids(self.roots):
            try:
                # on older kernels their flags take milliseconds per gigabyte, and only changes are read in the stop
                self._foreseen[pid] = foresee(pid)
                table.make_ready(pid)
            except (NoSuchProcess, FileNotFoundError, ProcessLookupError):
                _log.debug("pid %d ended before the stop", pid)

    def begin_live(self) -> LiveCopy:
        """Begin to copy memory while the processes run. TrackingImpossible, and what a stop raises."""
        self._live = live = LiveCopy(self.roots, self._policy, self.contents)
        live.begin()
        return live

    def end_live(self) -> None:
        """The rounds are over: look again at what is slow to read."""
        if self._live is not None:
            for pid in self._live.pids:
                with contextlib.suppress(NoSuchProcess):
                    self._foreseen[pid] = foresee(pid, self._foreseen.get(pid), tracked=True)

    def tell_ahead(self, moved: Collection[str], *, retold: bool = False, plain: bool = False) -> AheadFiles | None:
        """Files to be built before the stop; None if there are none, or this kernel cannot tell whether they change.
        ``moved``: the addresses that will leave; ``retold``, ``plain``: the target knows :mod:`checkpoint.files.retold`
        and :mod:`checkpoint.files.plain`. Last before :meth:`make_ready`."""
        pids, evidence = preflight.pids(self.roots), self._evidence if plain else None
        self._ahead, told = tell(pids, moved, self._policy, retold=retold, evidence=evidence)
        return told

    def give_up_live(self) -> None:
        """All of the memory is copied in the stop, after all."""
        live, self._live = self._live, None
        if live is not None:
            live.close()

    def find_listeners(self) -> set[int]:
        """Take duplicates of the listening sockets; their ports."""
        with preflight.live_files(preflight.pids(self.roots)) as files:
            group = TcpGroup(files)
            self._listeners = group.duplicates()
            self._places, self._live_ports = group.listener_places, group.ports
        self._holdoff = Holdoff(self._listeners)
        return {sock.getsockname()[1] for sock in self._listeners}

    def note_roots(self) -> None:
        """Before anything is stopped or injected: whose memory may have something of ours in it. NoSuchProcess."""
        write(self.note, Trace.ROOTS, Roots(processes=[Traced.now(pid) for pid in self.roots]))

    def make_ready(self) -> None:
        """What takes milliseconds and needs nothing to stand still: rules that silence frozen connections. OSError."""
        self.note_roots()
        if not self._blackhole.priorities:
            self._blackhole.ensure(lambda rules: write(self.note, Trace.RULES, Rules(priorities=rules)))
        self._local = local_addresses()

    def hold_off(self) -> None:
        """From now on no new connection begins. Capture SYNs before this."""
        if self._holdoff is None:
            raise RuntimeError("find_listeners() comes first")
        if self._listeners:
            write(self.note, Trace.LISTENERS, held_listeners(self._listeners, self._places))
        self._holdoff.begin()

    def drain(self) -> None:
        """Wait until the application has accepted what waited, or what is left can move. BacklogNotDrained."""
        off = self._off
        if not self.keep_queues and not self._lets_go:
            off.drain()
        elif not off.settle() and self.keep_queues:
            off.drain_neighbours(self._local)
            off.shelve(self.note)

    def _nothing_waits(self, holdoff: Holdoff) -> bool:
        """Whether nothing waits to be accepted that may not wait."""
        if self.keep_queues:
            return not holdoff.neighbours(self._local)
        return self._lets_go or holdoff.drained

    @property
    def _off(self) -> Holdoff:
        return self._holdoff or Holdoff(())

    @property
    def _lets_go(self) -> bool:
        return self._policy.accept_queue is AcceptQueues.RESET

    def expect(self, files: Sequence[OpenFile]) -> None:
        """What is known of the trees' files from before the stop: it is not read again there."""
        self._evidence |= known_evidence(files)

    def share(self, shared: Iterable[str], apart: Iterable[str]) -> None:
        """The target has told which directories it shares, and which files that are open for writing it does not."""
        self._policy = dataclasses.replace(self._policy, shared=frozenset(shared), apart=frozenset(apart))

    # -- the stop -------------------------------------------------------------------------------------------------

    def stop(self, addresses: Sequence[str] = ()) -> None:
        """Stop the trees and capture files and mappings. On any error everything runs on.

        addresses  those that will move: closed connections on them get a moment for their last segments
        """
        for attempt in range(_STOP_ATTEMPTS):
            self._pause.begin()
            watch = waiting.look_at(self.roots)
            self.stopped_ns = time.monotonic_ns()
            self.tree = Tree.stop(self.roots, watch=watch)
            if self._holdoff is None or self._nothing_waits(self._holdoff):
                break
            # a handshake was completed between the last look and the stop
            self.tree.resume()
            self.tree = None
            self._pause.end()
            if attempt == _STOP_ATTEMPTS - 1:
                self._holdoff.complain()
            self.drain()
        self.pids = tuple(process.pid for process in self._tree.processes)
        ahead = self._ahead
        self.last = LastSegments(addresses, (lambda: ahead.nobody_closes) if ahead and ahead.connections else None)
        try:
            self._capture(self._tree)
        except BaseException:
            self.resume()
            raise

    @property
    def _tree(self) -> Tree:
        if self.tree is None:
            raise RuntimeError("the tree is not stopped")
        return self.tree

    @property
    def _files_table(self) -> FileTable:
        if self._table is None:
            raise RuntimeError("nothing is captured")
        return self._table

    @property
    def _connections(self) -> TcpGroup:
        if self._group is None:
            raise RuntimeError("nothing is captured")
        return self._group

    def _capture(self, tree: Tree) -> None:
        self.numbers = Numbers([*self.pids, *(zombie.pid for zombie in tree.zombies)])
        self._table = FileTable(policy=self._policy, ahead=self._ahead, stopped=True)
        self._table.evidence = self._evidence
        for process in tree.processes:
            process.foreseen = self._foreseen.get(process.pid, {})
            process.tracked = self._live is not None and process.pid in self._live.pids
            clean(process)  # what is captured is to have nothing of ours in it, nor of a dead tool
            walk_out(process)
            self._table.add_process(process)
            self._layouts[process.pid] = layout.capture(process, self._table, brk=layout.brk_of(process))
        self._ipc.capture(self.pids)
        self._group = TcpGroup(self._table, self._blackhole)
        if (sockets := peeked(self._table.later)).sockets:
            write(self.note, Trace.PEEKED, sockets)
        try:
            self._spaces = Spaces.of(self.roots)
            self._files = self._table.records()
            self._group.find_peers(self._local)
            refuse_new(self._table.fresh, self._policy)
        except Refused as error:
            raise TreeChanged(f"{error.message} [{error.code}]", object=error.object) from error
        self.warnings += self._table.warnings
        self.connections = self._group.connections

    # -- what is sent ---------------------------------------------------------------------------------------------

    def skeleton(self) -> Iterator[tuple[Kind, object]]:
        """The records from which everything but bytes and connections can be built. What cannot be moved of the state
        is refused here, last: :meth:`resume` lets it run on."""
        tree, number, files = self._tree, self.numbers, self._files
        yield Kind.MANIFEST, manifest(tree, self.roots, number)
        records = process_records(tree, self._files_table.masters)
        objects = number.objects(self._ipc.records)
        yield Kind.TREE, tree_record(number.processes(records), self.roots, objects, self._spaces)
        self.contents.adopt(self._files_table.contents)
        yield Kind.FILES, None if files is None else number.files(self._files_table.untold(files, self.contents.staged))
        if self._live is not None and files is not None:
            self.remaining = self._live.left(tree.processes, records, self._layouts, files, self._spaces)
        for pid, left in self.remaining.items():
            if left.stale:
                yield Kind.MAPS_DELTA, MapsDelta(pid=number(pid), stale=tuple(left.stale))
        for process in tree.processes:
            yield Kind.MAPPINGS, number.layout(self._layouts[process.pid])
        live, fresh = self._live, self._files_table.fresh
        apart = self.states_apart and bool(self.remaining) and live is not None and live.separable(tree, fresh)
        self.states = states_records(tree.processes, self.roots[0], alike=self.alike, apart=apart)
        yield from () if apart else ((Kind.STATES, one) for one in self.states)
        for left in self.remaining.values():
            for runs in left.drops:
                yield Kind.PAGES_DROP, number.dropped(runs)
        for runs in self.contents.compare():
            yield Kind.PAGES_DROP, runs
        for runs in leave(tree.processes, self._layouts, self.remaining) if self.leaves_pages else ():
            self.later += runs.length
            yield Kind.PAGES_LATER, number.dropped(runs)

    def pages(self, *, buffers: int = 1) -> Iterator[PageRun]:
        """Contents of files that travel along, then the memory of every process. A run is valid until the
        ``buffers``-th one after it is asked for."""
        yield from self.contents.runs(self._files_table.contents)
        for process in self._tree.processes:
            pid = process.pid
            if pid in self.remaining:
                read = pages.read_runs(process, pid, self.remaining[pid].ranges, buffers=buffers)
            else:
                read = pages.read(process, self._layouts[pid], buffers=buffers)
            yield from self.numbers.pages(read)

    def early_queues(self) -> Iterator[PageRun]:
        """What large receive queues hold, last before :meth:`freeze`: their peers have filled what room there was."""
        return self._connections.early_runs()

    def queues(self) -> list[PageRun]:
        """Large queues of the frozen connections, but for what :meth:`early_queues` told; before :meth:`delta`."""
        return self._connections.runs()

    @property
    def connection_addresses(self) -> set[str]:
        """The local addresses of the trees' connections."""
        return set() if self._group is None else self._group.local_addresses

    @property
    def ports(self) -> set[int]:
        """The local ports of the trees' connections and listeners; before the stop, what :meth:`find_listeners` saw."""
        return self._live_ports if self._group is None else self._group.ports

    def secure(self) -> None:
        """From now on our death leaves the trees stopped, and how to give their sockets back is written down. Before
        :meth:`early_queues`; nothing is injected after this."""
        if self.note is not None:
            self._note_tree(self._connections.originals())
        self._tree.queue_sigstops()
        self._secured = True

    def _note_tree(self, connections: Sequence[Original]) -> None:
        write(self.note, Trace.TREE, frozen_tree(self._tree, connections, self._files_table, self._ipc.notes))

    def freeze(self, arrived: Sequence[Segment] = ()) -> list[Segment]:
        """Make the connections quiet and export them; of the segments that ``arrived`` before, those that they lack."""
        if not self._secured:
            self.secure()
        self.last.wait()
        if more := self._connections.find_changed():
            self._note_tree(more)
        self._connections.freeze()
        if self.keep_queues:
            known = self._off.handshakes_ended
            self.connections += self._connections.take_queues(handshakes=not known, shelf=self._off.shelf)
        self._connections.export()
        self.ahead = self._connections.ahead
        self.exported_ns = time.monotonic_ns()
        return unknown(arrived, self._connections.exported)

    def delta(self, *, clocks_stand: bool = False) -> FilesDelta:
        """The connections as exported, and other files that changed since the stop (see FileTable.recapture())."""
        files = self._files_table.recapture(clocks_stand=clocks_stand) | self._connections.records()
        return FilesDelta.of(self.numbers.some_files(files), self._connections.told)

    # -- the two ends ---------------------------------------------------------------------------------------------

    def resume(self, arrived: Sequence[Segment] = ()) -> None:
        """Undo everything: connections thawed, listeners open, processes running. May be called at any stage, and
        again. All is tried; the first failure is raised at the end.

        arrived  segments captured meanwhile: the connections get them now, and no peer waits for a retransmission
        """
        group, off = self._group, self._off
        exported = [] if group is None else group.exported_for(arrived)
        failed: list[Exception] = []

        def refill() -> None:
            if group is not None:
                group.refill_queues((time.monotonic_ns() - self.stopped_ns) / 1e9)
            off.unshelve()

        for step in (self._thaw, self._end_holdoff, refill, lambda: replay(arrived, exported), self._resume_tree):
            try:
                step()
            except (TcpmigError, OSError) as error:
                _log.error("while undoing: %s", error)
                failed.append(error)
        self.close()
        if failed:
            raise failed[0]

    def _thaw(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.thaw()
        self._blackhole.remove()

    def _end_holdoff(self) -> None:
        if self._holdoff is None:
            return
        holdoff, self._holdoff = self._holdoff, None
        holdoff.end()
        # what was accepted meanwhile has inherited the listener's filter
        with preflight.live_files(preflight.pids([root for root in self.roots if procfs.exists(root)])) as now:
            remove_syn_filter(TcpGroup(now).established)

    def _resume_tree(self) -> None:
        tree, self.tree = self.tree, None
        if tree is not None:
            tree.resume()
        self._pause.end()

    def hold(self) -> None:
        """Leave everything as it is, stopped and silent, also when this program ends: the queued SIGSTOPs see to it."""
        self._group = self._holdoff = self.tree = None
        self._blackhole = Blackhole()  # those that stand stay
        self._pause.end()

    def held(self) -> list[HeldSocket]:
        """After :meth:`freeze`: the connections and listeners, for somebody who keeps them when the processes end."""
        return self._connections.held()

    def end(self) -> None:
        """Somebody else keeps what :meth:`held` told, and the image is complete: the processes end."""
        if self._group is not None:
            self._group.give_away()
        self._group = self._holdoff = None
        self._kill()

    def discard(self, *, keep_memory: bool = False) -> None:
        """The copy runs: end the connections without a packet, then the processes; with ``keep_memory`` these stand
        still until :meth:`end`, for the copy lacks pages of theirs. The addresses must be gone."""
        if self._group is not None:
            self._group.discard()
        self._group = None
        self._off.unshelve()
        self._holdoff = None  # its listeners go with the processes
        if not keep_memory:
            self._kill()

    def _kill(self) -> None:
        tree, self.tree = self.tree, None
        if tree is not None:
            tree.kill()
        self._ipc.remove()
        self.close()

    def close(self) -> None:
        """Close our descriptors, and take away the rules that nothing needs any more."""
        self._pause.end()
        self.give_up_live()
        self.contents.close()
        self._blackhole.remove()
        if self._ahead is not None:
            self._ahead.close()
        if self._table is not None:
            self._table.close()
            self._table = None
        while self._listeners:
            self._listeners.pop().close()
