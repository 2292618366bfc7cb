"""The two state machines of a migration: messages in, verdicts on them out, no sockets, no clock.

Theory of operation
===================

Two programs decide together where N process trees and M addresses live.  The rule that everything here serves:

    **At no time may both hosts run the processes, and at no time may neither be responsible for them.**

The source is the coordinator.  Its sending of COMMIT is the decision; before it, the source may give up at any time by
itself and so may the target; after it the source is *in doubt* until it hears RUNNING (then the original is discarded)
or ABORT (then it is resumed).  In doubt it holds: the original stays stopped, the addresses stay away.

The target may give up by itself until it has begun to *release* (sockets leave repair, threads run), because until then
nothing of the processes has been seen by anybody: no packet sent, no instruction run.  It must have undone everything
before it says ABORT.  From the release on it can only go on: RUNNING, or STUCK if something broke
(also if the undoing did).
If the line is cut, a target that has not received COMMIT undoes everything; one that has goes on without the line, for
the source holds and will ask.

    source                                target
    HELLO               ----->
                        <-----            HELLO
    CHECK               ----->
                        <-----            VERDICTS | REFUSED
    MEASURE             ----->            any number of times, as long as the original runs or is stopped
                        <-----            MEASURED
    PROBE               ----->            any number of times before the image: how fast is the line?
                        <-----            PROBED
    image ...           ----->
    PREPARE             ----->
                        <-----            PREPARED            (everything stands, in repair)
    [journal, address away]
    COMMIT              ----->
    CAPTURED            ----->            [journal STARTED]
                        <-----            STARTED
                                          [address here, release]
                        <-----            RUNNING | STUCK     (ABORT: only before the release)
    CAPTURED ...        ----->
    DONE                ----->
                        any time before COMMIT, from either side: ABORT;   KEEPALIVE at all times

    ASK                 ----->            in place of CHECK: what became of an earlier migration?
                        <-----            TOLD
    FETCH               ----->            in place of CHECK: this line is for pages that were left for later
                        <-----            FETCHED             (migrate/pageline.py goes on)

ABORT may cross COMMIT on the line: the target gave up while it waited.  So a source in doubt accepts ABORT, and a
target that aborted ignores COMMIT and whatever else is still on its way.  RUNNING, STARTED and STUCK carry the token of
COMMIT: nothing that was sent before COMMIT was read can pass for them.

The machines are told of every message *before* it is sent and *when* it is received, and refuse what the tables below
do not have (ProtocolError); the drivers (:mod:`migrate.source`, :mod:`migrate.target`) do the work in between and ask
the properties whether they may.  After a ProtocolError a machine is where a lost line would have put it.
"""

from __future__ import annotations

import enum
import hmac
from typing import TypeVar

from migrate.errors import PreparedDiffers, ProtocolError, VersionMismatch
from migrate.messages import (
    Abort,
    Ask,
    Captured,
    Check,
    Commit,
    Done,
    Fetch,
    Fetched,
    Hello,
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
    Told,
    Verdicts,
)

__all__ = ["Image", "SourceMachine", "SourceState", "TargetMachine", "TargetState", "agree"]


class Image:
    """Stands in the tables for a frame of the image; the machines never see its bytes."""


class SourceState(enum.Enum):
    """Where the source is."""

    START = "start"
    GREETED = "greeted"  # our Hello is out
    AGREED = "agreed"  # theirs is in
    CHECKING = "checking"
    CHECKED = "checked"  # the target can take it
    SENDING = "sending"
    PREPARING = "preparing"  # the image is complete
    PREPARED = "prepared"
    IN_DOUBT = "in-doubt"  # COMMIT is out
    STUCK = "stuck"  # the target holds them and cannot go on: in doubt as well, and a person has to look
    MOVED = "moved"  # they run there
    DONE = "done"
    REFUSED = "refused"
    ABORTED = "aborted"  # they run here
    ASKING = "asking"  # what became of an earlier migration
    ANSWERED = "answered"


class TargetState(enum.Enum):
    """Where the target is."""

    START = "start"
    GREETED = "greeted"  # their Hello is in
    AGREED = "agreed"  # ours is out
    CHECKING = "checking"
    READY = "ready"  # we said that we can take it
    RECEIVING = "receiving"
    PREPARING = "preparing"  # the image is complete
    PREPARED = "prepared"
    COMMITTED = "committed"  # COMMIT is in
    STARTED = "started"  # and in the journal
    RELEASING = "releasing"  # no way back
    RUNNING = "running"
    DONE = "done"
    REFUSED = "refused"
    ABORTED = "aborted"
    STUCK = "stuck"
    ASKED = "asked"  # what became of an earlier migration
    ANSWERED = "answered"


