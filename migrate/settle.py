"""What `tcpmig recover` does with one journal of this host, once it is known what is to be done.

Each function may be cut short at any moment, by SIGKILL too, and be called again: every step leaves alone what is right
already, and the journal is closed last.  A step that fails does not keep the others from being made; the first failure
is raised at the end and leaves the journal as it is.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence

from checkpoint import preflight, undo
from checkpoint.errors import BadFileRecord, NoSuchProcess
from checkpoint.files.table import TreeFiles
from checkpoint.files.tcp import TcpGroup
from checkpoint.files.told import whole
from checkpoint.files.treefiles import AheadFiles
from checkpoint.finish import Finish, remove_made, running
from checkpoint.image.frames import Kind, PageRun, Runs
from checkpoint.records import FilesDelta
from checkpoint.traces import Made, Stubs, Traced, alive
from checkpoint.verdict import refusals
from migrate import handover, holdstore, takeoverhook
from migrate.addresses import read_configuration
from migrate.announce import LinkSocket
from migrate.arrival import PROBE_WAIT, Arrival, ArrivalRecord, take_away
from migrate.departure import Departure, DepartureRecord, give_back
from migrate.driving import logged
from migrate.errors import AddressElsewhere, KeptFramesLost, RecoverIncomplete
from migrate.forwarding import NOTE as FORWARD_NOTE
from migrate.forwarding import settle_source, settle_target
from migrate.hold import NOTE as HOLD
from migrate.hold import TakenHold
from migrate.holdend import lift
from migrate.holdstore import HoldRecord
from migrate.journal import AddressesArrive, AddressesLeave, End, Journal, JournalView, Role, Step, StepKind
from migrate.kept import read_kept
from migrate.pageline import NOTE, LeftPages, PageGiver
from migrate.rtnetlink import Netlink
from migrate.takeoverhook import TakeoverHook
from migrate.traces import Traces
from migrate.transport import DEFAULT_REMOTE_COMMAND, DEFAULT_RSH, Remote
from migrate.unithook import UnitHook
from tcpstate import codec
from tcpstate.discard import discard_connections
from tcpstate.errors import BadRecord, TcpmigError
from tcpstate.silence import Blackhole

__all__ = ["discard_original", "end_rebuilt", "finish_rebuilt", "give_up_hold", "resume_original"]

_log = logging.getLogger(__name__)


class _Steps:
    """Steps that are all made; the first failure is raised at the end."""

    def __init__(self) -> None:
        self._failed: list[TcpmigError | OSError] = []

    def make(self, what: str, step: Callable[[], object]) -> None:
        """Make one."""
        try:
            step()
        except (TcpmigError, OSError) as error:
            _log.warning("%s failed: %s", what, error)
            self._failed.append(error)

    def complain(self, subject: str) -> None:
        """Raise RecoverIncomplete if one has failed."""
        if self._failed:
            first = self._failed[0]
            raise RecoverIncomplete(f"{len(self._failed)} steps failed, first: {first}", object=subject) from first


# --- the processes were here before


def resume_original(view: JournalView, journal: Journal) -> None:
    """Everything as it was before; the processes run on, last. AddressElsewhere (nothing is changed then),
    RecoverIncomplete."""
    traces, steps = Traces.of(view), _Steps()
    processes = traces.originals
    undo.wait_untraced(processes)
    # before the connections are given back: its rule would drop what their peers send
    steps.make("ending the hold", lambda: _end_hold(view))
    steps.make("ending what was to be forwarded", lambda: settle_source(view.notes(FORWARD_NOTE), gone=False))
    leave = view.last(AddressesLeave)
    with Netlink() as netlink:
        if leave is not None:
            departure = leave.departure
            _require_free(netlink, departure)
            steps.make("giving the addresses back", lambda: give_back(netlink, departure))
    tree = traces.tree
    if tree is not None:
        steps.make("thawing connections", lambda: undo.thaw(tree))
    held = traces.listeners
    if held is not None:
        steps.make("opening listeners", lambda: undo.open_listeners(held, _members(traces)))
        if (shelf := traces.shelf) is not None:
            steps.make("filling accept queues", lambda: undo.refill(shelf, held, _members(traces)))
    if tree is not None:
        steps.make("taking file locks back", lambda: undo.take_locks(tree.locks, tree.processes))
    peeked = traces.peeked
    if peeked is not None:
        steps.make("giving options back", lambda: undo.restore_options(peeked, _members(traces)))
    steps.make("cleaning memory", lambda: undo.clean_memory(processes))
    _clear(traces, steps)
    if tree is not None:
        steps.make("letting them run", lambda: undo.go_on(tree.processes))
    _tell_hook(view, UnitHook.aborted)
    for data in view.notes(takeoverhook.NOTE)[-1:]:
        with logged("the takeover hook"):
            TakeoverHook.noted(data).undo()
    steps.complain(view.opened.migration)
    journal.append(Step(step=StepKind.ABORTED))
    journal.finish(End.ABORTED)


def _members(traces: Traces) -> list[Traced]:
    """The processes of the trees, as they are now."""
    known = {traced.pid: traced for traced in traces.originals}
    roots = [] if traces.roots is None else alive(traces.roots.processes)
    for pid in preflight.pids([root.pid for root in roots]):
        if pid not in known:
            # ended meanwhile: of no interest
            with contextlib.suppress(NoSuchProcess):
                known[pid] = Traced.now(pid)
    return list(known.values())


def _require_free(netlink: Netlink, record: DepartureRecord) -> None:
    """AddressElsewhere if another machine answers for an address that would be added."""
    here = read_configuration(netlink)
    missing = {address for address in record.moved if here.find(address) is None}
    for interface in record.configuration.interfaces:
        wanted = [a.address for a in interface.addresses if a.address in missing]
        now = here.named(interface.name)
        if not wanted or now is None or not now.resolves:
            continue
        with LinkSocket(now.name, now.mac, listen=True) as link:
            for claim in link.ask(wanted, ignore=(), wait=PROBE_WAIT):
                raise AddressElsewhere(f"{claim.mac} answers for it", object=claim.address)


def discard_original(view: JournalView, journal: Journal) -> None:
    """The copy is the one that counts: addresses away, connections ended without a packet, processes killed.
    RecoverIncomplete: then a process may be left, stopped and silent."""
    traces, steps = Traces.of(view), _Steps()
    undo.wait_untraced(traces.originals)
    leave = view.last(AddressesLeave)
    with Netlink() as netlink:
        if leave is not None:
            # before the connections: an address without its sockets answers with resets
            _leave(netlink, leave.departure)
    # the same holds for one that is forwarded
    settle_source(view.notes(FORWARD_NOTE), gone=True)
    tree = traces.tree
    if tree is not None:
        if view.opened.role is not Role.CHECKPOINT:
            # Not if it fails: a process that ends with living connections resets them.  Those of a checkpoint are held.
            undo.discard(tree)
        if view.notes(NOTE):
            # the copy lacks pages that only they have: nothing is ended before
            _give_pages(view, tree.processes)
        steps.make("ending the original", lambda: undo.end(tree.processes))
        if traces.shelf is not None:
            # in repair mode they end without a word
            steps.make("ending what waited to be accepted", traces.shelf.holder.end)
        for path in tree.objects:
            steps.make("removing System V objects", functools.partial(remove_made, Made(path=path)))
    _clear(traces, steps)
    running = view.step(StepKind.RUNNING)
    there = {} if running is None else running.pids or {}
    pids = tuple(there.get(root, 0) for root in view.opened.roots)
    for data in view.notes(takeoverhook.NOTE)[-1:]:
        steps.make("bringing the addresses there", functools.partial(_take, data, pids))
    _tell_hook(view, lambda hook: hook.committed(pids))
    steps.complain(view.opened.migration)
    journal.finish(End.MOVED)


def _take(data: bytes, pids: tuple[int, ...]) -> None:
    TakeoverHook.noted(data).take(pids)


def _give_pages(view: JournalView, processes: Sequence[Traced]) -> None:
    """Memory that was left here goes there. PagesPending, RemoteStartFailed, ..."""
    opened = view.opened
    rsh, command = opened.rsh or DEFAULT_RSH, opened.remote_command or DEFAULT_REMOTE_COMMAND
    with contextlib.closing(
        PageGiver(opened.migration, lambda: Remote(opened.host, rsh=rsh, remote_command=command))
    ) as giver:
        if giver.connect():
            (note,) = view.notes(NOTE)[-1:]
            living = {one.pid for one in alive(processes)}
            left = codec.unpack(LeftPages, note).processes
            giver.start({number: pid for number, pid in left.items() if pid in living})
            giver.wait()


def _leave(netlink: Netlink, record: DepartureRecord) -> None:
    here = read_configuration(netlink)
    if any(here.find(address) is not None for address in record.moved):
        departure = Departure(netlink, record.moved, record.configuration)
        departure.remove()
        departure.settle()


# --- the processes are to be here


def end_rebuilt(view: JournalView, journal: Journal) -> None:
    """Nothing is left of what was rebuilt here. RecoverIncomplete."""
    traces, steps = Traces.of(view), _Steps()
    arrive = view.last(AddressesArrive)
    if traces.stubs is not None:
        processes = traces.stubs.processes
        undo.wait_untraced(processes)
        if view.reached(StepKind.STARTED) and arrive is not None:
            with Netlink() as netlink:
                take_away(netlink, arrive.arrival)
            # some may be out of repair: they would say goodbye
            if not traces.stubs.held:
                _discard_all(processes)
        steps.make("ending what was rebuilt", lambda: undo.end(processes))
    steps.make("forwarding as before", lambda: settle_target(view.notes(FORWARD_NOTE), arrived=False))
    _clear(traces, steps)
    _tell_hook(view, UnitHook.aborted)
    steps.complain(view.opened.migration)
    journal.append(Step(step=StepKind.ABORTED))
    journal.finish(End.ABORTED)


def _discard_all(processes: Sequence[Traced]) -> None:
    with preflight.live_files([each.pid for each in alive(processes)]) as files:
        discard_connections(TcpGroup(files).established, close=False)


def finish_rebuilt(view: JournalView, journal: Journal) -> dict[int, int]:
    """What was started here goes on here: addresses added, connections released, processes let go. Root PIDs at the
    source to PIDs here. AddressElsewhere, KeptFramesLost (nothing is changed then), RecoverIncomplete."""
    traces, steps = Traces.of(view), _Steps()
    stubs = traces.stubs or Stubs(processes=[], names=[], roots={})
    undo.wait_untraced(stubs.processes)
    arrive = view.last(AddressesArrive)
    record = ArrivalRecord(landings=()) if arrive is None else arrive.arrival
    # what comes home is let in, and what is forwarded to here: their sockets stand, deaf still
    settle_target(view.notes(FORWARD_NOTE), arrived=True)
    if view.reached(StepKind.RUNNING) or not alive(stubs.processes):
        _log.info("they were let go, or have ended")
    elif running(stubs.processes):
        # the first is let go when all is released
        undo.go_on(stubs.processes)
    else:
        with _finish(traces, stubs) as finish, _arrivals(record) as arrivals:
            # all of them stand, deaf still: nobody is reset
            for hold in _holds(view):
                lift(hold)
            finish.release()
            for arrival in arrivals:
                steps.make("announcing the addresses", functools.partial(arrival.announce, time.monotonic()))
            steps.make("telling windows", finish.tell_windows)
            undo.go_on(stubs.processes)
            for arrival in arrivals:
                steps.make("settling addresses", arrival.settle)
                steps.make("announcing again", functools.partial(_repeat, arrival))
    journal.step(StepKind.RUNNING, pids=stubs.roots)
    steps.make("ending the hold", lambda: _end_hold(view))
    _clear(traces, steps)
    pids = tuple(stubs.roots.values())
    _tell_hook(view, lambda hook: hook.committed(pids))
    steps.complain(view.opened.migration)
    journal.finish(End.MOVED)
    return stubs.roots


@contextlib.contextmanager
def _finish(traces: Traces, stubs: Stubs) -> Iterator[Finish]:
    files: TreeFiles | None = None
    ahead: AheadFiles | None = None
    delta = FilesDelta()
    sent: list[PageRun] = []
    for path in traces.kept:
        try:
            for frame in read_kept(path):
                match frame.kind:
                    case Kind.AHEAD:
                        ahead = codec.unpack(AheadFiles, frame.record)
                    case Kind.FILES:
                        files = whole(codec.unpack(TreeFiles, frame.record), ahead)
                    case Kind.FILES_DELTA:
                        more = codec.unpack(FilesDelta, frame.record).whole(ahead)
                        delta = FilesDelta(files={**delta.files, **more})
                    case _:
                        runs = Runs.unpack(frame.record)
                        data = memoryview(frame.data)
                        sent.append(PageRun(space=runs.space, id=runs.id, runs=runs.runs, data=data))
        except (BadRecord, BadFileRecord, ValueError) as error:
            raise KeptFramesLost(f"not understood: {error}", object=str(path)) from error
    if files is None:
        raise KeptFramesLost(
            "the table of open files is not there", object=" ".join(map(str, traces.kept)) or "no path was noted"
        )
    finish = Finish(files, delta, sent, stubs)
    try:
        yield finish
    finally:
        finish.close()


@contextlib.contextmanager
def _arrivals(record: ArrivalRecord) -> Iterator[list[Arrival]]:
    """The addresses, local: those that were not added yet are, if nobody else has them."""
    with contextlib.ExitStack() as ends:
        with Netlink() as netlink:
            here = read_configuration(netlink)
        missing = [x for x in record.landings if here.find(x.record.address) is None]
        there = [x for x in record.landings if x not in missing]
        found = []
        if there:
            present = ends.enter_context(Arrival(()))
            present.adopt(there)
            found.append(present)
        if missing:
            # by the names of this host: each to where it was to land
            devices = {x.record.interface: x.record.interface for x in missing}
            arrival = ends.enter_context(Arrival([x.record for x in missing], map_dev=devices))
            for refused in refusals(arrival.check(())):
                raise AddressElsewhere(refused.text, object=refused.subject)
            arrival.prepare()
            arrival.add()
            found.append(arrival)
        yield found


def _repeat(arrival: Arrival) -> None:
    while (wait := arrival.repeat(time.monotonic())) is not None:
        time.sleep(wait)


def give_up_hold(view: JournalView, journal: Journal) -> None:
    """A hold that was being given up for a restore elsewhere goes; before COMMIT nothing was changed."""
    handover.settle(view)
    journal.finish(End.MOVED if view.reached(StepKind.COMMIT) else End.ABORTED)


def _holds(view: JournalView) -> list[HoldRecord]:
    """The hold that a checkpoint was making, or a restore taking back; as far as it had come."""
    noted = [codec.unpack(HoldRecord, data) for data in view.notes(HOLD)[-1:]]
    return [holdstore.find(record.hold) or record for record in noted]


def _end_hold(view: JournalView) -> None:
    for record in _holds(view):
        with TakenHold(record) as held:
            held.finish()


def _tell_hook(view: JournalView, tell: Callable[[UnitHook], None]) -> None:
    """Whoever deals with supervisors on this host hears how it ended; once more, if we were cut short. That it fails
    changes nothing."""
    for data in view.notes("unit-hook")[-1:]:
        with logged("the unit hook"):
            tell(UnitHook.noted(data))


def _clear(traces: Traces, steps: _Steps) -> None:
    """Rules and files of ours. A complete image has its own name by now, and stays."""
    if traces.rules is not None:
        rules = Blackhole(traces.rules.priorities)
        steps.make("removing rules", rules.remove)
    for made in traces.made:
        steps.make("removing what was made", functools.partial(remove_made, made))
    for path in traces.kept:
        steps.make("removing what was kept", functools.partial(path.unlink, missing_ok=True))
