"""What has become of a migration: the question over its own channel, and the answer at the target.

The journal of the source keeps how the target was reached.  The target looks into its own journal; asked to settle, it
does what `tcpmig recover` would do there: what it has started goes on, what it has not is undone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from migrate.driving import failure_of
from migrate.errors import JournalInUse, LinkLost, ProtocolError
from migrate.hostfacts import host_facts
from migrate.journal import End, Journal, JournalView, Place, Role, StepKind, find_journal, read_journal
from migrate.messages import (
    HIGHEST_VERSION,
    LOWEST_VERSION,
    TOKEN_SIZE,
    Ask,
    Hello,
    Keepalive,
    Message,
    Standing,
    Told,
)
from migrate.protocol import SourceMachine
from migrate.settle import end_rebuilt, finish_rebuilt
from migrate.transport import DEFAULT_REMOTE_COMMAND, DEFAULT_RSH, Remote
from migrate.whereabouts import in_its_network
from tcpstate.errors import TcpmigError

__all__ = ["Answer", "answer", "ask"]

_log = logging.getLogger(__name__)

#: seconds that a program which is still at work gets to end
BUSY_WAIT = 10.0
_PAUSE = 0.1


class Answer:
    """What the target said.

    told       its word
    same_host  it is the host, in the boot and the namespaces, that the migration went to
    """

    def __init__(self, told: Told, same_host: bool) -> None:
        self.told = told
        self.same_host = same_host


def ask(view: JournalView, *, settle: bool) -> Answer:
    """Ask the target of a migration whose source's journal this is. RemoteStartFailed, LinkLost, LinkSilent, NotTcpmig,
    VersionMismatch, ProtocolError."""
    opened = view.opened
    machine = SourceMachine(opened.migration, bytes(TOKEN_SIZE))
    remote_command = opened.remote_command or DEFAULT_REMOTE_COMMAND
    with Remote(opened.host, rsh=opened.rsh or DEFAULT_RSH, remote_command=remote_command) as remote:
        try:
            ours = Hello(lowest=LOWEST_VERSION, highest=HIGHEST_VERSION, host=host_facts(), program="tcpmig recover")
            try:
                remote.channel.send(machine.send(ours))
            except LinkLost as error:
                # the remote shell has ended already: the next line tells why
                _log.debug("%s", error)
            theirs = machine.receive(remote.first())
            remote.channel.send(machine.send(Ask(migration=opened.migration, settle=settle)))
            while True:
                message = remote.channel.receive()
                if not isinstance(message, Message):
                    raise ProtocolError("bytes of an image came where a message was due")
                heard = machine.receive(message)
                if isinstance(heard, Told) and isinstance(theirs, Hello):
                    return Answer(heard, opened.there is None or Place.of(theirs.host) == opened.there)
                if not isinstance(heard, Keepalive):
                    raise ProtocolError(f"{type(heard).__name__} is no answer")
        except TcpmigError as error:
            raise remote.explain(error) from None


def answer(question: Ask, still_at_it: Callable[[], None], *, directory: Path | None = None) -> Told:
    """The target's answer. ``still_at_it`` is called now and then while the program that takes the processes in still
    works, or the settling takes its time."""
    view = find_journal(question.migration, Role.TARGET, directory)
    deadline = time.monotonic() + BUSY_WAIT
    while view is not None and view.alive and time.monotonic() < deadline:
        still_at_it()
        time.sleep(_PAUSE)
        view = read_journal(view.path)
    if view is None:
        return Told(migration=question.migration, standing=Standing.UNKNOWN)
    with in_its_network(view) as view:
        standing = stands(view)
        to_do = view.closed is None and view.mine and standing in (Standing.HELD, Standing.ABORTED)
        return _settled(view) if question.settle and to_do else _told(view, standing)


def stands(view: JournalView) -> Standing:
    """What a target's journal says."""
    if view.closed is not None:
        return Standing.RUNS if view.closed.end is End.MOVED else Standing.ABORTED
    if view.alive:
        return Standing.BUSY
    if not view.reached(StepKind.STARTED):
        # on disk before it is acted upon: so nothing of it ever ran, in this boot or an earlier one
        return Standing.ABORTED
    if view.mine:
        return Standing.HELD
    # of another boot, or of a container that is gone; or we are in the wrong one
    return Standing.LOST if view.opened.boot_id != host_facts().boot_id else Standing.UNKNOWN


def _told(view: JournalView, standing: Standing, failure: TcpmigError | None = None) -> Told:
    running = view.step(StepKind.RUNNING)
    return Told(
        migration=view.opened.migration,
        standing=standing,
        pids={} if running is None else running.pids or {},
        failure=None if failure is None else failure_of(failure),
    )


def _settled(view: JournalView) -> Told:
    """Settle it: what is STARTED goes on here, all else is undone; how it stands then."""
    journal = Journal.take(view)
    if journal is None:
        in_use = JournalInUse("another program is settling it", object=str(view.path))
        return _told(view, Standing.BUSY, in_use)
    try:
        view = read_journal(view.path)
        if view.closed is None:
            if view.reached(StepKind.STARTED):
                finish_rebuilt(view, journal)
            else:
                end_rebuilt(view, journal)
            view = read_journal(view.path)
        return _told(view, Standing.ABORTED if view.closed and view.closed.end is End.ABORTED else Standing.RUNS)
    except TcpmigError as error:
        _log.warning("%s", error)
        standing = Standing.HELD if view.reached(StepKind.STARTED) else Standing.ABORTED
        # what could not be cleared away does not run
        return _told(view, standing, error)
    finally:
        journal.leave()
