"""Process trees into a file and out of it again, with their connections and addresses.

``checkpoint`` ends the processes (unless they are to run on) and takes their addresses away: peers then find nobody
home, neither an answer nor a reset, and keep trying as long as their own patience lasts.  ``restore`` brings processes,
connections and addresses back, here or on another host of the same link.

The order of a checkpoint that ends the processes: the image is complete and on disk, then the addresses go, then the
connections are ended without a packet.  Until the image is on disk any failure lets the processes run on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from checkpoint.files.policy import NO_POLICY, Policy
from checkpoint.image.frames import Kind
from checkpoint.image.reader import ImageReader, open_image
from checkpoint.image.writer import ImageFile
from checkpoint.preflight import pids as members_of
from checkpoint.restore import Restore
from checkpoint.traces import Made, Trace, write
from checkpoint.verdict import refusals
from migrate.addresses import AddressRecord
from migrate.driving import logged, signals_held
from migrate.errors import ConnectionsWouldBreak, TargetRefused, from_remote
from migrate.fileoptions import FileOptions
from migrate.journal import AddressesArrive, AddressesLeave, End, Journal, Role, Step, StepKind
from migrate.kept import KeptFrames
from migrate.outgoing import OutgoingTrees
from migrate.rtnetlink import Netlink
from migrate.takeover import AddressPlan, AddressPolicy, Arrival, Departure, plan, select
from migrate.unithook import HookFacts, UnitHook
from tcpstate.capture import Capture, replay
from tcpstate.errors import Outcome

__all__ = ["Addresses", "CheckpointSummary", "RestoreSummary", "checkpoint", "restore"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """The record ADDRESSES: what has to be local where the image is restored.

    moved  whether they were taken from the origin's host, and so have to be added
    peers  the other ends of the connections
    """

    records: tuple[AddressRecord, ...] = ()
    moved: bool = False
    peers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSummary:
    """What a checkpoint did.

    pid, pids    the (first) root; all processes
    file, bytes  the image
    connections  how many it holds
    addresses    those that were taken away
    running      whether the processes run on
    stop_ms      how long they stood still (until they were resumed, or ended)
    """

    pid: int
    pids: tuple[int, ...]
    file: str
    bytes: int
    connections: int
    addresses: tuple[str, ...]
    running: bool
    stop_ms: float
    total_ms: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreSummary:
    """What a restore did.

    pid, pids    the (first) root; root PIDs in the image and here
    connections  how many live again
    addresses    those that were added
    """

    pid: int
    pids: dict[int, int]
    file: str
    connections: int
    addresses: tuple[str, ...]
    total_ms: float
    warnings: tuple[str, ...] = ()

    @property
    def status(self) -> Outcome:
        """The exit status."""
        return Outcome.DONE


def checkpoint(
    roots: Sequence[int],
    path: str,
    *,
    leave_running: bool = False,
    address: str = "auto",
    policy: AddressPolicy = AddressPolicy.REFUSE,
    files: Policy = NO_POLICY,
    unit_hook: str = "",
) -> CheckpointSummary:
    """The trees at ``roots`` into the image file ``path``.

    leave_running  they run on, connections and all; else they end
    address        which addresses go with the image: auto, none, or a list
    files          what was decided about files and connections that lead out of the trees
    unit_hook      a program that deals with the processes' supervisors; not called if they run on

    Refused, ConnectionsWouldBreak (nothing was stopped), ImageNotWritten and others (everything runs on).
    """
    begun = time.monotonic()
    hook = None
    if unit_hook and not leave_running:
        hook = UnitHook(unit_hook, HookFacts(command="checkpoint", role="source", host=path, pids=tuple(roots)))
    trees = OutgoingTrees(roots, files, stay=leave_running, unit_hook=hook is not None)
    with Netlink() as netlink, contextlib.closing(trees):
        needs = trees.needs()
        wanted = select(address, needs.used_addresses)
        chosen = plan(netlink, wanted, pids=members_of(roots), control={}, policy=policy)
        # addresses that nobody takes away can be shared
        if not leave_running:
            _refuse(chosen)
            if needs.away and not chosen.records:
                raise ConnectionsWouldBreak(
                    f"{needs.away} connections would be reset by their peers' next segment",
                    object=f"pid {roots[0]}",
                )
        addresses = Addresses(records=chosen.records, moved=not leave_running, peers=needs.peers)
        moved = () if leave_running else tuple(record.address for record in chosen.records)
        departure = Departure(netlink, moved)
        journal = Journal.open(Role.CHECKPOINT, secrets.token_hex(16), roots=tuple(roots), image=os.path.abspath(path))
        try:
            file = ImageFile(path)
            write(journal.note, Trace.MADE, Made(path=file.temporary))
            # opened first: a file that cannot be made stops nothing
            with ThreadPoolExecutor(1) as file.executor, file as image:
                if hook is not None:
                    facts = replace(hook.facts, addresses=moved, units=needs.units)
                    journal.note("unit-hook", hook.note(facts))
                    hook.before_stop(facts)
                trees.prepare(journal.note)
                trees.stop(moved)
                trees.write(image)
                image.record(Kind.ADDRESSES, addresses)
                if leave_running:
                    stopped_ms = trees.stopped_ms()
                    trees.resume()
            if not leave_running:
                with signals_held():
                    journal.append(AddressesLeave(departure=departure.record), Step(step=StepKind.COMMIT))
                    departure.remove()
                    stopped_ms = trees.stopped_ms()
                    trees.discard()
        except BaseException:
            try:
                departure.restore()
            finally:
                trees.resume()
            journal.finish(End.ABORTED)
            if hook is not None:
                with logged("the unit hook"):
                    hook.aborted()
            raise
        if hook is not None:
            with logged("the unit hook"):
                hook.committed()
        with logged("putting back what depended on the addresses"):
            departure.settle()
        with logged("closing the journal"):
            journal.finish(End.DONE if leave_running else End.MOVED)
        return CheckpointSummary(
            pid=roots[0],
            pids=trees.pids,
            file=path,
            bytes=os.stat(path).st_size,
            connections=trees.connections,
            addresses=moved,
            running=leave_running,
            stop_ms=stopped_ms,
            total_ms=1e3 * (time.monotonic() - begun),
            warnings=tuple(trees.warnings),
        )


def _refuse(chosen: AddressPlan) -> None:
    for first in refusals(chosen.verdicts):
        raise from_remote(first.code, first.text, first.subject, first.fix, otherwise=TargetRefused, where="")


def restore(path: str, *, take_addresses: bool = True, files: FileOptions | None = None) -> RestoreSummary:
    """The image's processes run again, with their PIDs; their addresses come to this host.

    take_addresses  False: they are left alone (the connections work only if they are local anyway)
    files           where files are here, and whether shipped ones replace others

    ImageError, Refused and others: nothing is left of it then.
    """
    begun = time.monotonic()
    with contextlib.ExitStack() as ends:
        executor = ends.enter_context(ThreadPoolExecutor(os.cpu_count()))
        image = ends.enter_context(open_image(path, executor=executor))
        addresses = _addresses(image)
        arrival = ends.enter_context(Arrival(addresses.records if addresses.moved and take_addresses else ()))
        verdicts = arrival.check(())
        for first in refusals(verdicts):
            raise from_remote(first.code, first.text, first.subject, first.fix, otherwise=TargetRefused, where="")
        arrival.prepare(addresses.peers)
        journal = Journal.open(Role.RESTORE, secrets.token_hex(16), image=os.path.abspath(path))
        files = files or FileOptions()
        rebuilt = Restore(note=journal.note, path=files.path, overwrite=files.overwrite)
        kept = KeptFrames.noted(journal.note)
        ends.callback(kept.close)
        try:
            for frame in image.frames:
                kept.keep(frame)
                rebuilt.apply(frame)
            rebuilt.end()  # open_image has seen it
            for connection, difference in rebuilt.prepare():
                raise rebuilt.differs(connection, difference)
            ports = rebuilt.ports
            capture = ends.enter_context(Capture(ports=ports)) if ports else None
            ends.enter_context(signals_held())
            rebuilt.survive()
            journal.append(AddressesArrive(arrival=arrival.record), Step(step=StepKind.STARTED))
            arrival.add()
        except BaseException:
            rebuilt.abort()
            arrival.remove()
            kept.remove()
            journal.finish(End.ABORTED)
            raise
        connections = rebuilt.connections
        rebuilt.release()
        with logged("announcing the addresses"):
            arrival.announce(time.monotonic())
        if capture is not None:
            replay(capture.segments(), connections)
        with logged("telling windows"):
            rebuilt.tell_windows()
        pids = rebuilt.run()
        rebuilt.close()
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
            file=path,
            connections=len(connections),
            addresses=tuple(landing.record.address for landing in arrival.record.landings),
            total_ms=1e3 * (time.monotonic() - begun),
            warnings=tuple(rebuilt.warnings),
        )


def _addresses(image: ImageReader) -> Addresses:
    found = [frame.decode(Addresses) for frame in image.records(Kind.ADDRESSES)]
    return found[-1] if found else Addresses()


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
