"""The target's half of a migration: `tcpmig receive`.

Until the release begins, every failure ends in :meth:`Target._undo`: nothing stays on this host, that is journalled,
and then the source is told.  From the release on there is only forward: a line that is cut does not stop it, and a
failure leaves everything held (STUCK).
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

from checkpoint import urgency
from checkpoint.verdict import Verdict, refusals
from migrate import drains
from migrate.clock import elapsed_since, monotonic_ns
from migrate.driving import failure_of, hurry, logged, remote_error, signals_held
from migrate.errors import (
    LinkLost,
    LinkSilent,
    ProtocolError,
    SourceAborted,
    TargetRefused,
    TargetStuck,
    refused,
    undone,
)
from migrate.fileoptions import device_texts
from migrate.forwarding import TargetForward
from migrate.hostfacts import CHECK_FOLLOWS, features, host_facts, judge_host
from migrate.journal import AddressesArrive, End, Journal, Role, Step, StepKind
from migrate.messages import (
    HIGHEST_VERSION,
    LOWEST_VERSION,
    Abort,
    Ask,
    Captured,
    Check,
    Commit,
    Done,
    Failure,
    Fetch,
    Fetched,
    Hello,
    HostFacts,
    Keepalive,
    Measure,
    Measured,
    Message,
    Prepare,
    Prepared,
    Probe,
    Probed,
    Refused,
    Running,
    Started,
    Stuck,
    Verdicts,
)
from migrate.pageline import hand_over, pages_there
from migrate.parts import Arrived, Incoming
from migrate.protocol import TargetMachine, TargetState, agree
from migrate.takeover import Arrival
from migrate.unithook import HookFacts, UnitHook
from migrate.wire import Channel, ImageFrame
from tcpstate.errors import TcpmigError
from tcpstate.slotted import dataclass

__all__ = ["Received", "Target"]

_log = logging.getLogger(__name__)

_M = TypeVar("_M", bound=Message)

#: seconds that the source may look at what it has before it tells: at tens of thousands of connections on a busy
#: machine for minutes, and nothing stands still meanwhile
_LOOKS: Final = 600.0

#: seconds that the first captured segments may come after COMMIT; they follow it in the same write
FIRST_SEGMENTS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What came of it.

    pids       root processes: PID at the source to PID here
    addresses  that arrived
    """

    migration: str
    pids: dict[int, int]
    addresses: tuple[str, ...]


