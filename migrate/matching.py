"""Which process trees a pattern means, and which of them can only move together.

Trees that use the same address move in one go, as it can be on one host only; so do trees that have a connection to
each other.  All others are moved for themselves: what befalls one does not concern the rest.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

from checkpoint.errors import NoSuchProcess
from migrate.errors import NothingMatches
from migrate.takeover import select
from migrate.usage import users_of
from tcpstate.kernel import diag
from tcpstate.kernel.route import is_local
from tcpstate.kernel.tcp import TcpState
from tcpstate.locate import owners_of
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    import psutil  # at run time where it is used: it takes its time

__all__ = ["Root", "find", "groups", "serving", "together", "tree"]

_INIT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """A process tree that was found.

    pid      its root
    command  its command line
    members  the PIDs of all its processes
    """

    pid: int
    command: str
    members: tuple[int, ...]


def find(patterns: Sequence[re.Pattern[str]]) -> list[Root]:
    """The trees whose root's command line one of the patterns is found in, by PID.

    Of processes that match and descend from each other the eldest is the root. Left out are init, the kernel's threads,
    those of other PID namespaces, and ourselves with all that started us. NothingMatches.
    """
    roots = _eldest({pid: command for pid, command in _commands().items() if _matches(patterns, command)})
    if not roots:
        raise NothingMatches("no process has such a command line", object=" ".join(p.pattern for p in patterns))
    return roots


def serving(
    addresses: Collection[str], also: Sequence[re.Pattern[str]], keep: Sequence[re.Pattern[str]]
) -> tuple[list[Root], list[Root]]:
    """The trees that have a socket on one of ``addresses``, or whose root's command line one of ``also`` is found in;
    and those that only listen on every address, which does not tell whether they are this host's own. By PID.

    keep  what has such a command line stays, with all that is above and below it
    """
    commands = _commands()
    kept = {root.pid: root for root in _eldest({p: c for p, c in commands.items() if _matches(keep, c)})}
    spared = {pid for root in kept.values() for pid in root.members}
    left = {pid: command for pid, command in commands.items() if pid not in spared}
    here = {pid for user in users_of(addresses, ()) for pid in user.pids}
    roots = _eldest({pid: command for pid, command in left.items() if pid in here or _matches(also, command)})
    roots = [root for root in roots if spared.isdisjoint(root.members)]
    chosen = {pid for root in roots for pid in root.members}
    sockets = [sock for sock in diag.dump(1 << TcpState.LISTEN) if not _is_bound(sock.local)]
    anywhere = {owner.pid for owners in owners_of({s.inode for s in sockets}).values() for owner in owners}
    return roots, _eldest({pid: command for pid, command in left.items() if pid in anywhere - chosen})


def _is_bound(address: str) -> bool:
    """Whether it is an address, and not every one."""
    return not ipaddress.ip_address(address.partition("%")[0]).is_unspecified


def _matches(patterns: Sequence[re.Pattern[str]], command: str) -> bool:
    return any(pattern.search(command) for pattern in patterns)


def _commands() -> dict[int, str]:
    """The command lines of all processes that may be moved."""
    import psutil

    own = os.readlink("/proc/self/ns/pid")
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found: dict[int, str] = {}
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        pid, command = process.info["pid"], " ".join(process.info["cmdline"] or ())
        if pid == _INIT or pid in mine or not command or process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        if _namespace(pid) == own:
            found[pid] = command
    return found


def _eldest(found: Mapping[int, str]) -> list[Root]:
    """Of these processes those that none of the others is above, with all that is below them."""
    import psutil

    roots = []
    for pid in sorted(found):
        try:
            process = psutil.Process(pid)
            if not any(parent.pid in found for parent in process.parents()):
                roots.append(_root(process, found[pid]))
        except psutil.NoSuchProcess:
            continue  # it ended meanwhile
    return roots


def tree(pid: int) -> Root:
    """The tree that begins with this process. NoSuchProcess."""
    import psutil

    try:
        process = psutil.Process(pid)
        return _root(process, " ".join(process.cmdline()))
    except psutil.NoSuchProcess:
        raise NoSuchProcess("it has ended", object=f"pid {pid}") from None


def _root(process: psutil.Process, command: str) -> Root:
    members = (process.pid, *(child.pid for child in process.children(recursive=True)))
    return Root(pid=process.pid, command=command, members=members)


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""  # it ended, or is hidden from us: then it cannot be moved either


def together(roots: Sequence[Root], *, address: str) -> list[tuple[int, ...]]:
    """The roots that each move takes, by PID.

    address  ``--address``: with ``none`` no address moves, and none holds trees together
    """
    whose = {member: root.pid for root in roots for member in root.members}
    owners = owners_of(pids=whose)
    ties: dict[int, set[Hashable]] = {root.pid: set() for root in roots}
    # asked of the kernel: thousands of connections come from a few peers, and lead to fewer addresses
    near = functools.cache(is_local)
    leaving = functools.cache(lambda local: select("auto", [local]))
    for sock in diag.dump(diag.ALL_STATES):
        if sock.inode not in owners:
            continue
        common: set[Hashable] = set()
        if sock.state is not TcpState.LISTEN and near(sock.peer):
            common.add(frozenset([(sock.local, sock.local_port), (sock.peer, sock.peer_port)]))
        if address != "none":
            common.update(leaving(sock.local))
        for owner in owners[sock.inode]:
            ties[whose[owner.pid]] |= common
    return groups(ties)


def groups(ties: Mapping[int, Collection[Hashable]]) -> list[tuple[int, ...]]:
    """Trees that have a tie in common, or each with a third, are one group; by PID."""
    found: list[tuple[list[int], set[Hashable]]] = []
    for pid in sorted(ties):
        mine = set(ties[pid])
        same = [group for group in found if group[1] & mine]
        found = [group for group in found if group not in same]
        found.append(([n for pids, _ in same for n in pids] + [pid], mine.union(*(t for _, t in same))))
    return sorted(tuple(sorted(pids)) for pids, _ in found)
