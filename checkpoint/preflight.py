"""What is in a process tree, and whether each part of it can be moved: read from /proc, nothing is stopped or changed.

Every room judges its own (processes: ``refuse``; state: ``state.preflight``; mappings: ``memory.verdicts``; open files:
``files.verdicts``).  Here they are put together, with what only shows in the whole: connections whose two ends are on
this host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from checkpoint import procfs, refuse
from checkpoint.described import Sharing, task_of
from checkpoint.errors import LocalPeer, NoSuchProcess, Refused
from checkpoint.files import verdicts as files
from checkpoint.files.outside import holders_text
from checkpoint.files.peers import Place, place_of
from checkpoint.files.policy import NO_POLICY, LocalPeers, Policy
from checkpoint.files.table import FileTable
from checkpoint.ipc import table as ipc
from checkpoint.memory import segments
from checkpoint.memory import verdicts as memory
from checkpoint.namespaces import verdicts as namespaces
from checkpoint.namespaces.numbers import Numbers
from checkpoint.namespaces.spaces import Kind, entered, own_kinds
from checkpoint.state import preflight as state
from checkpoint.tree import plan
from checkpoint.verdict import Status, Verdict, refusals
from tcpstate import locate
from tcpstate.errors import NoSuchConnection, Outcome, TcpmigError, catalogue
from tcpstate.kernel.route import local_addresses
from tcpstate.locate import Located
from tcpstate.slotted import dataclass

__all__ = ["Peered", "check", "connections", "first_refusal", "live_files", "pids"]

_CONNECTION = "tcp connection"
_LOOKS = 3


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


def check(roots: Sequence[int], policy: Policy = NO_POLICY) -> list[Verdict]:
    """A verdict on every process, its state, descriptors, mappings and connections; the refusals have their codes.

    policy  what the user decided about files and connections that lead out of the trees

    A root that cannot be touched at all has one verdict: the refusal.
    """
    found: list[Verdict] = []
    for root in roots:
        found += refuse.verdicts(root)
    if refusals(found):
        return found
    with entered(roots[0]):
        return found + _check_members(roots, policy)


def _check_members(roots: Sequence[int], policy: Policy) -> list[Verdict]:
    """On trees that can be touched. In the namespaces of the first, if it has some: a tree that has moves alone."""
    found: list[Verdict] = []
    members = pids(roots)
    found += namespaces.verdicts(roots, members)
    for pid in members:
        try:
            judged = [*state.verdicts(pid, members=members), *memory.verdicts(pid)]
        except (NoSuchProcess, FileNotFoundError, ProcessLookupError):
            if procfs.lives(pid):
                raise
            continue
        # what was read of a descendant while it ended is not true of anything
        if procfs.lives(pid):
            found += judged
    found += _births(members)
    found += segments.verdicts(members)
    found += ipc.verdicts(members, whole=any(Kind.IPC in own_kinds(root) for root in roots))
    found += files.verdicts(members, policy)
    found += [_judge(one, policy) for one in connections(members)]
    return found


def _births(members: Sequence[int]) -> list[Verdict]:
    """Whether the processes can be grown again, with the sessions, groups, descriptors and directories that they have
    in common. They run: what is refused was so at each of several looks."""
    refused: TcpmigError | None = None
    for _ in range(_LOOKS):
        number = Numbers(members)
        sharing = Sharing()
        tasks = []
        for pid in members:
            with contextlib.suppress(NoSuchProcess):
                stat = procfs.read_stat(pid)
                tasks.append(task_of(stat, set(), sharing, stat.exit_code if stat.zombie else None))
        try:
            plan(map(number.task, tasks))
        except Refused as error:
            refused = error
        else:
            return []
    return [] if refused is None else [Verdict.refuse(refused, "process")]


@dataclass(frozen=True, slots=True)
class Peered:
    """A TCP connection of the trees, and where its other end is."""

    connection: Located
    place: Place

    @property
    def away(self) -> bool:
        """Whether its other end is on another host."""
        return self.place is Place.AWAY


def connections(members: Sequence[int]) -> list[Peered]:
    """The TCP connections of the processes."""
    local = local_addresses()
    listening = locate.listening_ports(members)
    ours = locate.connections(members)
    tree = {c.conn_id for c in ours}
    found = []
    for one in ours:
        place = place_of(one.conn_id, tree, local)
        if place is Place.QUEUED and one.conn_id.peer_port in listening:
            place = Place.TREE  # the application accepts it before it is stopped
        found.append(Peered(one, place))
    return found


def _judge(one: Peered, policy: Policy) -> Verdict:
    connection, place = one.connection, one.place
    subject = str(connection.conn_id)
    text = f"{connection.state.name}, {connection.receive_queue} bytes unread, {connection.send_queue} unacknowledged"
    match place:
        case Place.AWAY:
            return Verdict(subject=subject, kind=_CONNECTION, text=text)
        case Place.TREE:
            return Verdict(subject=subject, kind=_CONNECTION, text=f"{text}; both ends move")
        case Place.CLOSED:
            return Verdict(subject=subject, kind=_CONNECTION, text=f"{text}; its other end, on this host, has closed")
    holders = _holders(connection)
    if policy.local_peer is LocalPeers.REFUSE:
        error = LocalPeer(f"the other end is {place.value}{holders}", object=subject)
        return Verdict.refuse(error, _CONNECTION)
    happens = f"the moved end will see it {'closed' if policy.local_peer is LocalPeers.CLOSE else 'reset'}"
    text = f"the other end is {place.value}{holders}: {happens}"
    return Verdict(subject=subject, kind=_CONNECTION, status=Status.WARN, text=text)


def _holders(connection: Located) -> str:
    """Who has the other end, as far as /proc shows it."""
    with contextlib.suppress(NoSuchConnection):
        owners = locate.find(connection.conn_id.reversed()).owners
        if owners:
            return f" ({holders_text([(owner.pid, owner.fd) for owner in owners])})"
    return ""


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