_What = type[Message] | type[Image]
_S, _T = SourceState, TargetState

_SOURCE_SENDS: dict[tuple[SourceState, _What], SourceState] = {
    (_S.START, Hello): _S.GREETED,
    (_S.AGREED, Check): _S.CHECKING,
    (_S.AGREED, Ask): _S.ASKING,
    (_S.AGREED, Fetch): _S.ASKING,
    (_S.CHECKED, Measure): _S.CHECKED,
    (_S.CHECKED, Probe): _S.CHECKED,
    (_S.CHECKED, Image): _S.SENDING,
    (_S.SENDING, Measure): _S.SENDING,
    (_S.SENDING, Image): _S.SENDING,
    (_S.SENDING, Prepare): _S.PREPARING,
    (_S.PREPARED, Commit): _S.IN_DOUBT,
    (_S.IN_DOUBT, Captured): _S.IN_DOUBT,
    (_S.MOVED, Captured): _S.MOVED,
    (_S.MOVED, Done): _S.DONE,
    **{(state, Abort): _S.ABORTED for state in (_S.CHECKING, _S.CHECKED, _S.SENDING, _S.PREPARING, _S.PREPARED)},
}

_SOURCE_RECEIVES: dict[tuple[SourceState, _What], SourceState] = {
    (_S.GREETED, Hello): _S.AGREED,
    (_S.CHECKING, Verdicts): _S.CHECKED,
    (_S.ASKING, Told): _S.ANSWERED,
    (_S.ASKING, Fetched): _S.ANSWERED,
    (_S.CHECKING, Refused): _S.REFUSED,
    (_S.CHECKED, Measured): _S.CHECKED,
    (_S.CHECKED, Probed): _S.CHECKED,
    (_S.SENDING, Measured): _S.SENDING,
    (_S.PREPARING, Measured): _S.PREPARING,
    (_S.PREPARING, Prepared): _S.PREPARED,
    (_S.IN_DOUBT, Started): _S.IN_DOUBT,
    (_S.IN_DOUBT, Running): _S.MOVED,
    (_S.IN_DOUBT, Stuck): _S.STUCK,
    **{
        (state, Abort): _S.ABORTED
        for state in (_S.CHECKING, _S.CHECKED, _S.SENDING, _S.PREPARING, _S.PREPARED, _S.IN_DOUBT)
    },
}

_TARGET_SENDS: dict[tuple[TargetState, _What], TargetState] = {
    (_T.GREETED, Hello): _T.AGREED,
    (_T.CHECKING, Verdicts): _T.READY,
    (_T.ASKED, Told): _T.ANSWERED,
    (_T.ASKED, Fetched): _T.ANSWERED,
    (_T.CHECKING, Refused): _T.REFUSED,
    (_T.READY, Measured): _T.READY,
    (_T.READY, Probed): _T.READY,
    (_T.RECEIVING, Measured): _T.RECEIVING,
    (_T.PREPARING, Prepared): _T.PREPARED,
    (_T.COMMITTED, Started): _T.STARTED,
    (_T.RELEASING, Running): _T.RUNNING,
    # what was begun could not be undone, or not be finished
    **{(state, Stuck): _T.STUCK for state in (_T.COMMITTED, _T.STARTED, _T.RELEASING)},
    **{
        (state, Abort): _T.ABORTED
        for state in (
            _T.CHECKING,
            _T.READY,
            _T.RECEIVING,
            _T.PREPARING,
            _T.PREPARED,
            _T.COMMITTED,
            _T.STARTED,
        )
    },
}

_TARGET_RECEIVES: dict[tuple[TargetState, _What], TargetState] = {
    (_T.START, Hello): _T.GREETED,
    (_T.AGREED, Check): _T.CHECKING,
    (_T.AGREED, Ask): _T.ASKED,
    (_T.AGREED, Fetch): _T.ASKED,
    (_T.READY, Measure): _T.READY,
    (_T.READY, Probe): _T.READY,
    (_T.READY, Image): _T.RECEIVING,
    (_T.RECEIVING, Measure): _T.RECEIVING,
    (_T.RECEIVING, Image): _T.RECEIVING,
    (_T.RECEIVING, Prepare): _T.PREPARING,
    (_T.PREPARED, Commit): _T.COMMITTED,
    **{(state, Captured): state for state in (_T.COMMITTED, _T.STARTED, _T.RELEASING, _T.RUNNING, _T.STUCK)},
    (_T.RUNNING, Done): _T.DONE,
    **{
        (state, Abort): _T.ABORTED
        for state in (_T.AGREED, _T.CHECKING, _T.READY, _T.RECEIVING, _T.PREPARING, _T.PREPARED)
    },
}

