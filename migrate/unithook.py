"""``--unit-hook CMD``: a program of the user's, called when processes leave a host or have come, to deal with whatever
supervises them there.

It is called at three points, on the source (`migrate`, `checkpoint`) and, where `tcpmig receive` was given one, on the
target as well:

    before-stop   all checks have passed, nothing is stopped yet.  If it fails, the move ends here, undone
    committed     source: the original is gone; target: the processes run.  That it fails is told, and changes nothing
    aborted       after before-stop, if the move came to nothing

In doubt (exit status 5) neither of the last two is called: `tcpmig recover` knows which one it is.

What it is told stands in its environment and, as one JSON object, on its standard input; its output goes to the log.
It has :data:`LIMIT` seconds.
"""

from __future__ import annotations

import enum
import json
from dataclasses import asdict, replace

from migrate.errors import UnitHookFailed, UnitHookSyntax
from migrate.hookrun import HookCall, words_of
from tcpstate import codec
from tcpstate.slotted import dataclass

__all__ = ["LIMIT", "HookFacts", "HookNote", "HookPoint", "HookUnit", "UnitHook"]

#: seconds that a hook may take; less than the other side's patience (:data:`migrate.wire.SILENCE`)
LIMIT = 30.0


class HookPoint(enum.Enum):
    """When it is called."""

    BEFORE_STOP = "before-stop"
    COMMITTED = "committed"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True, kw_only=True)
class HookUnit:
    """A systemd service that processes of the tree are in, at the source.

    name     ``nginx.service``
    user     number of the user whose manager has it; None: the system's
    restart  its Restart=; empty: not known
    main     whether its main process is one of the tree
    pids     the processes, by their number at the source
    """

    name: str
    user: int | None = None
    restart: str = ""
    main: bool = False
    pids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HookFacts:
    """What a hook is told. The names are those of its JSON object.

    command      ``migrate`` or ``checkpoint``
    role         ``source`` or ``target``
    migration    the ID of the migration, empty for a checkpoint
    host         the other host, as far as it is known; the image file of a checkpoint
    pids         root processes, by their number at the source
    target_pids  the same, by their number at the target, in the same order; known once they run there
    addresses    that move
    units        services at the source
    """

    command: str
    role: str
    migration: str = ""
    host: str = ""
    pids: tuple[int, ...] = ()
    target_pids: tuple[int, ...] = ()
    addresses: tuple[str, ...] = ()
    units: tuple[HookUnit, ...] = ()

    def environment(self, point: enum.Enum) -> dict[str, str]:
        """The variables for shell scripts; lists are separated by blanks."""
        return {
            "TCPMIG_HOOK": point.value,
            "TCPMIG_COMMAND": self.command,
            "TCPMIG_ROLE": self.role,
            "TCPMIG_MIGRATION": self.migration,
            "TCPMIG_HOST": self.host,
            "TCPMIG_PIDS": " ".join(map(str, self.pids)),
            "TCPMIG_TARGET_PIDS": " ".join(map(str, self.target_pids)),
            "TCPMIG_ADDRESSES": " ".join(self.addresses),
            "TCPMIG_UNITS": " ".join(unit.name for unit in self.units),
        }

    def document(self, point: enum.Enum) -> bytes:
        """The JSON object for its standard input."""
        return json.dumps({"hook": point.value, **asdict(self)}).encode() + b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class HookNote:
    """What a journal keeps of a hook (note ``unit-hook``), so that `recover` can call it."""

    command: str
    facts: HookFacts


class UnitHook:
    """One hook on one host, through one move. UnitHookSyntax if the command cannot be split or is empty.

    command  split as a shell would; no shell runs it
    """

    def __init__(self, command: str, facts: HookFacts, *, limit: float = LIMIT) -> None:
        try:
            self._words = words_of(command, "--unit-hook")
        except ValueError as error:
            raise UnitHookSyntax(str(error), object=command) from error
        self.command = command
        self.facts = facts
        self._limit = limit
        self._pending = False

    @classmethod
    def noted(cls, data: bytes) -> UnitHook:
        """The hook of a journal's note: :meth:`before_stop` may have been called. UnitHookSyntax, BadRecord."""
        note = codec.unpack(HookNote, data)
        hook = cls(note.command, note.facts)
        hook._pending = True
        return hook

    def note(self, facts: HookFacts | None = None) -> bytes:
        """The journal's note ``unit-hook``, to be written before :meth:`before_stop` is called with the same facts."""
        return codec.pack(HookNote(command=self.command, facts=facts or self.facts))

    def before_stop(self, facts: HookFacts | None = None) -> None:
        """The move may still be refused. ``facts``: in place of those that were known first. UnitHookFailed."""
        self.facts = self.facts if facts is None else facts
        # first: a hook that failed half-way has something to undo
        self._pending = True
        self._run(HookPoint.BEFORE_STOP)

    def committed(self, target_pids: tuple[int, ...] = ()) -> None:
        """The move is done; nothing if :meth:`before_stop` was not called. UnitHookFailed."""
        self.facts = replace(self.facts, target_pids=target_pids)
        self._end(HookPoint.COMMITTED)

    def aborted(self) -> None:
        """All is undone; nothing if :meth:`before_stop` was not called, or the move is over. UnitHookFailed."""
        self._end(HookPoint.ABORTED)

    def _end(self, point: HookPoint) -> None:
        if self._pending:
            self._pending = False
            self._run(point)

    def _run(self, point: HookPoint) -> None:
        environment, told = self.facts.environment(point), self.facts.document(point)
        failure = HookCall("unit hook", point, self._words, environment, told, self._limit).failure()
        if failure:
            raise UnitHookFailed(failure, object=self.command)
