"""How a process tree is grown again: which process forks which, in what order, so that sessions and groups come out.

Linux lets a process join a session only by being born into it, and a group only within its session.  A tree whose
sessions or groups have lost their leaders therefore needs *stand-ins*: processes that carry the leader's number, lead
while the members are born, and exit.  A number stays reserved as session or group ID as long as it has a member.

The plan is made from four numbers per process and run by :mod:`checkpoint.restore`; nothing here touches a process.

Rules used (kernel/fork.c, kernel/sys.c):

- a child inherits its parent's session and group as they are at the fork, so children in the session that a leader
  was born into are forked before its ``setsid``;
- ``CLONE_PARENT`` makes the child a sibling of its creator: how a stand-in bears members that are not its children;
- ``setsid`` fails for a group leader, ``setpgid`` for a session leader or across sessions;
- a table of descriptors, and directories, are shared with whoever one was born by, or with nobody; unshare(2) ends it.

Number 1 is the first process of a PID namespace of the tree's own.  A stand-in outside bears it, as its sibling, after
it has begun a session and unshared the namespace; so the tree is in a session of its own here, too.  0 stands for a
session or group that has no number in the namespace: the one that the stand-in began.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from checkpoint.errors import UnsupportedSession, UnsupportedSharing
from tcpstate.slotted import dataclass

__all__ = [
    "INIT",
    "Death",
    "End",
    "Fork",
    "OwnPids",
    "SetPgid",
    "SetSid",
    "Spawn",
    "Step",
    "TakeTerminal",
    "Task",
    "Unshare",
    "plan",
]


#: the number of the first process of a PID namespace
INIT: Final = 1
#: a session or group from outside of a PID namespace
_OUTSIDE: Final = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the plan needs to know of one process.

    ppid       its parent; one that is not in the tree makes the task a root
    wait_code  a zombie's status word, as wait(2) gives it; None for a living process
    terminal   of a session's leader: N of the /dev/pts/N that is its controlling terminal, if the tree has its master;
               -1: none
    files      PID of the process before it in the tree whose table of descriptors it shares; 0: it shares nobody's
    directories  the same of root, working directory and umask
    """

    pid: int
    ppid: int
    pgid: int
    sid: int
    wait_code: int | None = None
    terminal: int = -1
    files: int = 0
    directories: int = 0


@dataclass(frozen=True, slots=True)
class Spawn:
    """The tool itself starts ``pid``; a stand-in may come out with another number if its own is taken."""

    pid: int
    stand_in: bool = False


@dataclass(frozen=True, slots=True)
class Fork:
    """``creator`` forks ``pid``: its child, or (``sibling``) its parent's child; they share what is named."""

    creator: int
    pid: int
    sibling: bool = False
    stand_in: bool = False
    files: bool = False
    directories: bool = False


@dataclass(frozen=True, slots=True)
class Unshare:
    """``pid`` gets a copy of its own of what it shared, so that its descendants could."""

    pid: int
    files: bool = False
    directories: bool = False


@dataclass(frozen=True, slots=True)
class SetSid:
    """``pid`` becomes leader of a new session and group."""

    pid: int


@dataclass(frozen=True, slots=True)
class OwnPids:
    """What ``pid`` bears from now on is in a new PID namespace."""

    pid: int


@dataclass(frozen=True, slots=True)
class TakeTerminal:
    """``pid``, which leads a session, gets a controlling terminal; whom it bears from now on inherits it."""

    pid: int
    number: int


@dataclass(frozen=True, slots=True)
class SetPgid:
    """``pid`` moves itself into the group ``pgid`` (its own number: a new group)."""

    pid: int
    pgid: int


@dataclass(frozen=True, slots=True)
class End:
    """The stand-in ``pid`` exits and is reaped by ``reaper`` (None: by the tool)."""

    pid: int
    reaper: int | None


@dataclass(frozen=True, slots=True)
class Death:
    """``pid`` ends with ``wait_code`` and stays a zombie of ``parent``."""

    pid: int
    parent: int
    wait_code: int


Step = Spawn | Fork | Unshare | SetSid | OwnPids | TakeTerminal | SetPgid | End | Death


def plan(tasks: Iterable[Task]) -> list[Step]:
    """The steps, in order, that make the tree.

    A root whose session is led from outside the tree gets a stand-in with that leader's number, so that the new tree
    is in a session of its own and not in the tool's.  UnsupportedSession if some process sits in a session that no
    order of births can put it in, UnsupportedSharing if no order lets it share what it shares.
    """
    return _Planner(list(tasks)).run()