#: states of the source in which the original may run, or be resumed
_SOURCE_HAS_IT = frozenset(_S) - {_S.IN_DOUBT, _S.STUCK, _S.MOVED, _S.DONE}
#: states of the target in which there is nothing to be undone any more, whatever arrives
_TARGET_OVER = frozenset({_T.ABORTED, _T.REFUSED, _T.ANSWERED})
#: states of the target that a lost line ends
_TARGET_DEPENDS = frozenset(
    {_T.START, _T.GREETED, _T.AGREED, _T.ASKED, _T.CHECKING, _T.READY, _T.RECEIVING, _T.PREPARING, _T.PREPARED}
)

_State = TypeVar("_State", SourceState, TargetState)


def agree(ours: Hello, theirs: Hello) -> int:
    """The version that both speak: the highest. VersionMismatch if there is none."""
    version = min(ours.highest, theirs.highest)
    if version < max(ours.lowest, theirs.lowest):
        raise VersionMismatch(
            f"this program speaks versions {ours.lowest} to {ours.highest} of the protocol, "
            f"the other side {theirs.lowest} to {theirs.highest}"
        )
    return version


def _step(table: dict[tuple[_State, _What], _State], state: _State, what: _What, verb: str) -> _State:
    try:
        return table[state, what]
    except KeyError:
        raise ProtocolError(f"{what.__name__} cannot be {verb} in the state {state.value}") from None


class SourceMachine:
    """The source's side. ``migration`` and ``token`` are random, made by the caller."""

    def __init__(self, migration: str, token: bytes) -> None:
        self.migration = migration
        self.token = token
        self.state = SourceState.START
        self.version = 0
        self.target_started = False
        self._hello: Hello | None = None
        self._asked = -1
        self._clean = False

    @property
    def may_resume(self) -> bool:
        """Whether the original may run here."""
        return self.state in _SOURCE_HAS_IT

    @property
    def in_doubt(self) -> bool:
        """Whether nobody here knows where the processes are: everything is held."""
        return self.state in (SourceState.IN_DOUBT, SourceState.STUCK)

    @property
    def may_discard(self) -> bool:
        """Whether the original must go: it runs there."""
        return self.state in (SourceState.MOVED, SourceState.DONE)

    @property
    def may_abort(self) -> bool:
        """Whether Abort can be sent: the target listens, and COMMIT is not out."""
        return (self.state, Abort) in _SOURCE_SENDS

    def send(self, message: Message) -> Message:
        """The message may be sent, and counts as sent from now on. ProtocolError if it may not;
        PreparedDiffers for a Commit although the target's connections differ."""
        if isinstance(message, Keepalive):
            return message
        following = _step(_SOURCE_SENDS, self.state, type(message), "sent")
        if isinstance(message, Commit):
            if not self._clean:
                raise PreparedDiffers("the target's connections differ from what was sent")
            if message.token != self.token:
                raise ProtocolError("Commit has another token than the migration")
        if isinstance(message, Hello):
            self._hello = message
        if isinstance(message, Measure):
            self._asked = message.number
        self.state = following
        return message

    def send_image(self) -> None:
        """A frame of the image may be sent. ProtocolError if not."""
        self.state = _step(_SOURCE_SENDS, self.state, Image, "sent")

    def receive(self, message: Message) -> Message:
        """Take the message in. ProtocolError if it is not legal now (the state is then as after :meth:`lost`);
        VersionMismatch."""
        if isinstance(message, Keepalive):
            return message
        try:
            following = _step(_SOURCE_RECEIVES, self.state, type(message), "received")
            self._examine(message)
        except (ProtocolError, VersionMismatch):
            self.lost()
            raise
        self.state = following
        return message

    def _examine(self, message: Message) -> None:
        if isinstance(message, Hello):
            if self._hello is None:
                raise ProtocolError("Hello was answered before it was sent")
            self.version = agree(self._hello, message)
        elif isinstance(message, Measured):
            if message.number > self._asked:
                raise ProtocolError(f"Measured answers question {message.number}, which was not asked")
        elif isinstance(message, Verdicts | Refused | Prepared | Started | Running | Stuck | Abort | Told | Fetched):
            if message.migration != self.migration:
                raise ProtocolError(f"{type(message).__name__} belongs to another migration")
            if isinstance(message, Started | Running | Stuck):
                if not hmac.compare_digest(message.token, self.token):
                    raise ProtocolError(f"{type(message).__name__} does not know the token of the commit")
                self.target_started = True
            if isinstance(message, Prepared):
                self._clean = not message.comparison.differences

    def lost(self) -> None:
        """The line is cut. Before COMMIT that undoes the migration; after it, nothing changes: in doubt."""
        if self.state in _SOURCE_HAS_IT and self.state is not SourceState.REFUSED:
            self.state = SourceState.ABORTED


