"""Hosts that were emptied (`tcpmig drain`): what came from which, and is still here.

A drain has an ID, which every migration of it tells the target, with the name of the host that is emptied; the target
keeps both in the journal of the migration.  So the way back needs neither host to remember anything else.
"""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from checkpoint.traces import alive
from migrate.errors import NothingDrained
from migrate.journal import End, JournalView, Role, journals
from migrate.traces import Traces
from tcpstate import codec
from tcpstate.slotted import dataclass

__all__ = ["NOTE", "Drain", "back", "here", "label", "new_id", "told"]

#: the option of the message Check, and the journal's note
NOTE: Final = "drain"
_ID = re.compile(r"[0-9a-f]{8}\Z")
#: a host's name as far as it is kept; RFC 1035 section 2.3.4
_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The note: which drain a migration belonged to."""

    drain: str
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """What came here by one drain and still runs here.

    drain  its ID
    host   the name of the host that was emptied
    wall   when the first of it came, seconds since the epoch
    roots  the roots of the trees, by PID here
    """

    drain: str
    host: str
    wall: float
    roots: tuple[int, ...]


def new_id() -> str:
    """An ID for a drain that begins."""
    return secrets.token_hex(4)


def label(drain: str) -> dict[str, str]:
    """The option that each migration of a drain of this host carries to the target."""
    return {NOTE: f"{drain} {socket.gethostname()}"}


def told(options: Mapping[str, str]) -> bytes | None:
    """The journal's note of what the source told; None if it told nothing, or nothing that a label can be."""
    drain, _, host = options.get(NOTE, "").partition(" ")
    if not _ID.match(drain) or not _NAME.match(host):
        return None
    return codec.pack(Origin(drain=drain, host=host))


def here(directory: Path | None = None) -> list[Drain]:
    """The drains of which something still runs here, the oldest first. JournalDamaged."""
    found: dict[str, Drain] = {}
    for view in journals(directory):
        notes = view.notes(NOTE) if view.opened.role is Role.TARGET and view.mine else []
        if not notes or view.closed is None or view.closed.end is not End.MOVED:
            continue
        origin = codec.unpack(Origin, notes[-1])
        first = found.get(origin.drain, Drain(drain=origin.drain, host=origin.host, wall=view.opened.wall, roots=()))
        roots = (*first.roots, *_living(view))
        found[origin.drain] = Drain(drain=first.drain, host=first.host, wall=first.wall, roots=tuple(sorted(roots)))
    return [drain for drain in found.values() if drain.roots]


def back(drain: str, directory: Path | None = None) -> Drain:
    """The drain of this ID. NothingDrained if nothing of it runs here, JournalDamaged."""
    for one in here(directory):
        if one.drain == drain:
            return one
    raise NothingDrained("nothing that came here by it runs here", object=drain)


def _living(view: JournalView) -> list[int]:
    """The roots that the migration brought, and that are still the same processes."""
    stubs = Traces.of(view).stubs
    if stubs is None:
        return []
    still = {one.pid for one in alive(stubs.processes)}
    return [pid for pid in stubs.roots.values() if pid in still]
