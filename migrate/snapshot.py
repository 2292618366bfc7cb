"""Process trees into a file and out of it again, with their connections and addresses.

``checkpoint`` ends the processes (unless they are to run on), and a holder keeps their connections and listeners
(:mod:`migrate.hold`): peers find nobody home, neither an answer nor a reset, and keep trying as long as their own
patience lasts.  ``restore`` brings the processes back: on the same host with the very sockets, on another host with
connections rebuilt from the image, and their addresses.

The order of a checkpoint that ends the processes: the image is complete and on disk, then the holders have the
sockets, then the processes end.  Until then any failure lets the processes run on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from checkpoint import births
from checkpoint.early import EarlyPages
from checkpoint.errors import LazyImpossible
from checkpoint.files.listener import Listener
from checkpoint.files.policy import NO_POLICY, Policy
from checkpoint.image.chain import Chain, open_chain
from checkpoint.image.frames import Kind
from checkpoint.image.lazypages import ImagePages
from checkpoint.image.reader import ImageReader, open_image
from checkpoint.image.writer import ImageFile
from checkpoint.memory.lazy import available
from checkpoint.namespaces.network import Network
from checkpoint.namespaces.spaces import entered
from checkpoint.preflight import pids as members_of
from checkpoint.restore import Restore
from checkpoint.traces import Made, Trace, write
from checkpoint.verdict import refusals
from migrate import holdstore
from migrate.addresses import AddressRecord, read_configuration
from migrate.bringer import Bringer
from migrate.clock import Laps
from migrate.driving import logged, signals_held
from migrate.errors import AddressTakenAtTarget, NotHeld, TargetRefused, from_remote, refused
from migrate.fileoptions import FileOptions
from migrate.handover import Origin
from migrate.hold import DEFAULT_TIMEOUT, HoldMade, NewHold, TakenHold
from migrate.journal import AddressesArrive, End, Journal, Role, Step, StepKind
from migrate.kept import KeptFrames
from migrate.outgoing import OutgoingTrees
from migrate.ownnetwork import enter_network, probe
from migrate.rtnetlink import Netlink
from migrate.snapsummary import CheckpointSummary, RestoreSummary
from migrate.summary import MAX_DOWNTIME_MS
from migrate.takeover import AddressPlan, AddressPolicy, Arrival, all_addresses, plan, prefix_lengths, select
from migrate.unithook import HookFacts, UnitHook
from tcpstate.capture import Capture
from tcpstate.segment import Segment
from tcpstate.slotted import dataclass

__all__ = ["Addresses", "checkpoint", "restore"]

_log = logging.getLogger(__name__)

_NAME_THE_ORIGIN = (
    "Name the host that holds the connections with --from (`tcpmig holds` there shows it); "
    "if the address is this host's own, use --no-address."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """The record ADDRESSES: what has to be local where the image is restored.

    moved    whether they were taken from the origin's host, and so have to be added
    peers    the other ends of the connections
    network  the tree's own network namespace, which has the addresses; None: its host has them
    """

    records: tuple[AddressRecord, ...] = ()
    moved: bool = False
    peers: tuple[str, ...] = ()
    network: Network | None = None


def checkpoint(
    roots: Sequence[int],
    path: str,
    *,
    leave_running: bool = False,
    address: str = "auto",
    files: Policy = NO_POLICY,
    unit_hook: str = "",
    timeout: float = DEFAULT_TIMEOUT,
    capacity: int | None = None,
    max_downtime_ms: float | None = MAX_DOWNTIME_MS,
    parent: str = "",
) -> CheckpointSummary:
    """The trees at ``roots`` into the image file ``path``.

    leave_running  they run on, connections and all; else they end, and their connections are held
    address        which addresses go with the image: auto, none, or a list
    files          what was decided about files and connections that lead out of the trees
    unit_hook      a program that deals with the processes' supervisors; not called if they run on
    timeout        seconds after which a hold ends by itself; 0: never
    capacity       sockets that one holder keeps; None: as many as it can
    max_downtime_ms  memory is copied in rounds, until what is left for the stop takes no longer; None: no rounds, and
                     none either of processes that end, but for a ``parent``
    parent         an earlier image of theirs: pages that are there already are not written again

    ImageError (of the parent), Refused, HoldUnavailable (nothing was stopped), HolderFailed, ImageNotWritten and others
    (everything runs on).
    """
    begun, laps = time.monotonic(), Laps()
    hook = None
    if unit_hook and not leave_running:
        hook = UnitHook(unit_hook, HookFacts(command="checkpoint", role="source", host=path, pids=tuple(roots)))
    trees = OutgoingTrees(roots, files, stay=leave_running, unit_hook=hook is not None)
    with (
        entered(roots[0]),
        Netlink() as netlink,
        contextlib.closing(trees),
        contextlib.ExitStack() as ends,
    ):
        older = ends.enter_context(contextlib.closing(_chain(parent))) if parent else None
        needs = trees.needs()
        if needs.network is not None and address == "auto":
            address = all_addresses(netlink)
        wanted = select(address, needs.used_addresses)
        # the addresses stay here: only a restore elsewhere takes them from whoever uses them too
        allow, lengths = AddressPolicy.ALLOW, prefix_lengths(address)
        chosen = plan(netlink, wanted, pids=members_of(roots), control={}, policy=allow, lengths=lengths)
        if not leave_running:
            _refuse(chosen)
        addresses = Addresses(
            records=chosen.records,
            moved=not leave_running or needs.network is not None,
            peers=needs.peers,
            network=needs.network,
        )
        identity = secrets.token_hex(16)
        journal = Journal.open(Role.CHECKPOINT, identity, roots=tuple(roots), image=os.path.abspath(path))
        hold: NewHold | None = None
        sockets = needs.away + sum(isinstance(file, Listener) for file in needs.files)
        if sockets and not leave_running:
            hold = NewHold(
                identity,
                image=path,
                roots=roots,
                addresses=chosen.records,
                timeout=timeout,
                capacity=capacity,
            )
        try:
            file = ImageFile(path)
            write(journal.note, Trace.MADE, Made(path=file.temporary))
            if hold is not None:
                hold.begin(journal.note, sockets)
            # opened first: a file that cannot be made stops nothing
            with ThreadPoolExecutor(1) as file.executor, file as image:
                early = None
                # Where they end all of it is written before that anyway: copied ahead it would only be written twice.
                if max_downtime_ms is not None and (leave_running or older is not None):
                    early = ends.enter_context(contextlib.closing(EarlyPages(path, older)))
                if hook is not None:
                    facts = replace(hook.facts, units=needs.units)
                    journal.note("unit-hook", hook.note(facts))
                    hook.before_stop(facts)
                trees.begin(journal.note)
                rounds = [] if early is None else trees.collect(early, max_downtime_ms or 0.0)
                trees.prepare(journal.note)
                laps.begin()
                trees.stop(() if leave_running else [record.address for record in chosen.records])
                laps.done("stop")
                trees.write(image, early)
                image.record(Kind.ADDRESSES, addresses)
                if hold is not None:
                    image.record(Kind.HOLD, hold.made)
                if leave_running:
                    laps.done("write")
                    stopped_ms = trees.stopped_ms()
                    trees.resume()
                if early is not None:
                    early.write(image)
            if not leave_running:
                laps.done("write")
                with signals_held():
                    if hold is not None:
                        hold.take(trees.held(), trees.captured())
                        hold.seal()
                    journal.step(StepKind.COMMIT)
                    laps.done("hold")
                    stopped_ms = trees.stopped_ms()
                    trees.end()
        except BaseException:
            try:
                if hold is not None:
                    hold.undo()
            finally:
                trees.resume()
            journal.finish(End.ABORTED)
            if hook is not None:
                with logged("the unit hook"):
                    hook.aborted()
            raise
        finally:
            if hold is not None:
                hold.close()
        if hook is not None:
            with logged("the unit hook"):
                hook.committed()
        with logged("closing the journal"):
            journal.finish(End.DONE if leave_running else End.MOVED)
        return CheckpointSummary(
            pid=roots[0],
            pids=trees.pids,
            file=path,
            bytes=os.stat(path).st_size,
            connections=trees.connections,
            addresses=tuple(record.address for record in chosen.records),
            hold=hold.hold if hold is not None else "",
            running=leave_running,
            stop_ms=stopped_ms,
            total_ms=1e3 * (time.monotonic() - begun),
            phases=laps.phases,
            rounds=tuple(rounds),
            inherited=0 if early is None else early.inherited,
            warnings=tuple(trees.warnings),
        )


def _chain(path: str) -> Chain:
    """An image and those that it builds on, verified. ImageError."""
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        return open_chain(open_image(path, executor=executor), executor=executor)


def _refuse(chosen: AddressPlan) -> None:
    for first in refusals(chosen.verdicts):
        raise from_remote(first.code, first.text, first.subject, first.fix, otherwise=TargetRefused, where="")


def restore(
    path: str,
    *,
    take_addresses: bool = True,
    files: FileOptions | None = None,
    origin: Origin | None = None,
    lazy: bool = False,
    new_pids: bool = False,
) -> RestoreSummary:
    """The image's processes run again, with their PIDs; their addresses come to this host.

    take_addresses  False: they are left alone (the connections work only if they are local anyway)
    files           where files and interfaces are here, and whether shipped files replace others
    origin          the host that holds the connections, if it is another one: it gives them up, and the addresses
    lazy            they run at once, and pages of memory come when they are needed, the others in the background
    new_pids        they get a PID namespace, and their numbers in there

    ImageError, Refused and others: nothing is left of it then, and what is held, here or there, is held as before.
    """
    begun, laps = time.monotonic(), Laps()
    identity = secrets.token_hex(16)
    with contextlib.ExitStack() as ends:
        bringer = None
        if lazy:
            _refuse_lazy()
            bringer = ends.enter_context(contextlib.closing(Bringer(identity, os.path.abspath(path))))
        births.ask()
        ends.callback(births.threads_go_on)  # who tries it is waited for, whatever comes
        executor = ends.enter_context(ThreadPoolExecutor(os.cpu_count()))
        image = ends.enter_context(open_image(path, executor=executor, later=lazy))
        chain = open_chain(image, executor=executor)
        ends.callback(chain.close)
        addresses, made = _last(image, Kind.ADDRESSES, Addresses), _last(image, Kind.HOLD, HoldMade)
        files = files or FileOptions()
        own = None if addresses is None else addresses.network
        network = enter_network(ends, own, made if origin is None else None, files)
        held = None if made is None or origin is not None else _held_here(made)
        if held is not None:
            ends.enter_context(held)
        macs: tuple[str, ...] = ()
        if origin is not None:
            if made is None:
                raise NotHeld("the connections of this image are not held anywhere", object=path)
            macs = origin.ask(made, [record.address for record in _records(addresses)])
        coming = _records(addresses) if take_addresses else ()
        if network is not None:
            probe(network, coming, macs)
        if made is not None and made.here:
            # it is this host's image: what is local is so because it never left
            coming = _not_local(coming)
        names = {} if network is None else network.network.names
        arrival = ends.enter_context(Arrival(coming, map_dev=names | files.devices))
        verdicts = arrival.check(macs)
        for first in refusals(verdicts):
            held_there = first.code == AddressTakenAtTarget.code and made is not None and origin is None
            fix = _NAME_THE_ORIGIN if held_there else first.fix
            raise from_remote(first.code, first.text, first.subject, fix, otherwise=TargetRefused, where="")
        arrival.prepare(() if addresses is None else addresses.peers)
        journal = Journal.open(Role.RESTORE, identity, image=os.path.abspath(path))
        rebuilt = Restore(
            note=journal.note,
            external=files.external,
            held=None if held is None else held.sockets,
            bringer=bringer,
            new_pids=new_pids,
        )
        if bringer is not None:
            bringer.reads(image.fd)
        if rebuilt.later is not None and image.later is not None:
            pages = ends.enter_context(contextlib.closing(ImagePages(image.fd, image.later, path)))
            rebuilt.later.reads(pages)
        rebuilt.place(files.path, overwrite=files.overwrite, devices=files.devices)
        kept = KeptFrames.noted(journal.note)
        ends.callback(kept.close)
        segments: list[Segment] = []
        laps.done("check")
        try:
            if held is not None:
                held.noted(journal.note)
            for frame in chain.frames():
                kept.keep(frame)
                rebuilt.apply(frame)
            rebuilt.end()  # open_image has seen it
            laps.done("build")
            for connection, difference in rebuilt.prepare():
                raise rebuilt.differs(connection, difference)
            laps.done("connections")
            ports = rebuilt.ports
            capture = ends.enter_context(Capture(ports=ports)) if ports else None
            ends.enter_context(signals_held())
            if origin is not None:
                segments += origin.give_up()
            if bringer is not None:
                bringer.seal()
            if network is not None:
                network.connect()
            rebuilt.survive()
            journal.append(AddressesArrive(arrival=arrival.record), Step(step=StepKind.STARTED))
            arrival.add()
            if held is not None:
                segments += held.captured()
                # all of them stand, deaf still: nobody is reset
                held.lift()
        except BaseException:
            rebuilt.abort()
            arrival.remove()
            kept.remove()
            journal.finish(End.ABORTED)
            raise
        laps.done("start")
        connections = rebuilt.connections
        rebuilt.release()
        if network is not None:
            network.settle()
        with logged("announcing the addresses"):
            arrival.announce(time.monotonic())
        with logged("sockets that were connecting"):
            rebuilt.connect()
        if capture is not None:
            rebuilt.replay(segments + capture.segments())
        with logged("telling windows"):
            rebuilt.tell_windows()
        pids = rebuilt.run()
        laps.done("release")
        taken, init = rebuilt.taken, rebuilt.init
        rebuilt.close()
        if held is not None:
            with logged("ending the hold"):
                held.finish()
        with logged("journalling that they run"):
            journal.step(StepKind.RUNNING, pids=pids)
            kept.remove()
        _finish(arrival)
        with logged("closing the journal"):
            journal.finish(End.MOVED)
        root = next(iter(pids.values()))
        return RestoreSummary(
            pid=root,
            pids=pids,
            init=init,
            file=path,
            connections=len(connections),
            held=taken,
            addresses=tuple(landing.record.address for landing in arrival.record.landings),
            total_ms=1e3 * (time.monotonic() - begun),
            run_ms=sum(laps.phases.values()),
            phases=laps.phases,
            later=0 if rebuilt.later is None else rebuilt.later.bytes,
            warnings=tuple(rebuilt.warnings),
        )


def _refuse_lazy() -> None:
    lacking = available()
    if lacking:
        raise refused(LazyImpossible(f"this kernel lacks {lacking}"))


_Record = TypeVar("_Record")


def _last(image: ImageReader, kind: Kind, cls: type[_Record]) -> _Record | None:
    found = [frame.decode(cls) for frame in image.records(kind)]
    return found[-1] if found else None


def _records(addresses: Addresses | None) -> tuple[AddressRecord, ...]:
    return addresses.records if addresses is not None and addresses.moved else ()


def _not_local(records: Sequence[AddressRecord]) -> tuple[AddressRecord, ...]:
    if not records:
        return ()
    with Netlink() as netlink:
        here = read_configuration(netlink)
    return tuple(record for record in records if here.find(record.address) is None)


def _held_here(made: HoldMade) -> TakenHold | None:
    if not made.here:
        return None
    record = holdstore.find(made.hold)
    if record is None:
        _log.warning("hold %s is over: connections are rebuilt from the image, and some peers may be gone", made.hold)
        return None
    return TakenHold(record)


def _finish(arrival: Arrival) -> None:
    """They run: announce until everybody should have heard."""
    with logged("giving addresses their flags"):
        arrival.settle()
    while True:
        wait: float | None = None
        with logged("announcing the addresses again"):
            wait = arrival.repeat(time.monotonic())
        if wait is None:
            return
        time.sleep(wait)
