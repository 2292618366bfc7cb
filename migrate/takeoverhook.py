"""``--takeover-hook CMD``: a program of the user's that moves the addresses where the network does not learn by itself
where they are: by the API of a cloud, a routing daemon, a load balancer.

It is called on the source, at three points:

    check  all checks have passed, nothing is stopped.  If it fails, the move ends here, undone
    take   the processes run on the target: the addresses are theirs from now on.  That it fails undoes nothing; it is
           called again by `tcpmig recover`
    undo   after check, if the move came to nothing

`take` comes after RUNNING and not together with COMMIT: until then the move can end on either host, and an API takes
so much longer than the takeover that the milliseconds in between do not count.  Until it has ended the source passes on
what still arrives for the connections there.

Why on the source: it has the exit status to report by and the journal that `recover` reads.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import replace

from migrate.errors import AddressNotTaken, TakeoverHookRefused, TakeoverHookSyntax
from migrate.hookrun import HookCall, words_of
from migrate.unithook import LIMIT, HookFacts
from tcpstate import codec
from tcpstate.slotted import dataclass

__all__ = ["NOTE", "TakeoverHook", "TakeoverNote", "TakeoverPoint"]

#: the journal's note
NOTE = "takeover-hook"
#: seconds between two looks at what arrives here while a hook runs
_LOOK = 0.02


class TakeoverPoint(enum.Enum):
    """When it is called."""

    CHECK = "check"
    TAKE = "take"
    UNDO = "undo"


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeoverNote:
    """What a journal keeps of the hook, so that `recover` can call it. ``limit``: seconds."""

    command: str
    facts: HookFacts
    limit: float


class TakeoverHook:
    """The hook through one move. TakeoverHookSyntax if the command cannot be split or is empty.

    limit  seconds that each call may take
    """

    def __init__(self, command: str, facts: HookFacts, *, limit: float = LIMIT) -> None:
        try:
            self._words = words_of(command, "--takeover-hook")
        except ValueError as error:
            raise TakeoverHookSyntax(str(error), object=command) from error
        self.command = command
        self.facts = facts
        self._limit = limit
        self._pending = False

    @classmethod
    def noted(cls, data: bytes) -> TakeoverHook:
        """The hook of a journal's note: :meth:`check` may have been called. TakeoverHookSyntax, BadRecord."""
        note = codec.unpack(TakeoverNote, data)
        hook = cls(note.command, note.facts, limit=note.limit)
        hook._pending = True
        return hook

    def note(self) -> bytes:
        """The journal's note, to be written before :meth:`check` is called."""
        return codec.pack(TakeoverNote(command=self.command, facts=self.facts, limit=self._limit))

    def check(self) -> None:
        """The move may still be refused. TakeoverHookRefused."""
        # first: a hook that failed half-way has something to undo
        self._pending = True
        failure = self._start(TakeoverPoint.CHECK).failure()
        if failure:
            raise TakeoverHookRefused(failure, object=self.command)

    def take(self, target_pids: tuple[int, ...], meanwhile: Callable[[], None] | None = None) -> None:
        """The processes run there; nothing if :meth:`check` was not called. AddressNotTaken.

        meanwhile  called over and over until the hook ends
        """
        if not self._pending:
            return
        self._pending = False
        self.facts = replace(self.facts, target_pids=target_pids)
        call = self._start(TakeoverPoint.TAKE)
        try:
            while meanwhile is not None and not call.over(_LOOK):
                meanwhile()
        finally:
            failure = call.failure()
        if failure:
            raise AddressNotTaken(failure, object=", ".join(self.facts.addresses))

    def undo(self) -> None:
        """All is undone; nothing if :meth:`check` was not called, or the move is over. TakeoverHookRefused."""
        if not self._pending:
            return
        self._pending = False
        failure = self._start(TakeoverPoint.UNDO).failure()
        if failure:
            raise TakeoverHookRefused(failure, object=self.command)

    def _start(self, point: TakeoverPoint) -> HookCall:
        environment, told = self.facts.environment(point), self.facts.document(point)
        return HookCall("takeover hook", point, self._words, environment, told, self._limit)
