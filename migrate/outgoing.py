"""Process trees on their way out: :class:`checkpoint.dump.Dump` as the source's driver wants it.

Two captures run.  From ``prepare`` on one keeps the SYNs that the listeners drop; from just before the stop on another
keeps every segment for the moved ports, until ``close``: peers send here until they have heard where the address has
gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from checkpoint import kernelneeds, preflight, procfs, supervisors
from checkpoint.dump import Dump
from checkpoint.early import EarlyPages
from checkpoint.errors import InjectionRefused, NoSuchProcess, Refused, TrackingImpossible, TreeUnsteady
from checkpoint.files.held import HeldSocket
from checkpoint.files.peers import is_loopback
from checkpoint.files.policy import NO_POLICY, AcceptQueues, Policy
from checkpoint.files.table import TreeFiles
from checkpoint.files.tcp import TcpGroup
from checkpoint.files.udp import UdpFile
from checkpoint.files.verdicts import foretell
from checkpoint.image.format import FrameWriter
from checkpoint.image.frames import Kind, PageRun, Runs
from checkpoint.image.writer import ImageFile
from checkpoint.live import Round as LiveRound
from checkpoint.memory.crew import fetched_ahead
from checkpoint.memory.layout import MemoryLayout
from checkpoint.namespaces.mounts import Mounts
from checkpoint.namespaces.numbers import Numbers
from checkpoint.namespaces.spaces import Spaces, own_network, silence_network
from checkpoint.namespaces.ways import Ways
from checkpoint.records import Ended
from checkpoint.throttle import Throttle
from migrate.clock import monotonic_ns
from migrate.hostfacts import ACCEPT_QUEUE, AHEAD, AHEAD_PLAIN, ALIKE, APART, RETOLD, STAGED
from migrate.messages import Needs, TreeNeed
from migrate.parts import NoteWriter
from migrate.rounds import Pace, Round
from migrate.unithook import HookUnit
from migrate.warm import leaving
from migrate.wire import ImageWriter
from tcpstate import acceptqueue, codec
from tcpstate.capture import Capture, unanswered
from tcpstate.errors import TcpmigError
from tcpstate.segment import Segment

__all__ = ["OutgoingTrees"]

_log = logging.getLogger(__name__)

_LITTLE = 8 << 20  # bytes of memory that are not worth a thread that reads, nor a wait until they are written
_FEW_FILES, _FEW_PROCESSES = 256, 8  # what the target builds in milliseconds
#: memory can be copied in the stop all the same
_NO_ROUNDS = (TrackingImpossible, TreeUnsteady, Refused, InjectionRefused)
_ANYWHERE = frozenset({"0.0.0.0", "::"})


def _bare(address: str) -> str:
    return address.partition("%")[0].removeprefix("::ffff:")


class OutgoingTrees:
    """The trees that begin at ``roots``. See :class:`migrate.parts.Outgoing` for the order of calls.

    stay       they will run on here: whoever supervises them notices nothing
    unit_hook  the user has a program that deals with their supervisors
    """

    def __init__(
        self, roots: Sequence[int], policy: Policy = NO_POLICY, *, stay: bool = False, unit_hook: bool = False
    ) -> None:
        self._roots = tuple(roots)
        self._stay = stay
        self._unit_hook = unit_hook
        self._policy = policy
        self._dump = Dump(roots, policy)
        self._writer = FrameWriter(stream=True)
        self._reading = ThreadPoolExecutor(1, "pages")
        self._syns: Capture | None = None
        self._segments: list[Capture] = []
        self._captured_ports: set[int] = set()
        #: the addresses that their connections and listeners use; None: any
        self._used: set[str] | None = None
        #: what the connections were sent in the stop and do not have
        self._refused: list[Segment] = []
        self._began = False
        #: whether the target builds connections before the stop, and opens plain files
        self._ahead = self._retold = self._plain = False
        self._throttle = Throttle(roots)

    def meet(self, features: frozenset[str]) -> None:
        """What waits to be accepted can move if both kernels can put it back: here, should all be undone."""
        self._ahead, self._retold, self._plain = (feature in features for feature in (AHEAD, RETOLD, AHEAD_PLAIN))
        self._dump.contents.wanted, self._dump.alike = STAGED in features, ALIKE in features
        self._dump.states_apart = APART in features
        if self._policy.accept_queue is not AcceptQueues.REFUSE and ACCEPT_QUEUE in features:
            lack = acceptqueue.missing()
            if lack is not None:
                _log.info("connections that wait to be accepted cannot be moved: %s", lack.message)
            self._dump.keep_queues = lack is None

    def needs(self) -> Needs:
        """What has to be true at the target; raises the first refusal."""
        self._dump.prepare()
        members = preflight.pids(self._roots)
        if not self._stay:
            self._judge_supervisors(members)
        with preflight.live_files(members) as files:
            group = TcpGroup(files)
            names = [sock.getsockname() for sock in group.listeners]
            bound = {_bare(name[0]) for name in names}
            local, devices = group.local_addresses, group.devices
        connections = preflight.connections(members)
        leaving(connections=bool(connections or names))
        peers = {_bare(one.connection.conn_id.peer) for one in connections if one.away}
        paired = {_bare(one.connection.conn_id.local) for one in connections if not one.away}
        foretold = foretell(members, self._policy)
        self._dump.expect(foretold)
        # a connected one speaks from whatever address was there; it serves nobody
        udp = [one.name for one in foretold if isinstance(one, UdpFile) and one.name is not None and one.peer is None]
        bound |= {_bare(end.address) for end in udp if not ipaddress.ip_address(_bare(end.address)).is_multicast}
        anywhere = {f"tcp port {name[1]}" for name in names if _bare(name[0]) in _ANYWHERE}
        anywhere |= {f"udp port {end.port}" for end in udp if _bare(end.address) in _ANYWHERE}
        mounts = Spaces.of(self._roots).mounts
        used = {_bare(address) for address in local} | (bound - _ANYWHERE)
        self._used = None if anywhere else set(used)
        return Needs(
            trees=tuple(_tree(root) for root in self._roots),
            files=tuple(foretold),
            directories=tuple(sorted(_directories(members, mounts))),
            used_addresses=tuple(sorted(used)),
            anywhere=tuple(sorted(anywhere)),
            peers=tuple(sorted(peers)),
            connections=len(connections),
            away=sum(one.away for one in connections),
            paired=tuple(sorted(address for address in paired if not is_loopback(address))),
            memory=sum(map(_resident, members)),
            features=kernelneeds.needed(members),
            units=tuple(_hook_unit(one) for one in supervisors.supervised(members)),
            devices=tuple(sorted(devices)),
            network=own_network(self._roots[0]),
            mounts=mounts,
        )

    def share(self, shared: Sequence[str], apart: Sequence[str]) -> None:
        """What the target said of files that are open for writing."""
        self._dump.share(shared, apart)

    def _judge_supervisors(self, members: Sequence[int]) -> None:
        found = supervisors.verdicts(self._roots, members, hook=self._unit_hook)
        refusal = preflight.first_refusal(found)
        if refusal is not None:
            raise refusal
        for verdict in found:
            _log.warning("%s: %s", verdict.subject, verdict.text)

    def begin(self, note: NoteWriter) -> None:
        """The journal is open."""
        self._dump.note = note
        self._dump.note_roots()

    def copy_live(
        self, image: ImageWriter, there: Callable[[int], int], settle: Callable[[], None]
    ) -> Iterator[tuple[Round, Mapping[int, int]]]:
        """Rounds of pre-copy, one each time the iterator is asked; it ends if there can be none."""
        try:
            live = self._dump.begin_live()
            while True:
                began, before = monotonic_ns(), image.written
                with self._throttle.paused():
                    # a tree that has changed is stopped by us
                    told = live.round()
                self._send_round(image, told, there)
                settle()
                yield Round(bytes=image.written - before, ms=(monotonic_ns() - began) / 1e6), live.written()
        except _NO_ROUNDS as error:
            self._without_rounds(error)

    def _without_rounds(self, error: TcpmigError) -> None:
        # what refuses for good will say so in the stop
        _log.warning("all memory is copied in the stop: %s [%s] (%s)", error.message, error.code, error.object)
        self._dump.give_up_live()

    def _send_round(self, image: ImageWriter, told: LiveRound, there: Callable[[int], int]) -> None:
        self._begin(image)
        tree = dataclasses.replace(told.tree, at=max(0, there(told.read_ns)))
        image.write(self._writer.frame(Kind.LIVE, tree))
        for drop in told.drops:
            image.write(self._writer.frame(Kind.PAGES_DROP, drop))
        for run in fetched_ahead(told.runs, self._reading):
            image.write(self._writer.pages(run))
        for told_content in told.contents:
            match told_content:
                case PageRun() as run:
                    image.write(self._writer.pages(run))
                case Runs() as drop:
                    image.write(self._writer.frame(Kind.PAGES_DROP, drop))
                case record:
                    image.write(self._writer.frame(Kind.CONTENTS, record))
        image.flush()

    def copy_ahead(
        self, image: ImageWriter, moved: Sequence[str], there: Callable[[int], int], settle: Callable[[], None]
    ) -> None:
        """Idle connections and plain files are told, and built."""
        if not self._ahead or (told := self._dump.tell_ahead(moved, retold=self._retold, plain=self._plain)) is None:
            return
        _log.info("%d idle connections and plain files are built at the target before the stop", len(told.files))
        told = dataclasses.replace(told, read_at=max(0, there(told.read_at)))
        self._begin(image)
        image.write(self._writer.frame(Kind.AHEAD, told))
        image.flush()
        settle()

    def _begin(self, image: ImageWriter) -> None:
        if not self._began:
            self._began = True
            image.write(self._writer.begin())

    def prepare(self, note: NoteWriter | None = None) -> None:
        """New connections are held off and captured."""
        self._dump.note = note
        self._dump.end_live()
        self._dump.make_ready()
        ports = self._dump.find_listeners()
        if ports:
            self._syns = Capture(syn_only=True, ports=ports)
            self._syns.start()
        self._dump.hold_off()
        self._dump.drain()

    def stop(self, moved: Sequence[str]) -> None:
        """Everything stands still."""
        self._throttle.end()
        # Not only from the freeze on: nobody reads in the stop; what a full receive queue has no room for is dropped
        # by the kernel although the peer was allowed to send it (TCPRcvQDrop). The peer would run into its
        # retransmission time-out.
        self._capture_all(self._used)
        self._dump.stop(moved)
        self._capture_all(None)

    def send(self, image: ImageWriter) -> bool:
        """Skeleton and pages; whether it was little."""
        self._begin(image)
        few = True
        for kind, record in self._dump.skeleton():
            image.write(self._writer.frame(kind, record))
            if isinstance(record, TreeFiles):
                few = len(record.files) <= _FEW_FILES and len(self._dump.pids) <= _FEW_PROCESSES
            if kind in (Kind.TREE, Kind.FILES, Kind.MAPPINGS):
                # read there while we pack the next one, and look for what was written
                image.flush()
        image.flush()
        left = [one.bytes for one in self._dump.remaining.values()]
        little = bool(left) and sum(left) < _LITTLE
        # a thread takes longer to begin than the copy of a few hundred pages
        runs = self._dump.pages(buffers=2)
        for run in runs if little else fetched_ahead(runs, self._reading):
            image.write(self._writer.pages(run))
        image.flush()  # what has come is worked on there while states are read
        for states in self._dump.states:
            image.write(self._writer.frame(Kind.STATES, states))
            image.flush()
        image.write(self._writer.frame(Kind.COPIED, {}, optional=True))
        image.flush()
        # while the target builds
        self._dump.secure()
        return little and few

    def freeze(self, image: ImageWriter) -> int:
        """Connections, and the end of the image."""
        for run in self._dump.early_queues():
            image.write(self._writer.pages(run))
        self._freeze()
        for run in self._dump.queues():
            image.write(self._writer.pages(run))
        if self._dump.last.ended:
            image.write(self._writer.frame(Kind.ENDED, Ended(connections=self._dump.last.ended), optional=True))
        image.write(self._writer.frame(Kind.FILES_DELTA, self._dump.delta()))
        image.write(self._writer.end())
        for warning in self._dump.warnings:
            _log.warning("%s", warning)
        return self._dump.exported_ns

    def collect(self, early: EarlyPages, budget_ms: float) -> list[Round]:
        """Rounds of pre-copy into a file, until what is written meanwhile fits the stop. ImageNotWritten."""
        pace = Pace(budget_ms)
        try:
            live = self._dump.begin_live()
            while True:
                began = monotonic_ns()
                size = early.take(live.round())
                if not pace.another(Round(bytes=size, ms=(monotonic_ns() - began) / 1e6), live.written()):
                    return pace.rounds
        except _NO_ROUNDS as error:
            self._without_rounds(error)
            return []

    def write(self, image: ImageFile, early: EarlyPages | None = None) -> None:
        """Everything into a file; but for what ``early`` has: it is written when the rest is there."""
        layouts: dict[int, MemoryLayout] = {}
        for kind, record in self._dump.skeleton():
            if isinstance(record, MemoryLayout):
                layouts[record.pid] = record
            elif isinstance(record, TreeFiles) and early is not None:
                early.files = record
            # what the rounds told is not in the file: it needs no corrections
            if kind not in (Kind.MAPS_DELTA, Kind.PAGES_DROP):
                image.record(kind, record)
        if early is not None:
            # by the PIDs that the records have
            early.ended(layouts, {self._dump.numbers(pid): left for pid, left in self._dump.remaining.items()})
        # one more is being read
        image.pages(fetched_ahead(self._dump.pages(buffers=image.AHEAD + 3), self._reading))
        self._dump.secure()
        image.pages(self._dump.early_queues())
        self._freeze()
        image.pages(self._dump.queues())
        image.record(Kind.FILES_DELTA, self._dump.delta(clocks_stand=True))

    def _freeze(self) -> None:
        self._refused = self._dump.freeze(self._later_segments())

    def _capture_all(self, addresses: set[str] | None) -> None:
        """For ports of the trees that are not captured yet, on these addresses (None: any); and for those that are, on
        addresses that connections have since."""
        ports = self._dump.ports
        known = ports & self._captured_ports
        if fresh := ports - known:
            self._capture(fresh, addresses)
            self._captured_ports |= fresh
        if known and self._used is not None:
            more = {_bare(address) for address in self._dump.connection_addresses} - self._used
            if more:
                self._capture(known, more)
                self._used |= more

    def _capture(self, ports: set[int], addresses: set[str] | None) -> None:
        capture = Capture(ports=ports, addresses=addresses)
        capture.start()
        self._segments.append(capture)

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes, once they are stopped."""
        return self._dump.pids

    @property
    def warnings(self) -> list[str]:
        """What will differ, in sentences."""
        return self._dump.warnings

    def stopped_ms(self) -> float:
        """How long they have stood still."""
        return (monotonic_ns() - self._dump.stopped_ns) / 1e6

    @property
    def connections(self) -> int:
        """How many move."""
        return self._dump.connections

    @property
    def ahead(self) -> int:
        """How many of them the target had built before the stop."""
        return self._dump.ahead

    def segments(self) -> Sequence[bytes]:
        """Captured since the last call, packed."""
        return [codec.pack(segment) for segment in self.captured()]

    def captured(self) -> list[Segment]:
        """Captured since the last call."""
        # not before the stop: the answer to a SYN may be under way when the SYN is seen
        found = [] if self._syns is None else unanswered(self._syns.segments())
        refused, self._refused = self._refused, []
        return found + refused + self._later_segments()

    def _later_segments(self) -> list[Segment]:
        """What arrived since just before the stop; but for SYNs where another capture has them: one that comes between
        two looks would be told in this call by the one, in the next by the other."""
        wanted = None if self._syns is None else lambda segment: not segment.begins
        return [segment for capture in self._segments for segment in capture.segments(wanted)]

    def resume(self) -> None:
        """Everything as it was; what was captured is delivered here."""
        self._throttle.end()
        self._dump.resume(self.captured())

    def hold(self) -> None:
        """In doubt: stopped and silent, also after this program has ended."""
        self._dump.hold()

    def held(self) -> list[HeldSocket]:
        """The frozen connections, and the listeners, for somebody who keeps them."""
        return self._dump.held()

    def end(self) -> None:
        """The originals end, and somebody keeps their connections."""
        self._dump.end()

    def throttle(self, share: float) -> None:
        """Let them run only this part of the time, until the stop."""
        self._throttle.set(share)

    def leave_pages(self) -> None:
        """Pages that can stay here for now do."""
        self._dump.leaves_pages = True

    @property
    def later(self) -> int:
        """Bytes of memory that stay here for now."""
        return self._dump.later

    @property
    def numbered(self) -> dict[int, int]:
        """The processes: number in the image to ours."""
        return {self._dump.numbers(pid): pid for pid in self._dump.pids}

    def discard(self, *, keep_memory: bool = False) -> None:
        """The originals end; with ``keep_memory`` only their connections do."""
        try:
            silence_network(self._roots[0])
        except OSError as error:
            _log.warning("the links of the original's network namespace are still up: %s", error)
        self._dump.discard(keep_memory=keep_memory)

    def close(self) -> None:
        """The captures, and what else is open."""
        self._reading.shutdown()
        self._throttle.end()
        for capture in (*self._segments, *([] if self._syns is None else [self._syns])):
            capture.close()
        self._dump.close()


