"""The chaperone as a process: what is made ready as root, the end of all other privileges, then service."""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import signal
from pathlib import Path

from tcpstate import codec, slotted
from tcpstate.chaperone.holding import Holding
from tcpstate.chaperone.journal import Journal, Note
from tcpstate.chaperone.messages import Message
from tcpstate.chaperone.policy import Host, Policy
from tcpstate.chaperone.privilege import drop, needed
from tcpstate.chaperone.server import Server, listen
from tcpstate.errors import NoSuchUser
from tcpstate.kernel.capability import names
from tcpstate.kernel.route import is_local
from tcpstate.record import ConnectionRecord
from tcpstate.rehearsal import rehearse

__all__ = ["serve"]

_log = logging.getLogger(__name__)


def serve(path: Path, policy: Policy, user: str | None = None) -> None:
    """Serve on the unix socket ``path`` until SIGTERM or SIGINT, in the calling process's network namespace.

    user  who the process becomes; None: who it is. It keeps the capabilities of :data:`privilege.NEEDED` in any case

    ChaperoneRuns, MissingCapability, NoSuchUser, OSError.
    """
    account = None
    if user is not None:
        try:
            account = pwd.getpwnam(user)
        except KeyError:
            raise NoSuchUser("there is no such user on this host", object=user) from None
    # a directory that was there may be anything, such as /tmp: it stays whose it is
    ours = not path.parent.exists()
    listener = listen(path)
    try:
        journal = Journal(path.parent / "frozen")
        if account is not None:
            for place in (*([path.parent] if ours else []), journal.directory, *journal.directory.iterdir()):
                os.chown(place, account.pw_uid, account.pw_gid, follow_symlinks=False)
        _make_ready()
        keep = needed(policy.low_ports)
        drop(keep, user)
        holding = Holding(journal)
        holding.open()
        server = Server(listener, policy, holding)
        before = {number: signal.signal(number, lambda *_: server.stop()) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            _log.info("the chaperone listens on %s, uid %d, with %s", path, os.getuid(), _named(keep))
            server.serve()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    finally:
        listener.close()
        # in a directory of somebody else it stays; the next chaperone finds that nobody answers, and replaces it
        with contextlib.suppress(PermissionError):
            path.unlink(missing_ok=True)


def _make_ready() -> None:
    """All that a first use would import, load or compile: later there may be no right to read it, and others wait."""
    rehearse()
    codec.prepare(Message, ConnectionRecord, Note)
    slotted.complete()
    is_local("127.0.0.1")
    Host.read()


def _named(capabilities: frozenset[int]) -> str:
    return names(sum(1 << number for number in capabilities))
