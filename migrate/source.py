"""The source's half of a migration: the protocol's machine, the line, the addresses and the processes, in step.

Any failure before COMMIT ends in :meth:`Source._undo`: the target is told, the addresses and the connections are given
back, the original runs on.  After COMMIT only the target's word changes anything: RUNNING ends the original, ABORT
undoes as above, and without a word everything is held (InDoubt).  Signals that would interrupt are held back from
COMMIT on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

from checkpoint.errors import LazyImpossible
from checkpoint.files.identity import Beacons
from checkpoint.namespaces.ways import way_of
from migrate.addressing import plan_addresses
from migrate.clock import monotonic_ns
from migrate.driving import failure_of, hurry, logged, remote_error, signals_held
from migrate.errors import (
    InDoubt,
    LinkLost,
    LinkSilent,
    PreparedDiffers,
    TargetAborted,
    TargetStuck,
    refused,
    undone,
)
from migrate.fileoptions import shared_and_apart
from migrate.forecast import Forecast, foresee, line_rate
from migrate.forwarding import SourceForward
from migrate.hostfacts import LAZY, PROBE, without
from migrate.journal import AddressesLeave, End, Journal, Place, Role, Step, StepKind
from migrate.messages import (
    TOKEN_SIZE,
    Abort,
    Check,
    Commit,
    Done,
    Failure,
    Hello,
    Keepalive,
    Message,
    Needs,
    Prepare,
    Prepared,
    Running,
    Started,
    Stuck,
    Verdicts,
    captured,
)
from migrate.pageline import NOTE, LeftPages, PageGiver, giver_of
from migrate.parts import Outgoing
from migrate.protocol import SourceMachine
from migrate.rounds import IfBusy, Pace, Round
from migrate.rtnetlink import Netlink
from migrate.sourcehooks import SourceHooks
from migrate.squeeze import agreed
from migrate.summary import Checked, SourceOptions, Summary
from migrate.takeover import AddressPlan, Departure, control_addresses
from migrate.talk import SourceTalk
from migrate.transport import Remote
from migrate.warm import speaking
from migrate.wire import ImageWriter
from tcpstate import codec
from tcpstate.errors import TcpmigError

__all__ = ["Source"]

_log = logging.getLogger(__name__)

#: exchanges by which the target's clock is measured; the best one counts
MEASUREMENTS = 5
#: seconds between two looks at the capture while the target takes over
CAPTURE_LOOK = 0.001
#: between two words to a target that waits for late segments, nanoseconds
KEEPALIVE_NS = 1_000_000_000
#: seconds after RUNNING in which segments that still came here are passed on
STRAGGLERS = 0.25

_M = TypeVar("_M", bound=Message)


class Source(SourceTalk):
    """One migration from here to ``remote``. Call :meth:`run`, or :meth:`check` for a dry run; once.

    The caller closes ``remote``.
    """

    def __init__(self, outgoing: Outgoing, remote: Remote, options: SourceOptions | None = None) -> None:
        self.migration = secrets.token_hex(16)
        super().__init__(remote, SourceMachine(self.migration, secrets.token_bytes(TOKEN_SIZE)))
        self._outgoing = outgoing
        self._options = options or SourceOptions()
        self._journal: Journal | None = None
        self._departure: Departure | None = None
        self._there: Place | None = None
        self._hooks = SourceHooks(self._options, self.migration, remote.host)
        self._not_taken = ""
        self._forwarding = SourceForward()
        self._giver: PageGiver | None = None
        self._share = 1.0
        self._began = monotonic_ns()
        self._stopped_ns = self._told_ns = 0
        self._copying = False
        self._offered: frozenset[str] = frozenset()

    # --- the steps

    def check(self) -> Checked:
        """Step 1 alone: `--dry-run`, `check --to`. Raises the first refusal of this side; the target's are verdicts."""
        with Netlink() as netlink:
            try:
                checked, _ = self._check(netlink)
                checked = replace(checked, forecast=self._foresee(checked))
                self._say(Abort(migration=self.migration, failure=Failure(code="", message="only a check")))
                return checked
            except TcpmigError as error:
                if self._refused is not None:
                    return self._refused
                raise self._remote.explain(error) from None
            finally:
                self._outgoing.close()

    def run(self) -> Summary:
        """All steps. Raises the error that ended it; its ``outcome`` says whether anything was stopped (REFUSED: no),
        whether the original runs on (FAILED), or nobody here knows (IN_DOUBT)."""
        with Netlink() as netlink, contextlib.ExitStack() as signals:
            try:
                checked, addresses = self._check(netlink)
                return self._move(netlink, checked, addresses, signals)
            except BaseException as error:
                self._fail(error)
                if self._machine.in_doubt and not isinstance(error, InDoubt | TargetStuck):
                    # whatever it was, it does not end the doubt
                    raise InDoubt(f"after COMMIT: {error}", object=self._remote.host) from error
                if isinstance(error, TcpmigError):
                    self._remote.explain(error)
                    if (self._stopped_ns or self._copying) and self._machine.may_resume:
                        undone(error)
                raise
            finally:
                if self._giver is not None:
                    self._giver.close()
                self._outgoing.close()

    def _check(self, netlink: Netlink) -> tuple[Checked, AddressPlan]:
        with self._phase("check"):
            # who brings pages later is forked there before anything else is made
            self._greet(follows=not self._options.may_leave)
            looked = self._look()
            theirs = self._machine.receive(self._remote.first())
            self._there = Place.of(theirs.host) if isinstance(theirs, Hello) else None
            if isinstance(theirs, Hello):
                self._offered = theirs.host.features
                if self._options.may_leave and LAZY not in self._offered:
                    raise refused(LazyImpossible("pages cannot come later there", object=self._remote.host))
                self._outgoing.meet(self._offered)
            if isinstance(looked, Exception):
                raise looked
            needs = without(looked, self._options.cpu_unused)
            control = control_addresses(netlink, self._remote.pid, self._remote.host)
            self._forwarding, addresses = plan_addresses(
                netlink, self.migration, needs, control, self._remote.host, self._options, self._offered
            )
            self._hooks.judge(addresses.records)
            needs = replace(needs, addresses=addresses.records, macs=addresses.macs, forward=self._forwarding.need)
            with Beacons(map(os.path.dirname, needs.written), way_of(needs.trees[0].root)) as beacons:
                self._say(
                    Check(
                        migration=self.migration,
                        needs=replace(needs, beacons=beacons.names),
                        map_dev=self._options.map_dev,
                        options=self._options.forwarded | ({LAZY: self.migration} if self._options.may_leave else {}),
                    )
                )
                self._asked = Checked(needs=needs, here=addresses.verdicts, there=())
                answer = self._hear(Verdicts)
            self._outgoing.share(*shared_and_apart(needs.written, answer.items))
            _log.info(
                "%s can take pid %s with %d connections; addresses: %s",
                self._remote.host,
                " ".join(str(tree.root) for tree in needs.trees),
                needs.connections,
                " ".join(map(str, needs.addresses)) or "none",
            )
            return Checked(needs=needs, here=addresses.verdicts, there=answer.items), addresses

    def _look(self) -> Needs | Exception:
        """What the processes need, while the other side starts; or why they cannot be moved: first it is heard from."""
        speaking()
        try:
            return self._outgoing.needs()
        except Exception as error:
            return error

    def _foresee(self, checked: Checked) -> Forecast | None:
        if PROBE not in self._offered:
            return None
        rate = line_rate(self._say, self._hear)
        return foresee(checked.needs, checked.there, rate, self._options.max_downtime_ms, self._options.precopy)

    def _move(
        self, netlink: Netlink, checked: Checked, addresses: AddressPlan, signals: contextlib.ExitStack
    ) -> Summary:
        outgoing, options = self._outgoing, self._options
        roots = tuple(tree.root for tree in checked.needs.trees)
        moved = tuple(record.address for record in addresses.records)
        self._journal = journal = Journal.open(
            Role.SOURCE,
            self.migration,
            roots=roots,
            host=self._remote.host,
            rsh=options.rsh,
            remote_command=options.remote_command,
            there=self._there,
            directory=options.state_directory,
        )
        outgoing.begin(journal.note)
        if self._hooks:
            with self._phase("hook"):
                self._hooks.before_stop(checked.needs, moved, journal)
        packer = agreed(options.compress, self._offered)
        image = ImageWriter(self._channel, self._machine.send_image, self._attend, packer)
        if options.may_leave:
            with self._phase("line"):
                self._giver = giver_of(self.migration, self._remote.host, options)
        rounds = self._copy_live(image, moved) if options.precopy and not options.lazy else []
        if options.lazy:
            outgoing.leave_pages()
        with self._phase("prepare"):
            # with the first one the target's hook is called: before new connections are held off
            self._measure(1)
            self._forwarding.prepare(journal.note, checked.needs.connections)
            outgoing.prepare(journal.note)
            # again: routes may have changed, and this is what will be given back
            self._departure = departure = Departure(netlink, moved)
            self._measure(1 if rounds else MEASUREMENTS)  # what is written meanwhile is copied in the stop
        before, self._stopped_ns = image.written, monotonic_ns()
        hurry(self._channel, True)
        with self._phase("stop"):
            outgoing.stop(moved or self._forwarding.addresses)
        with self._phase("copy"):
            little = outgoing.send(image)
            self._answer_for_pages(journal)
            image.flush()
            if not little:
                # The target answers when it has built all that came: what takes it long is done while the connections
                # live.
                self._measure(1)
        rounds.append(Round(bytes=image.written - before, ms=self._phases["copy"]))
        with self._phase("freeze"):
            exported_ns = outgoing.freeze(image)
            image.flush()
        with self._phase("rebuild"):
            exported_ns = max(0, self._offset.there(exported_ns))
            self._say(Prepare(migration=self.migration, exported_ns=exported_ns, image_bytes=image.written))
            self._forwarding.fill(outgoing.held)
            # The target is busy now, and so the disk's time costs nothing.  Written before COMMIT is certain, this only
            # makes `recover` ask the target where it need not have asked.
            journal.append(AddressesLeave(departure=departure.record), Step(step=StepKind.COMMIT))
            self._examine(self._hear(Prepared))

        with self._phase("commit"):
            signals.enter_context(signals_held())
            departure.remove()
            self._forwarding.take_over()
            first = list(captured(outgoing.segments(), first=True))
            # in one system call: the target must not wait for the segments
            self._transmit(Commit(migration=self.migration, token=self._machine.token), *first)
        with self._phase("takeover"):
            running = self._await_running()
            hurry(self._channel, False)
        pids = checked.needs.by_our_numbers(running.pids)
        stop_ns = max(0, self._offset.here(running.released_ns) - self._stopped_ns)
        _log.info("they run on %s after a stop of %.1f ms", self._remote.host, stop_ns / 1e6)
        with self._phase("discard"):
            with logged("journalling that they run there"):
                journal.step(StepKind.RUNNING, pids=pids)
            self._afterwards(departure, pids)
        self._give_pages()
        with logged("closing the journal"):
            if self._not_taken:
                # `recover` calls the hook again
                journal.leave()
            else:
                journal.finish(End.MOVED)
        return Summary(
            outcome="partial" if running.lost or self._not_taken else "done",
            migration=self.migration,
            pid=roots[0],
            target_pid=pids.get(roots[0], 0),
            pids=pids,
            connections=outgoing.connections,
            ahead=outgoing.ahead,
            addresses=moved,
            rounds=tuple(rounds),
            stop_ms=stop_ns / 1e6,
            total_ms=(monotonic_ns() - self._began) / 1e6,
            bytes_sent=self._channel.bytes_sent,
            phases=self._phases,
            lost=running.lost,
            forward=self._forwarding.name,
            not_taken=self._not_taken,
            later=outgoing.later,
            share=self._share,
        )

    def _answer_for_pages(self, journal: Journal) -> None:
        """Pages that stay here are asked for from now on, even before the processes run there."""
        if self._giver is not None and self._outgoing.later:
            journal.note(NOTE, codec.pack(LeftPages(processes=self._outgoing.numbered)))
            self._giver.start(self._outgoing.numbered)

    def _give_pages(self) -> None:
        """Until they have all there is. PagesPending: what they lack stays here."""
        if self._giver is None or not self._outgoing.later:
            return
        _log.info("%.1f MB of memory come later", self._outgoing.later / 1e6)
        with self._phase("pages"):
            self._giver.wait()
        with logged("ending the originals"):
            self._outgoing.end()

    def _copy_live(self, image: ImageWriter, moved: tuple[str, ...]) -> list[Round]:
        """Rounds of pre-copy, until what remains fits the stop; idle connections; rounds again. WritesTooFast."""
        with self._phase("precopy"):
            self._measure(MEASUREMENTS)
            # nothing is stopped, but there is something at the target that has to be undone
            self._copying = True
            pace = Pace(self._options.max_downtime_ms, throttles=self._options.if_busy is IfBusy.THROTTLE)
            self._share = pace.share

            # a clock that is a little late there jumps a little; one that is early would run backwards
            def there(here: int) -> int:
                return self._offset.there(here) - self._offset.error_ns

            rounds = self._outgoing.copy_live(image, there, lambda: self._measure(1))
            self._copy_rounds(rounds, pace)
            self._outgoing.copy_ahead(image, moved, there, lambda: self._measure(1))
            # what was written while connections were told would be copied in the stop
            pace.go_on()
            self._copy_rounds(rounds, pace)
            self._copying = False
            return pace.rounds

    def _copy_rounds(self, rounds: Iterator[tuple[Round, Mapping[int, int]]], pace: Pace) -> None:
        """Until what remains fits the stop, or does not shrink. WritesTooFast."""
        for sent, written in rounds:
            _log.info(
                "round %d: %.1f MB in %.0f ms; %.1f MB written meanwhile",
                len(pace.rounds) + 1,
                sent.bytes / 1e6,
                sent.ms,
                sum(written.values()) / 1e6,
            )
            if not pace.another(sent, written):
                break
            if pace.share < self._share:
                self._share = pace.share
                pid, text = pace.busiest()
                _log.warning("pid %d: %s; from now on it runs %.0f %% of the time", pid, text, 100 * pace.share)
                self._outgoing.throttle(pace.share)
        pace.judge(self._options.if_busy)
        if pace.busy and self._options.if_busy is IfBusy.POSTCOPY:
            self._outgoing.leave_pages()

    def _examine(self, prepared: Prepared) -> None:
        for found in prepared.comparison.differences:
            raise PreparedDiffers(f"{found.item} was {found.sent}, reads back {found.found}", object=found.connection)

    def _await_running(self) -> Running:
        """The target's word after COMMIT, while the segments that arrive here are passed on. InDoubt, TargetStuck, or
        the error for which the target aborted (the machine's state says the same)."""
        deadline = time.monotonic() + self._channel.silence
        failure: Failure | None = None
        try:
            while time.monotonic() < deadline:
                message = self._channel.receive(CAPTURE_LOOK)
                match message and self._machine.receive(self._expect(message)):
                    case Running() as running:
                        return running
                    case Abort(failure=failure):
                        break
                    case Stuck(failure=failure):
                        raise TargetStuck(f"the target failed after the release: {failure.message} [{failure.code}]")
                    case Started() | Keepalive():
                        deadline = time.monotonic() + self._channel.silence
                self._forward()
        except TargetStuck:
            raise
        except TcpmigError as error:
            raise InDoubt(f"no word from the target after COMMIT: {error.message}", object=self._remote.host) from error
        if failure is not None:
            raise remote_error(failure, TargetAborted)
        raise InDoubt("no word from the target after COMMIT", object=self._remote.host)

    def _forward(self) -> None:
        segments = self._outgoing.segments()
        if segments:
            self._transmit(*captured(segments))

    def _pass_on(self) -> None:
        """What arrived here although they run there; and a word, so that the target goes on waiting for more."""
        self._forward()
        if monotonic_ns() - self._told_ns > KEEPALIVE_NS:
            self._told_ns = monotonic_ns()
            self._transmit(Keepalive())

    def _transmit(self, *messages: Message) -> None:
        """Send COMMIT and after it: a line that is cut is told by the next receive, after what the target said
        before."""
        for message in messages:
            self._machine.send(message)
        with contextlib.suppress(LinkLost):
            self._channel.send(*messages)

    def _afterwards(self, departure: Departure, pids: dict[int, int]) -> None:
        """They run there: nothing that fails here changes that."""
        with logged("discarding the original"):
            self._outgoing.discard(keep_memory=self._outgoing.later > 0)
        with logged("settling what is forwarded"):
            self._forwarding.settle()
        self._not_taken = self._hooks.take(pids, self._pass_on)
        with logged("the unit hook"):
            self._hooks.committed(pids)
        with logged("putting back what depended on the addresses"):
            departure.settle()
        with logged("passing on late segments"):
            # what is forwarded goes there by itself
            end = time.monotonic() + (0.0 if self._forwarding.lasts else STRAGGLERS)
            while (left := end - time.monotonic()) > 0:
                self._forward()
                time.sleep(min(left, CAPTURE_LOOK))
            self._say(Done(migration=self.migration))

    # --- failing

    def _fail(self, error: BaseException) -> None:
        """Undo, or hold, whatever the state of the protocol asks for."""
        hurry(self._channel, False)
        if self._machine.may_discard and self._outgoing.later:
            _log.warning("the originals are kept, stopped: `tcpmig recover %s` sends their memory", self.migration)
            with logged("holding"):
                self._outgoing.hold()
            if self._journal is not None:
                self._journal.leave()
        elif self._machine.may_discard:
            # RUNNING was heard: the original must go, whatever else went wrong
            _log.warning("after the move: %s", error)
            with logged("discarding the original"):
                self._outgoing.discard()
        elif self._machine.in_doubt:
            _log.warning("in doubt: everything is held; `tcpmig recover %s` settles it", self.migration)
            with logged("holding"):
                self._outgoing.hold()
            if self._journal is not None:
                self._journal.leave()
        else:
            self._undo(error)

    def _undo(self, error: BaseException) -> None:
        failures: list[Exception] = []
        # first the processes and addresses, then the courtesies
        steps = [self._restore_addresses, self._outgoing.resume, lambda: self._tell(error), self._close_journal]
        steps.append(self._hooks.aborted)
        for step in steps:
            try:
                step()
            except Exception as failure:  # all is tried, whatever the first of them meets
                _log.error("while undoing: %s", failure)
                failures.append(failure)
        if failures and isinstance(error, TcpmigError):
            error.message += f"; and undoing failed: {failures[0]}"

    def _restore_addresses(self) -> None:
        self._forwarding.undo()
        if self._departure is not None:
            self._departure.restore()

    def _tell(self, error: BaseException) -> None:
        if not self._machine.may_abort:
            self._machine.lost()
            return
        with contextlib.suppress(LinkLost, LinkSilent):
            # a line that is cut tells the same
            self._say(Abort(migration=self.migration, failure=failure_of(error)))

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.append(Step(step=StepKind.ABORTED))
            self._journal.finish(End.ABORTED)