def _hook_unit(one: supervisors.Supervised) -> HookUnit:
    unit = one.unit
    return HookUnit(name=unit.name.name, user=unit.name.user, restart=unit.restart, main=one.main, pids=one.pids)


def _tree(root: int) -> TreeNeed:
    pids = preflight.pids([root])
    tids = []
    for pid in pids:
        with contextlib.suppress(NoSuchProcess):
            tids += procfs.threads(pid)
    number = Numbers([root])
    return TreeNeed(
        root=root,
        pids=tuple(pids),
        tids=tuple(tids),
        command=procfs.read_stat(root).comm,
        inner=0 if number.same else number(root),
    )


def _resident(pid: int) -> int:
    """Bytes of memory that the process has in use; 0 if it has ended."""
    try:
        return int(procfs.read_status(pid).get("VmRSS", "0 kB").split()[0]) << 10
    except NoSuchProcess:
        return 0


def _directories(members: Sequence[int], mounts: Mounts | None) -> set[str]:
    """The working and root directories of the processes that have not ended meanwhile, and what their own mounts show:
    all of the host."""
    found = set()
    ways = Ways(lambda path: path, mounts)
    for pid in members:
        for name in ("cwd", "root"):
            with contextlib.suppress(OSError):
                path = os.readlink(f"/proc/{pid}/{name}")
                found |= set() if ways.carried(path) else {ways(path)}
    return found if mounts is None else found | mounts.directories
