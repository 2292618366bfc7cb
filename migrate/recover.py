"""`tcpmig recover`: what a crash has left unsettled on this host is found in the journals, and finished or undone.

What is done follows from the last step that a journal has::

    role         last step     the processes are     what is done
    source       none          here                  undone: they run on here
                 COMMIT        in doubt              the target is asked: undone, or discarded
                 RUNNING       there                 the original is discarded
    target       none          there                 undone: nothing stays here
                 STARTED       here                  finished: they go on here
                 RUNNING       here                  what the tool left is taken away
    checkpoint   none          here                  undone: they run on here
                 COMMIT        in the image          finished: the originals end
    restore      none          in the image          undone: nothing stays here
                 STARTED       here                  finished: they go on here
    handover     none          in the image          left: the hold is as it was
                 COMMIT        on their way          finished: hold and addresses go

A journal whose program lives is left alone, and so is one of another boot, network or PID namespace.
"""

from __future__ import annotations

import contextlib
import enum
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from checkpoint.namespaces.spaces import at_home
from migrate.asking import ask
from migrate.errors import (
    JournalInUse,
    NothingToRecover,
    NotInDoubt,
    RecoverIncomplete,
    Unsettled,
)
from migrate.journal import Journal, JournalView, Role, StepKind, journals, read_journal
from migrate.messages import Standing
from migrate.settle import discard_original, end_rebuilt, finish_rebuilt, give_up_hold, resume_original
from migrate.traces import Traces
from migrate.whereabouts import in_its_network
from tcpstate.errors import Outcome, TcpmigError
from tcpstate.slotted import dataclass

__all__ = ["Assume", "Item", "Report", "State", "recover", "survey"]

_log = logging.getLogger(__name__)


class State(enum.Enum):
    """Where the processes of a journal are, as far as this host knows, and so what is to be done."""

    HERE = "here"  # they run on here, or are to: undo
    GONE = "gone"  # they run there, or are in the image: discard what is left here
    DOUBT = "in doubt"  # the other host knows
    ARRIVED = "arrived"  # they are this host's: finish
    NOT_ARRIVED = "not arrived"  # they never became this host's: undo
    BUSY = "busy"  # a program is at work
    FOREIGN = "not ours"  # another boot or namespace


class Assume(enum.Enum):
    """``--assume``: where the one copy that counts is, seen from this host."""

    HERE = "here"
    THERE = "there"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One journal that was not settled.

    since     when the program began, seconds since the epoch
    host      the other host, of a migration that left from here
    found     what may still be there, in words
    done      what was done about it, or would be; empty: nothing
    settled   nothing is left to be done
    error     why not
    """

    id: str
    role: Role
    state: State
    roots: tuple[int, ...]
    since: float
    host: str
    found: tuple[str, ...]
    done: str = ""
    settled: bool = False
    code: str = ""
    error: str = ""
    fix: str = ""
    outcome: Outcome = Outcome.DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found, and what became of it."""

    items: tuple[Item, ...]

    @property
    def status(self) -> Outcome:
        """The exit status: the worst of all. IN_DOUBT if somebody may be without a running copy."""
        outcomes = {item.outcome for item in self.items}
        return next((o for o in (Outcome.IN_DOUBT, Outcome.FAILED) if o in outcomes), Outcome.DONE)


#: what is done in each state, in words
_WORDS = {
    State.HERE: "undone: the processes run on here",
    State.GONE: "finished: the originals have ended",
    State.ARRIVED: "finished: the processes run here",
    State.NOT_ARRIVED: "undone: nothing of it is left here",
}


def state_of(view: JournalView) -> State:
    """What a journal that is not closed says."""
    if not view.mine:
        return State.FOREIGN
    if view.alive:
        return State.BUSY
    match view.opened.role:
        case Role.SOURCE:
            if view.reached(StepKind.RUNNING):
                return State.GONE
            return State.DOUBT if view.reached(StepKind.COMMIT) else State.HERE
        case Role.CHECKPOINT | Role.HANDOVER:
            return State.GONE if view.reached(StepKind.COMMIT) else State.HERE
        case Role.TARGET | Role.RESTORE:
            return State.ARRIVED if view.reached(StepKind.STARTED) else State.NOT_ARRIVED


def survey(directory: Path | None = None) -> list[JournalView]:
    """The journals that are not settled, oldest first."""
    return [view for view in journals(directory) if view.closed is None]


def recover(
    name: str = "", *, dry_run: bool = False, assume: Assume | None = None, directory: Path | None = None
) -> Report:
    """Find what is not settled, and settle it.

    name     only this one: an ID, or how it begins
    dry_run  only tell; the other host is asked, and does nothing
    assume   decide what is in doubt; only with ``name``

    NothingToRecover, NotInDoubt, JournalInUse. What could not be settled is in the report.
    """
    views = survey(directory)
    if name:
        views = [_named(views, name)]
    items = []
    for each in views:
        with in_its_network(each) as view:
            item = _item(view)
            if assume is not None:
                items.append(_assumed(view, item, assume))
            else:
                items.append(_foretell(view, item) if dry_run else _settle(view, item))
    return Report(items=tuple(items))