class _Planner:
    def __init__(self, tasks: list[Task]) -> None:
        self.tasks = {t.pid: t for t in tasks}
        self.kids: dict[int, list[Task]] = {}
        for task in tasks:
            self.kids.setdefault(task.ppid, []).append(task)
        self.roots = [t for t in tasks if t.ppid not in self.tasks]
        self.sessions: dict[int, set[int]] = {}
        for task in tasks:
            self.sessions.setdefault(task.sid, set()).add(task.pid)
        self.steps: list[Step] = []
        #: the session that a task must be born into; None: any (it leads its own, and none of its descendants cares)
        self.birth: dict[int, int | None] = {}

    def run(self) -> list[Step]:
        for root in self.roots:
            self._find_birth(root)
        self._bear_roots()
        self._groups()
        self._share()
        for task in self.tasks.values():
            if task.wait_code is not None:
                self.steps.append(Death(task.pid, task.ppid, task.wait_code))
        return self.steps

    # -- births ---------------------------------------------------------------------------------------------------

    def _find_birth(self, task: Task) -> set[int]:
        """Fill ``birth`` for ``task`` and its descendants; returns the PIDs of that subtree."""
        kids = self.kids.get(task.pid, [])
        subtree = {task.pid}
        for kid in kids:
            subtree |= self._find_birth(kid)
        foreign: set[int] = set()
        for kid in kids:
            need = self.birth[kid.pid]
            if need is None or need == task.sid or self._borne_by_sibling(need, task):
                continue
            if need in self.tasks and need in subtree:
                raise self._out_of_reach(kid, need)
            if self._local(need, subtree):
                continue  # a stand-in forked by this task will bear them
            foreign.add(need)
        if task.sid != task.pid:
            if foreign:
                raise self._out_of_reach(task, min(foreign))
            self.birth[task.pid] = task.sid
        elif len(foreign) > 1:
            raise self._out_of_reach(task, min(foreign))
        else:
            self.birth[task.pid] = foreign.pop() if foreign else None
        return subtree

    def _local(self, sid: int, subtree: set[int]) -> bool:
        """Whether the session has lost its leader and all that is left of it is in the subtree."""
        return sid not in self.tasks and self.sessions[sid] <= subtree

    def _borne_by_sibling(self, sid: int, parent: Task) -> bool:
        """Whether the session's leader is a child of ``parent``, and can so bear others of its children."""
        return sid in self.tasks and self.tasks[sid].ppid == parent.pid

    def _out_of_reach(self, task: Task, sid: int) -> UnsupportedSession:
        return UnsupportedSession(
            f"the session {sid} is needed by it or a descendant, and no order of births leads there",
            object=f"pid {task.pid}",
        )

    def _bear_init(self, init: Task) -> None:
        """The stand-in's own number does not matter: it is outside."""
        if len(self.roots) > 1 or self.birth[init.pid] not in (None, _OUTSIDE):
            raise self._out_of_reach(init, init.sid)
        self.steps += [Spawn(_OUTSIDE, stand_in=True), SetSid(_OUTSIDE), OwnPids(_OUTSIDE)]
        self.steps += [Fork(_OUTSIDE, init.pid, sibling=True), End(_OUTSIDE, None)]
        self._grow(init)

    def _bear_roots(self) -> None:
        if INIT in self.tasks:
            self._bear_init(self.tasks[INIT])
            return
        orphans: dict[int, list[Task]] = {}
        late: list[Task] = []
        for root in self.roots:
            need = self.birth[root.pid]
            if need is None:
                self.steps.append(Spawn(root.pid))
                self._grow(root)
            elif need in self.tasks:
                late.append(root)
            else:
                orphans.setdefault(need, []).append(root)
        for sid, members in orphans.items():
            self._stand_in(sid, Spawn(sid, stand_in=True), members, None)
            for root in members:
                self._grow(root)
        for root in late:
            leader = self.birth[root.pid]
            if leader is None or self.tasks[leader] not in self.roots or self.birth[leader] is not None:
                raise self._out_of_reach(root, root.sid)
            # the leader is itself one of the roots: its sibling is the tool's child, as a root must be
            self.steps.append(Fork(leader, root.pid, sibling=True))
            self._grow(root)

    def _stand_in(self, sid: int, birth: Spawn | Fork, members: list[Task], reaper: int | None) -> None:
        self.steps += [birth, SetSid(sid)]
        self.steps += [Fork(sid, m.pid, sibling=True) for m in members]
        self.steps.append(End(sid, reaper))

    def _grow(self, task: Task) -> None:
        """Bear the descendants of ``task``, which has just been born into the session ``birth[task.pid]``."""
        early: list[Task] = []
        plain: list[Task] = []
        adopted: list[Task] = []
        leaderless: dict[int, list[Task]] = {}
        for kid in self.kids.get(task.pid, []):
            need = self.birth[kid.pid]
            if need is None or need == task.sid:
                plain.append(kid)
            elif need == self.birth[task.pid]:
                early.append(kid)
            elif need in self.tasks:
                adopted.append(kid)
            else:
                leaderless.setdefault(need, []).append(kid)
        self.steps += [Fork(task.pid, kid.pid) for kid in early]
        if task.sid == task.pid:
            self.steps.append(SetSid(task.pid))
            if task.terminal >= 0:
                self.steps.append(TakeTerminal(task.pid, task.terminal))
        for sid, members in leaderless.items():
            self._stand_in(sid, Fork(task.pid, sid, stand_in=True), members, task.pid)
        self.steps += [Fork(task.pid, kid.pid) for kid in plain]
        for kid in early + plain + [m for members in leaderless.values() for m in members]:
            self._grow(kid)
        for kid in adopted:
            # reparented to this task when its own parent ended: its session's leader, a child of ours, bears it
            leader = self.birth[kid.pid]
            if leader is None or self.tasks[leader] in adopted:
                raise self._out_of_reach(kid, kid.sid)
            self.steps.append(Fork(leader, kid.pid, sibling=True))
            self._grow(kid)

    # -- groups ---------------------------------------------------------------------------------------------------

    def _groups(self) -> None:
        leaderless: dict[tuple[int, int], list[Task]] = {}
        joins: list[Step] = []
        for task in self.tasks.values():
            if task.sid == task.pid or task.pgid == _OUTSIDE:
                continue  # setsid has made its group; or the stand-in has, for all that are in none of the tree's
            if task.pgid == task.pid:
                self.steps.append(SetPgid(task.pid, task.pid))
            elif task.pgid in self.tasks:
                if self.tasks[task.pgid].pgid != task.pgid:
                    # the number was reused by a process that does not lead the group
                    raise UnsupportedSession(
                        f"its group {task.pgid} has lost its leader and the number is another process's now",
                        object=f"pid {task.pid}",
                    )
                joins.append(SetPgid(task.pid, task.pgid))
            elif task.pgid == task.sid:
                # the session's stand-in made the group; a member born by another may have inherited a different one
                joins.append(SetPgid(task.pid, task.pgid))
            else:
                leaderless.setdefault((task.sid, task.pgid), []).append(task)
        self.steps += joins
        for (_, pgid), members in leaderless.items():
            first = members[0].pid
            self.steps += [Fork(first, pgid, stand_in=True), SetPgid(pgid, pgid)]
            self.steps += [SetPgid(m.pid, pgid) for m in members]
            self.steps.append(End(pgid, first))

    # -- what is shared -------------------------------------------------------------------------------------------

    def _share(self) -> None:
        """Forks share what a group of processes shares, and so do those by whom its members were born of each other:
        these get a copy of their own afterwards."""
        creators = {step.pid: step.creator for step in self.steps if isinstance(step, Fork)}
        files = _sharing({t.pid: t.files for t in self.tasks.values() if t.files}, creators, "descriptors")
        places = _sharing({t.pid: t.directories for t in self.tasks.values() if t.directories}, creators, "directories")
        if not files and not places:
            return
        self.steps = [
            replace(
                step,
                files=files.get(step.pid, 0) == files.get(step.creator, -1),
                directories=places.get(step.pid, 0) == places.get(step.creator, -1),
            )
            if isinstance(step, Fork)
            else step
            for step in self.steps
        ]
        for task in self.tasks.values():
            if task.wait_code is None:
                lent = files.get(task.pid, task.pid) not in (task.files, task.pid)
                moved = places.get(task.pid, task.pid) not in (task.directories, task.pid)
                if lent or moved:
                    self.steps.append(Unshare(task.pid, lent, moved))


