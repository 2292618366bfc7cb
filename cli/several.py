"""Several moves at once, each in a process of its own, with one result.

Each is a migration like any other: it has its own line to HOST, its own journal and log, and succeeds or fails for
itself.  They share the way to HOST and the processors, so no more than a few run at a time; of the others nothing is
stopped or built yet.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from checkpoint.files.policy import Policy
from cli.command import signals_interrupt, spoken
from cli.errors import Interrupted
from cli.fields import fields
from cli.session import Result, Session
from migrate.errors import MoveDied
from migrate.summary import SourceOptions
from tcpstate.errors import Outcome
from tcpstate.slotted import dataclass

__all__ = ["Move", "Moved", "all_of", "gathered", "worst"]

_log = logging.getLogger("cli")


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One migration that is to be made; the fields are the arguments of :func:`migrate.run.migrate`."""

    pids: tuple[int, ...]
    host: str
    rsh: str
    remote_command: str
    options: SourceOptions
    policy: Policy

    @property
    def name(self) -> str:
        """For messages."""
        return f"pid {' '.join(map(str, self.pids))}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What came of one.

    told  the fields of its summary, or of the error that ended it
    """

    pids: tuple[int, ...]
    outcome: Outcome
    told: Mapping[str, Any]


def all_of(moves: Sequence[Move], *, at_once: int, verbose: bool) -> list[Moved]:
    """Make them, ``at_once`` at a time, in their order; what came of each.

    Ctrl-C and SIGTERM end those that run as they end a single one, and the others do not begin.
    """
    # a fresh interpreter for each: nothing that one has open or cached is another's
    context = multiprocessing.get_context("spawn")
    left, found = list(enumerate(moves)), dict[int, Moved]()
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    try:
        while left or running:
            while left and len(running) < at_once:
                place, move = left.pop(0)
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_run, args=(there, move, verbose), name=move.name)
                process.start()
                there.close()
                running[here] = place, process
            ready = wait(list(running))
            for line in [line for line in running if line in ready]:
                place, ended = running.pop(line)
                found[place] = _ended(line, ended, moves[place])
    except KeyboardInterrupt:
        for _, other in running.values():
            # one that has heard it already is undoing, and ends as it would
            other.terminate()
        for line, (place, other) in running.items():
            found[place] = _ended(line, other, moves[place])
        told = Interrupted("ended before it had begun")
        for place, move in left:
            found[place] = Moved(pids=move.pids, outcome=told.outcome, told=told.as_dict())
    return [found[place] for place in sorted(found)]


def _ended(line: Connection, process: BaseProcess, move: Move) -> Moved:
    """What it said last; it has ended, or will in a moment."""
    with line:
        try:
            status, told = line.recv()
        except EOFError:
            error = MoveDied("it ended without a word", object=move.name)
            status, told = error.outcome, error.as_dict()
    process.join()
    return Moved(pids=move.pids, outcome=Outcome(status), told=told)


def _run(line: Connection, move: Move, verbose: bool) -> None:
    """In the process of one move."""
    from migrate.run import migrate

    session = Session(verbose=verbose, prefix=f"{move.name}: ")
    told: tuple[int, dict[str, Any]]
    with line, signals_interrupt(), spoken(session, "migrate"):
        try:
            summary = migrate(
                move.pids,
                move.host,
                rsh=move.rsh,
                remote_command=move.remote_command,
                options=move.options,
                policy=move.policy,
            )
            told = int(summary.status), fields(summary)
        except KeyboardInterrupt as stop:
            told = _failed(session, Interrupted(f"ended by {stop}" if stop.args else "ended by Ctrl-C"))
        except Exception as error:  # as in cli.command: whatever happens is told
            told = _failed(session, error)
        with suppress(BrokenPipeError):
            line.send(told)


def _failed(session: Session, error: BaseException) -> tuple[int, dict[str, Any]]:
    _log.debug("failed", exc_info=error)
    known = session.known(error)
    session.say(str(known))
    return int(known.outcome), known.as_dict()


def gathered(moved: Sequence[Moved], *, seconds: float) -> Result:
    """One result of them all."""
    done = [one for one in moved if one.outcome in (Outcome.DONE, Outcome.PARTIAL)]
    body = []
    for one in moved:
        name = f"pid {' '.join(map(str, one.pids))}"
        if one in done:
            told = f"{one.told['connections']} connections, stopped for {one.told['stop_ms']:.1f} ms"
            body.append(f"{name} moved: {told}")
            body += [f"{name}: lost: {lost.connection}: {lost.reason}" for lost in one.told["lost"]]
        else:
            body.append(f"{name}: {one.told['message']}")
    body.append(f"{len(done)} of {len(moved)} moved in {seconds:.1f} s")
    return Result(
        data={
            "moves": [{"pids": one.pids, "outcome": one.outcome.name.lower(), **_without(one.told)} for one in moved],
            "moved": len(done),
            "connections": sum(one.told["connections"] for one in done),
            "bytes_sent": sum(one.told["bytes_sent"] for one in done),
            "stop_ms": max((one.told["stop_ms"] for one in done), default=0.0),
            "total_ms": 1e3 * seconds,
        },
        body=body,
        outcome=worst([one.outcome for one in moved]),
    )


def _without(told: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in told.items() if key not in ("pids", "outcome")}


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    """The exit status of all together: in doubt if one is; refused if nothing was stopped for any."""
    if Outcome.IN_DOUBT in outcomes:
        return Outcome.IN_DOUBT
    if all(one is outcomes[0] for one in outcomes):
        return outcomes[0]
    if all(one in (Outcome.DONE, Outcome.PARTIAL) for one in outcomes):
        return Outcome.PARTIAL
    return Outcome.FAILED