class TargetMachine:
    """The target's side."""

    def __init__(self) -> None:
        self.state = TargetState.START
        self.version = 0
        self.migration = ""
        self.token = b""
        self._theirs: Hello | None = None

    @property
    def may_start(self) -> bool:
        """Whether STARTED may be journalled: COMMIT is here."""
        return self.state is TargetState.COMMITTED

    @property
    def may_abort(self) -> bool:
        """Whether the processes can still be given back by saying Abort."""
        return (self.state, Abort) in _TARGET_SENDS

    @property
    def must_undo(self) -> bool:
        """Whether nothing may stay on this host."""
        return self.state in _TARGET_OVER

    @property
    def runs(self) -> bool:
        """Whether the processes run here, or may have begun to."""
        return self.state in (TargetState.RELEASING, TargetState.RUNNING, TargetState.DONE, TargetState.STUCK)

    def send(self, message: Message) -> Message:
        """The message may be sent, and counts as sent from now on. ProtocolError if it may not."""
        if isinstance(message, Keepalive):
            return message
        following = _step(_TARGET_SENDS, self.state, type(message), "sent")
        if isinstance(message, Hello):
            if self._theirs is None:
                raise ProtocolError("Hello is the answer to a Hello")
            # sent in any case: only so does the other side learn that, and why, it does not fit
            self.state = following
            try:
                self.version = agree(message, self._theirs)
            except VersionMismatch:
                self.state = TargetState.ABORTED
            return message
        if isinstance(message, Started | Running | Stuck) and message.token != self.token:
            raise ProtocolError(f"{type(message).__name__} has another token than the commit")
        self.state = following
        return message

    def receive(self, message: Message) -> Message | None:
        """Take the message in; None for one that is to be ignored, because we have given up already.

        ProtocolError if it is not legal now: the state is then as after :meth:`lost`.
        """
        if isinstance(message, Keepalive):
            return message
        if self.state in _TARGET_OVER:
            return None
        try:
            following = _step(_TARGET_RECEIVES, self.state, type(message), "received")
            self._examine(message)
        except ProtocolError:
            self.lost()
            raise
        self.state = following
        return message

    def _examine(self, message: Message) -> None:
        if isinstance(message, Hello):
            self._theirs = message
        elif isinstance(message, Check | Ask | Fetch):
            if not message.migration:
                raise ProtocolError("the migration has no name")
            self.migration = message.migration
        elif isinstance(message, Prepare | Commit | Abort | Done) and message.migration != self.migration:
            raise ProtocolError(f"{type(message).__name__} belongs to another migration")
        if isinstance(message, Commit):
            self.token = message.token

    def receive_image(self) -> bool:
        """A frame of the image arrived; False if it is to be ignored. ProtocolError if it is not legal now."""
        if self.state in _TARGET_OVER:
            return False
        try:
            self.state = _step(_TARGET_RECEIVES, self.state, Image, "received")
        except ProtocolError:
            self.lost()
            raise
        return True

    def release(self) -> None:
        """From here on there is no way back. ProtocolError unless STARTED was said."""
        if self.state is not TargetState.STARTED:
            raise ProtocolError(f"the release cannot begin in the state {self.state.value}")
        self.state = TargetState.RELEASING

    def lost(self) -> None:
        """The line is cut. Before COMMIT was received everything is undone; after it, the target goes on alone."""
        if self.state in _TARGET_DEPENDS:
            self.state = TargetState.ABORTED