def _sharing(owners: dict[int, int], creators: dict[int, int], what: str) -> dict[int, int]:
    """PID -> whose it has at birth, of all that must be born sharing; ``owners``: whose it has at the end."""
    groups: dict[int, list[int]] = {}
    for pid, owner in owners.items():
        groups.setdefault(owner, [owner]).append(pid)
    found: dict[int, int] = {}
    for owner, members in groups.items():
        for pid in _between(members, creators, what):
            if found.setdefault(pid, owner) != owner:
                raise UnsupportedSharing(
                    f"its {what} cannot be those of process {owner} and of process {found[pid]}", object=f"pid {pid}"
                )
    return found


def _between(members: list[int], creators: dict[int, int], what: str) -> set[int]:
    """The members, and all on the way from each to the nearest by whom all were born."""
    lines = []
    for pid in members:
        line = [pid]
        while line[-1] in creators:
            line.append(creators[line[-1]])
        lines.append(line)
    common = set(lines[0]).intersection(*map(set, lines[1:]))
    if not common:
        raise UnsupportedSharing(
            f"it shares its {what} with process {members[0]}, and no process of the tree bore both",
            object=f"pid {members[-1]}",
        )
    top = max(len(lines[0]) - lines[0].index(pid) for pid in common)
    return {pid for line in lines for pid in line[: len(line) - top + 1]}
