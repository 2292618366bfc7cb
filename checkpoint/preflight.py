"""What is in a process tree, and whether each part of it can be moved: read from /proc, nothing is stopped or changed.

Every room judges its own (processes: ``refuse``; state: ``state.preflight``; mappings: ``memory.verdicts``; open files:
``files.verdicts``).  Here they are put together, with what only shows in the whole: connections whose two ends are on
this host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint import procfs, refuse
from checkpoint.errors import LocalPeer, NoSuchProcess, Refused
from checkpoint.files import verdicts as files
from checkpoint.files.table import FileTable
from checkpoint.memory import verdicts as memory
from checkpoint.state import preflight as state
from checkpoint.verdict import Status, Verdict, refusals
from tcpstate import locate
from tcpstate.errors import Outcome, TcpmigError, catalogue
from tcpstate.locate import Located

__all__ = ["check", "connections", "first_refusal", "live_files", "pids"]

_CONNECTION = "tcp connection"


def pids(roots: Sequence[int]) -> list[int]:
    """The processes of the trees, parents before children, each once."""
    found: dict[int, None] = {}
    for root in roots:
        found.update(dict.fromkeys(procfs.tree(root)))
    return list(found)


@dataclass(frozen=True, slots=True)
class _Pid:
    pid: int


def live_files(members: Sequence[int]) -> FileTable:
    """The open files of running processes; those that end meanwhile are left out. The caller closes the table."""
    table = FileTable(live=True)
    try:
        for pid in members:
            # it ended, or is just ending
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                table.add_process(_Pid(pid))
    except BaseException:
        table.close()
        raise
    return table


def check(roots: Sequence[int]) -> list[Verdict]:
    """A verdict on every process, its state, descriptors, mappings and connections; the refusals have their codes.

    A root that cannot be touched at all has one verdict: the refusal.
    """
    found: list[Verdict] = []
    for root in roots:
        found += refuse.verdicts(root)
    if refusals(found):
        return found
    members = pids(roots)
    for pid in members:
        try:
            if procfs.read_stat(pid).zombie:
                continue
            found += state.verdicts(pid)
            found += memory.verdicts(pid)
        except NoSuchProcess:
            continue  # a descendant that has ended meanwhile
    found += files.verdicts(members)
    found += [_judge(connection, here) for connection, here in connections(members)]
    return found


def connections(members: Sequence[int]) -> list[tuple[Located, bool]]:
    """The TCP connections of the processes, each with whether its other end is a socket of this host as well."""
    everyone = {c.conn_id for c in locate.connections()}
    return [(c, c.conn_id.reversed() in everyone) for c in locate.connections(members)]


def _judge(connection: Located, peer_is_here: bool) -> Verdict:
    subject = str(connection.conn_id)
    if peer_is_here:
        return Verdict.refuse(LocalPeer("the other end of the connection is on this host", object=subject), _CONNECTION)
    queues = f"{connection.receive_queue} bytes unread, {connection.send_queue} unacknowledged"
    return Verdict(subject=subject, kind=_CONNECTION, status=Status.OK, text=f"{connection.state.name}, {queues}")


def first_refusal(found: Sequence[Verdict]) -> TcpmigError | None:
    """The first refusal as the error that it is, or None; how many more there are is said."""
    refused = refusals(found)
    if not refused:
        return None
    first = refused[0]
    more = f" (and {len(refused) - 1} more refusals)" if len(refused) > 1 else ""
    cls = catalogue().get(first.code, Refused)
    # past the subclass's own constructor, whose arguments are not known here
    error = cls.__new__(cls)
    TcpmigError.__init__(error, f"{first.text}{more}", object=first.subject, fix=first.fix or None)
    # met in the check it refuses, also where its class stands for a failure later on
    error.__dict__["outcome"] = Outcome.REFUSED
    return error