class Target:
    """One migration to here. Call :meth:`run`, once.

    incoming         builds the processes
    channel          the line; the caller closes it
    unit_hook        ``--unit-hook``: a program for this host; empty: none
    state_directory  where the journal goes; None: TCPMIG_STATE_DIR
    """

    def __init__(
        self, incoming: Incoming, channel: Channel, *, unit_hook: str = "", state_directory: Path | None = None
    ) -> None:
        self._incoming = incoming
        self._channel = channel
        self._state_directory = state_directory
        self._machine = TargetMachine()
        self._arrival: Arrival | None = None
        self._journal: Journal | None = None
        self._theirs: HostFacts | None = None
        self._cut = False
        self._drain: bytes | None = None
        self._forward: TargetForward | None = None
        self._hook = UnitHook(unit_hook, HookFacts(command="migrate", role="target")) if unit_hook else None

    def run(self) -> Received | None:
        """All steps; None if the source only wanted to know, or gave up before it sent anything. Raises the error that
        ended it: its ``outcome`` is REFUSED if nothing was built, FAILED if everything was undone, IN_DOUBT if
        something is held here."""
        with contextlib.ExitStack() as signals:
            try:
                self._greet()
                check = self._accept()
                if check is None:
                    return None
                if not self._receive_image():
                    return None
                self._hear(Commit)
                signals.enter_context(signals_held())
                arrived = self._take_over()
                self._afterwards(arrived)
                return Received(
                    migration=self._machine.migration,
                    pids=arrived.pids,
                    addresses=tuple(record.address for record in check.needs.addresses),
                )
            except BaseException as error:
                self._fail(error)
                if self._machine.state is TargetState.STUCK and not isinstance(error, TargetStuck):
                    raise TargetStuck(f"held after: {error}") from error
                if isinstance(error, TcpmigError) and self._journal is not None:
                    undone(error)
                raise
            finally:
                urgency.end()
                if self._arrival is not None:
                    self._arrival.close()
                self._incoming.close()

    # --- the steps

    def _greet(self) -> None:
        theirs = self._hear(Hello)
        self._theirs = theirs.host
        ours = Hello(
            lowest=LOWEST_VERSION,
            highest=HIGHEST_VERSION,
            host=replace(host_facts(), features=features()),
            program="tcpmig receive",
        )
        self._say(ours)
        # the machine has given up if they have none in common; this raises why
        agree(ours, theirs)
        if CHECK_FOLLOWS in theirs.host.features:
            self._incoming.expect()

    def _accept(self) -> Check | None:
        """Step 1; None if there was only a question to be answered. Raises the first refusal, after the source has been
        told all of them."""
        silence, self._channel.silence = self._channel.silence, max(self._channel.silence, _LOOKS)
        try:
            check = self._hear(Check, Ask, Fetch)
        except LinkLost:
            # it tells its user why: the path to here is no news of ours
            _log.info("the source ended before it asked for anything")
            return None
        finally:
            self._channel.silence = silence
        if isinstance(check, Ask):
            self._answer(check)
        if isinstance(check, Fetch):
            self._pass_on(check)
        if not isinstance(check, Check):
            return None
        needs = check.needs
        verdicts: list[Verdict] = [] if self._theirs is None else judge_host(needs, self._theirs, host_facts())
        verdicts += self._incoming.check(needs, check.options | device_texts(check.map_dev))
        self._arrival = arrival = Arrival(needs.addresses, map_dev=check.map_dev)
        verdicts += arrival.check(needs.macs)
        if needs.forward is not None:
            self._forward = TargetForward(needs.forward, check.migration)
            verdicts += self._forward.check()
        for first in refusals(verdicts):
            failure = Failure(code=first.code, message=first.text, object=first.subject, fix=first.fix)
            self._say(Refused(migration=check.migration, failure=failure, items=tuple(verdicts)))
            error = refused(remote_error(failure, TargetRefused, where=""))
            error.told = True
            raise error
        arrival.prepare(needs.peers)
        self._drain = drains.told(check.options)
        if self._hook is not None:
            self._hook.facts = replace(
                self._hook.facts,
                migration=check.migration,
                pids=tuple(tree.root for tree in needs.trees),
                addresses=tuple(record.address for record in needs.addresses),
                units=needs.units,
            )
        self._say(Verdicts(migration=check.migration, items=tuple(verdicts)))
        return check

    def _answer(self, ask: Ask) -> None:
        """`tcpmig recover` on the other host asks. Nothing was begun in this run."""
        # not before: recover imports both drivers
        from migrate.asking import answer

        self._say(answer(ask, self._say_alive, directory=self._state_directory))

    def _pass_on(self, fetch: Fetch) -> None:
        """This line is for pages: who brings them gets it."""
        there, sock = pages_there(fetch.migration)
        self._say(Fetched(migration=fetch.migration, there=there))
        if sock is not None:
            hand_over(sock, *self._channel.descriptors)

    def _say_alive(self) -> None:
        self._say(Keepalive())

    def _receive_image(self) -> bool:
        """Steps 4 to 7. False if the source gave up before it began."""
        prepare: Prepare | None = None
        while prepare is None:
            message = self._channel.receive()
            if isinstance(message, ImageFrame):
                self._open_journal()
                self._machine.receive_image()
                self._channel.take_image(self._incoming)
                hurry(self._channel, self._incoming.stopped)
                continue
            heard = self._machine.receive(_message(message))
            match heard:
                case Measure(number=number):
                    self._open_journal()
                    # at once: half of what passes until the answer arrives is the error of the measurement
                    self._say(Measured(number=number, clock_ns=monotonic_ns()))
                    hurry(self._channel, self._incoming.stands)
                case Probe():
                    self._say(Probed())
                case Abort(failure=failure):
                    if self._journal is None:
                        _log.info("the source gave up: %s", failure.message)
                        return False
                    raise _given_up(failure)
                case Prepare():
                    prepare = heard
        exported_ns = prepare.exported_ns
        comparison = self._incoming.rebuild(lambda: elapsed_since(exported_ns, monotonic_ns()))
        for found in comparison.differences:
            _log.warning("%s: %s was %s, reads back %s", found.connection, found.item, found.sent, found.found)
        self._say(Prepared(migration=self._machine.migration, comparison=comparison))
        return True

    def _open_journal(self) -> None:
        """It is no dry run: the first message that says so has come."""
        if self._journal is None:
            self._journal = Journal.open(Role.TARGET, self._machine.migration, directory=self._state_directory)
            if self._drain is not None:
                self._journal.note(drains.NOTE, self._drain)
            if self._hook is not None:
                self._journal.note("unit-hook", self._hook.note())
                self._hook.before_stop()
            if self._forward is not None:
                self._arrival = self._forward.prepare(self._journal.note, self._the_arrival)
            self._incoming.prepare(self._journal.note)

    def _take_over(self) -> Arrived:
        """Step 8, after COMMIT."""
        incoming, arrival, machine = self._incoming, self._the_arrival, self._machine
        migration, token = machine.migration, machine.token
        # First: so STARTED in the journal means that all of them stand.  Should we die in between they stay stopped,
        # and `recover` ends them.
        incoming.keep()
        self._the_journal.append(AddressesArrive(arrival=arrival.record), Step(step=StepKind.STARTED))
        self._tell(Started(migration=migration, token=token))
        if self._forward is not None:
            self._forward.take_over()
        arrival.add()
        machine.release()
        incoming.release()
        # not earlier: a segment that acknowledges what was not resent yet would be dropped with its data (TCP.md 8)
        with logged("announcing the addresses"):
            arrival.announce(time.monotonic())
        with logged("replaying captured segments"):
            # without them the peers send again
            incoming.replay(self._first_segments())
        hurry(self._channel, False)  # from here on it is the processes that are waited for
        arrived = incoming.run()
        self._tell(
            Running(
                migration=migration,
                token=token,
                released_ns=arrived.released_ns,
                pids=arrived.pids,
                lost=arrived.lost,
            )
        )
        with logged("journalling that they run"):
            self._the_journal.step(StepKind.RUNNING, pids=arrived.pids)
            incoming.forget()
        return arrived

    def _first_segments(self) -> tuple[bytes, ...]:
        """What the source captured before it sent COMMIT; whatever has come, if the line is cut or slow: the peers will
        send the rest again."""
        deadline = time.monotonic() + FIRST_SEGMENTS
        found: list[bytes] = []
        while (left := deadline - time.monotonic()) > 0:
            message = self._after_commit(left)
            if message is None:
                break
            if isinstance(message, Captured):
                found += message.segments
                if message.first:
                    break
        return tuple(found)

    def _after_commit(self, timeout: float) -> Message | None:
        """The next message within ``timeout`` seconds; None if there is none, or the line is cut: that stops nothing
        now."""
        try:
            message = self._channel.receive(timeout)
            if message is None:
                return None
            return self._machine.receive(_message(message))
        except TcpmigError as error:
            _log.warning("the line after COMMIT: %s", error)
            self._cut = True
            return None

    def _afterwards(self, arrived: Arrived) -> None:
        """They run. Announce again, deliver what came late, until the source is done; nothing here undoes the move."""
        arrival = self._the_arrival
        with logged("giving addresses their flags"):
            arrival.settle()
        if self._forward is not None:
            with logged("settling what is forwarded"):
                self._forward.settle()
        done = False
        deadline = time.monotonic() + self._channel.silence
        while time.monotonic() < deadline:
            wait: float | None = None
            with logged("announcing the addresses again"):
                wait = arrival.repeat(time.monotonic())
            if (done or self._cut) and wait is None:
                break
            if done or self._cut:
                time.sleep(wait or 0.0)
                continue
            message = self._after_commit(1.0 if wait is None else wait)
            if message is not None:
                # as long as a takeover hook runs there, more may come
                deadline = time.monotonic() + self._channel.silence
            if isinstance(message, Captured):
                with logged("delivering late segments"):
                    self._incoming.replay(message.segments)
            done = isinstance(message, Done)
        if self._hook is not None:
            # not earlier: late segments and announcements must not wait for it
            with logged("the unit hook"):
                self._hook.committed(tuple(arrived.pids.get(pid, 0) for pid in self._hook.facts.pids))
        with logged("closing the journal"):
            self._the_journal.finish(End.MOVED)

    # --- failing

    def _fail(self, error: BaseException) -> None:
        if self._machine.runs:
            self._stuck(error)
        else:
            self._undo(error)

    def _undo(self, error: BaseException) -> None:
        failures: list[Exception] = []
        steps = [self._incoming.discard]
        if self._forward is not None:
            steps.insert(0, self._forward.undo)
        if self._arrival is not None:
            steps.insert(0, self._arrival.remove)
        for step in steps:
            try:
                step()
            except Exception as failure:  # all is tried, whatever the first of them meets
                _log.error("while undoing: %s", failure)
                failures.append(failure)
        if failures:
            # the source must not take it that nothing is here
            self._stuck(failures[0])
            return
        if self._journal is not None:
            # should the disk refuse it: nothing runs here all the same, and the source may have them back
            with logged("closing the journal"):
                self._journal.append(Step(step=StepKind.ABORTED, detail=str(error)))
                self._journal.finish(End.ABORTED)
        if self._hook is not None:
            with logged("the unit hook"):
                self._hook.aborted()
        if self._machine.may_abort:
            self._tell(Abort(migration=self._machine.migration, failure=failure_of(error)))
            if isinstance(error, TcpmigError):
                error.told = not self._cut

    def _stuck(self, error: BaseException) -> None:
        _log.error("held: %s", error)
        with logged("holding"):
            self._incoming.hold()
        if self._journal is not None:
            self._journal.leave()
        machine = self._machine
        try:
            self._tell(Stuck(migration=machine.migration, token=machine.token, failure=failure_of(error)))
        except ProtocolError:
            # before COMMIT, or after RUNNING, there is no such word: the end of the line says what has to be said
            _log.debug("the source is not told")

    # --- messages

    def _say(self, message: Message) -> None:
        self._channel.send(self._machine.send(message))

    def _tell(self, message: Message) -> None:
        """Say it if the line is still there; that it was not heard changes nothing here."""
        self._machine.send(message)
        try:
            self._channel.send(message)
        except (LinkLost, LinkSilent) as error:
            _log.warning("%s was not heard: %s", type(message).__name__, error.message)
            self._cut = True

    def _hear(self, *kinds: type[_M]) -> _M:
        """The next message, which must be of one of these kinds; an Abort raises."""
        while True:
            message = self._machine.receive(_message(self._channel.receive()))
            if isinstance(message, kinds):
                return message
            if isinstance(message, Abort):
                raise _given_up(message.failure)
            if not isinstance(message, Keepalive):
                raise ProtocolError(f"{type(message).__name__} came instead of {kinds[0].__name__}")

    @property
    def _the_arrival(self) -> Arrival:
        if self._arrival is None:
            raise RuntimeError("nothing was accepted")
        return self._arrival

    @property
    def _the_journal(self) -> Journal:
        if self._journal is None:
            raise RuntimeError("nothing was received")
        return self._journal


def _given_up(failure: Failure) -> TcpmigError:
    """Why the source gave up: its user knows."""
    error = remote_error(failure, SourceAborted, where="source")
    error.told = True
    return error


def _message(found: object) -> Message:
    if not isinstance(found, Message):
        raise ProtocolError("bytes of the image came where a message was due")
    return found