def _named(views: Sequence[JournalView], name: str) -> JournalView:
    found = [view for view in views if view.opened.migration.startswith(name)]
    if len(found) != 1:
        what = "several journals begin so" if found else "no journal of this name is unsettled"
        raise NothingToRecover(what, object=name)
    return found[0]


def _item(view: JournalView) -> Item:
    opened = view.opened
    state = state_of(view)
    # of another host's journal nothing here is meant
    found = [] if state is State.FOREIGN else Traces.of(view).found()
    return Item(
        id=opened.migration,
        role=opened.role,
        state=state,
        roots=opened.roots,
        since=opened.wall,
        host=opened.host,
        found=tuple(found),
    )


def _foretell(view: JournalView, item: Item) -> Item:
    if item.state is not State.DOUBT:
        return replace(item, done=_WORDS.get(item.state, ""))
    try:
        with at_home():
            standing = ask(view, settle=False).told.standing
    except TcpmigError as error:
        return _failed(item, Unsettled(f"{item.host} cannot be asked: {error.message}", object=item.id))
    return replace(item, done=f"{item.host} says: {standing.value}")


def _settle(view: JournalView, item: Item) -> Item:
    if item.state in (State.FOREIGN, State.BUSY):
        return item
    try:
        with _taken(view) as journal:
            view = read_journal(view.path)
            if view.closed is not None:
                return replace(item, settled=True, done="settled meanwhile")
            state = _decide(view, item, journal)
            return _acted(read_journal(view.path), item, state, journal)
    except JournalInUse:
        return replace(item, state=State.BUSY)
    except TcpmigError as error:
        return _failed(item, error)


def _assumed(view: JournalView, item: Item, assume: Assume) -> Item:
    """A person has decided."""
    if item.state is State.BUSY:
        raise JournalInUse("its program is at work", object=item.id)
    if item.state not in (State.DOUBT, State.ARRIVED):
        raise NotInDoubt(f"it is known where it is: {item.state.value}", object=item.id)
    if item.state is State.DOUBT:
        state = State.HERE if assume is Assume.HERE else State.GONE
    else:
        state = State.ARRIVED if assume is Assume.HERE else State.NOT_ARRIVED
    try:
        with _taken(view) as journal:
            return _acted(read_journal(view.path), item, state, journal)
    except TcpmigError as error:
        return _failed(item, error)


@contextlib.contextmanager
def _taken(view: JournalView) -> Iterator[Journal]:
    """The journal, ours to write on within the block. JournalInUse."""
    journal = Journal.take(view)
    if journal is None:
        raise JournalInUse("another program has it", object=str(view.path))
    try:
        yield journal
    finally:
        journal.leave()


def _decide(view: JournalView, item: Item, journal: Journal) -> State:
    """Where the processes are; the other host is asked if it must be. Unsettled."""
    # the lock on it is ours
    state = state_of(replace(view, alive=False))
    if state is not State.DOUBT:
        return state
    try:
        with at_home():
            answer = ask(view, settle=True)
    except TcpmigError as error:
        raise Unsettled(f"{item.host} cannot be asked: {error.message}", object=item.id) from error
    told = answer.told
    match told.standing:
        case Standing.ABORTED:
            return State.HERE
        case Standing.RUNS:
            journal.step(StepKind.RUNNING, pids=told.pids)
            return State.GONE
        case Standing.UNKNOWN:
            where = "" if answer.same_host else ", and is not in the boot or the namespaces that it was in then"
            raise Unsettled(f"{item.host} has no journal of it{where}", object=item.id)
        case Standing.LOST:
            raise Unsettled(f"{item.host} had started it and was booted since: nothing runs anywhere", object=item.id)
        case Standing.HELD | Standing.BUSY:
            why = "" if told.failure is None else f": {told.failure.message} [{told.failure.code}]"
            raise Unsettled(f"{item.host} has it and could not finish it{why}", object=item.id)


def _acted(view: JournalView, item: Item, state: State, journal: Journal) -> Item:
    if item.role is Role.HANDOVER:
        give_up_hold(view, journal)
        what = "finished: the hold is given up" if state is State.GONE else "nothing was changed: the hold is as it was"
        return replace(item, state=state, done=what, settled=True)
    match state:
        case State.HERE:
            resume_original(view, journal)
        case State.GONE:
            discard_original(view, journal)
        case State.ARRIVED:
            finish_rebuilt(view, journal)
        case State.NOT_ARRIVED:
            end_rebuilt(view, journal)
        case _:
            return item
    _log.info("%s %s: %s", item.role.value, item.id, _WORDS[state])
    return replace(item, state=state, done=_WORDS[state], settled=True)


def _failed(item: Item, error: TcpmigError) -> Item:
    # Of a journal whose steps were all tried it is known where the processes run.  Else nobody may run them.
    known = isinstance(error, RecoverIncomplete) or item.state in (State.GONE, State.NOT_ARRIVED)
    text = f"{error.message} ({error.object})" if error.object else error.message
    _log.warning("%s %s: %s", item.role.value, item.id, text)
    outcome = Outcome.FAILED if known else Outcome.IN_DOUBT
    return replace(item, code=error.code, error=text, fix=error.fix, outcome=outcome)
