"""The plan of births is run against a model of Linux's rules, on trees that the same model grew at random."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.errors import UnsupportedSession, UnsupportedSharing
from checkpoint.tree import Death, End, Fork, OwnPids, SetPgid, SetSid, Spawn, Step, Task, Unshare, plan

TOOL, INIT = 1_000_000, 1


@dataclass
class Proc:
    ppid: int
    pgid: int
    sid: int
    zombie: bool = False


class Linux:
    """fork, setsid, setpgid, exit: what kernel/fork.c and kernel/sys.c allow."""

    def __init__(self) -> None:
        self.procs = {TOOL: Proc(ppid=0, pgid=TOOL, sid=TOOL)}

    def number_free(self, pid: int) -> bool:
        return all(pid not in (n, p.pgid, p.sid) for n, p in self.procs.items())

    def fork(self, creator: int, pid: int, sibling: bool = False) -> None:
        assert self.number_free(pid), f"{pid} is taken"
        c = self.procs[creator]
        assert not c.zombie
        self.procs[pid] = Proc(ppid=c.ppid if sibling else creator, pgid=c.pgid, sid=c.sid)

    def setsid(self, pid: int) -> None:
        assert all(p.pgid != pid for p in self.procs.values()), "a group leader cannot setsid"
        p = self.procs[pid]
        p.sid = p.pgid = pid

    def setpgid(self, pid: int, pgid: int) -> None:
        p = self.procs[pid]
        assert p.sid != pid, "a session leader cannot setpgid"
        if pgid != pid:
            assert any(q.pgid == pgid and q.sid == p.sid for q in self.procs.values()), "no such group in the session"
        p.pgid = pgid

    def exit(self, pid: int, subreaper: int) -> None:
        for p in self.procs.values():
            if p.ppid == pid:
                p.ppid = subreaper
        del self.procs[pid]


def run(steps: list[object]) -> Linux:
    linux = Linux()
    for step in steps:
        match step:
            case Spawn(pid, _):
                linux.fork(TOOL, pid)
            case Fork(creator, pid, sibling):
                linux.fork(creator, pid, sibling)
            case SetSid(pid):
                linux.setsid(pid)
            case SetPgid(pid, pgid):
                linux.setpgid(pid, pgid)
            case End(pid, reaper):
                assert linux.procs[pid].ppid == (TOOL if reaper is None else reaper)
                linux.exit(pid, TOOL)
            case Death(pid, parent, _):
                assert linux.procs[pid].ppid == parent
                linux.procs[pid].zombie = True
    return linux


def check(tasks: list[Task]) -> None:
    linux = run(plan(tasks))
    inside = {t.pid for t in tasks}
    assert set(linux.procs) - {TOOL} == inside
    for t in tasks:
        p = linux.procs[t.pid]
        assert p.ppid == (t.ppid if t.ppid in inside else TOOL)
        assert (p.sid, p.pgid) == (t.sid, t.pgid), t
        assert p.zombie == (t.wait_code is not None)


@st.composite
def grown(draw: st.DrawFn) -> list[Task]:
    """A tree under one root, by random forks, setsids, setpgids and exits with the root as subreaper."""
    linux = Linux()
    root, numbers = 100, iter(range(101, 200))
    linux.procs[50] = Proc(ppid=1, pgid=50, sid=50)  # the root's session and group may be led from outside
    linux.fork(50, root)
    alive = [root]
    for _ in range(draw(st.integers(0, 25))):
        who = draw(st.sampled_from(alive))
        p = linux.procs[who]
        action = draw(st.sampled_from(["fork", "fork", "fork", "setsid", "setpgid", "join", "exit"]))
        if action == "fork":
            pid = next(numbers)
            linux.fork(who, pid)
            alive.append(pid)
        elif action == "setsid" and all(q.pgid != who for q in linux.procs.values()):
            linux.setsid(who)
        elif action == "setpgid" and p.sid != who:
            linux.setpgid(who, who)
        elif action == "join" and p.sid != who:
            groups = sorted({q.pgid for q in linux.procs.values() if q.sid == p.sid})
            linux.setpgid(who, draw(st.sampled_from(groups)))
        elif action == "exit" and who != root:
            linux.exit(who, root)
            alive.remove(who)
    return [Task(pid=n, ppid=linux.procs[n].ppid, pgid=linux.procs[n].pgid, sid=linux.procs[n].sid) for n in alive]


@settings(max_examples=400, deadline=None)
@given(grown())
def test_any_tree_that_linux_can_grow_grows_again_or_is_refused_by_name(tasks: list[Task]) -> None:
    try:
        plan(tasks)
    except UnsupportedSession:
        # only a tree with a session led by a living process below the root, or with several leaderless ones, or a
        # number that has been reused, may be refused
        by_pid = {t.pid: t for t in tasks}
        strange = [t for t in tasks if t.sid not in (t.pid, by_pid.get(t.ppid, t).sid)]
        reused = [t for t in tasks if t.pgid in by_pid and by_pid[t.pgid].pgid != t.pgid]
        assert strange or reused
        return
    check(tasks)


def test_a_root_that_leads_its_session_needs_no_stand_in() -> None:
    steps = plan([Task(pid=7, ppid=1, pgid=7, sid=7)])
    assert steps == [Spawn(7), SetSid(7)]


def test_a_root_led_from_outside_gets_a_stand_in_that_ends() -> None:
    tasks = [Task(pid=7, ppid=1, pgid=7, sid=5), Task(pid=8, ppid=7, pgid=7, sid=5)]
    assert Spawn(5, stand_in=True) in plan(tasks)
    check(tasks)


def test_children_born_before_their_parents_setsid() -> None:
    check([Task(pid=7, ppid=1, pgid=7, sid=7), Task(pid=8, ppid=7, pgid=8, sid=8), Task(pid=9, ppid=8, pgid=7, sid=7)])


def test_a_dead_session_leader_and_a_dead_group_leader() -> None:
    check(
        [
            Task(pid=7, ppid=1, pgid=7, sid=7),
            Task(pid=9, ppid=7, pgid=20, sid=30),
            Task(pid=10, ppid=7, pgid=20, sid=30),
            Task(pid=11, ppid=7, pgid=40, sid=7),
        ]
    )


def test_zombies_die_last_with_their_code() -> None:
    tasks = [Task(pid=7, ppid=1, pgid=7, sid=7), Task(pid=8, ppid=7, pgid=7, sid=7, wait_code=256)]
    assert plan(tasks)[-1] == Death(8, 7, 256)
    check(tasks)


def test_a_session_leader_out_of_reach_is_refused_by_name() -> None:
    tasks = [
        Task(pid=7, ppid=1, pgid=7, sid=7),
        Task(pid=8, ppid=7, pgid=8, sid=8),
        Task(pid=9, ppid=8, pgid=9, sid=9),
        Task(pid=10, ppid=7, pgid=10, sid=9),
    ]
    with pytest.raises(UnsupportedSession, match="pid 10"):
        plan(tasks)


@st.composite
def sharing(draw: st.DrawFn) -> list[Task]:
    """A tree of one session, by forks that share or do not, unshares, and exits with the root as subreaper."""
    numbers, tables = iter(range(101, 200)), iter(range(200))
    parents, has = {100: 1}, {100: next(tables)}
    for _ in range(draw(st.integers(0, 15))):
        who = draw(st.sampled_from(sorted(has)))
        action = draw(st.sampled_from(["share", "share", "fork", "unshare", "exit"]))
        if action in ("share", "fork"):
            pid = next(numbers)
            parents[pid], has[pid] = who, has[who] if action == "share" else next(tables)
        elif action == "unshare":
            has[who] = next(tables)
        elif who != 100:
            del has[who], parents[who]
            parents = {pid: parent if parent in has or parent == 1 else 100 for pid, parent in parents.items()}
    first: dict[int, int] = {}
    tasks = []
    for pid in has:  # parents before children
        owner = first.setdefault(has[pid], pid)
        tasks.append(Task(pid=pid, ppid=parents[pid], pgid=100, sid=100, files=0 if owner == pid else owner))
    return tasks


def shared_in_the_end(steps: list[Step], what: str) -> dict[int, int]:
    """PID -> number of the table that it has when the steps have been done."""
    has: dict[int, int] = {}
    fresh = iter(range(1000))
    for step in steps:
        match step:
            case Spawn(pid=pid):
                has[pid] = next(fresh)
            case Fork(creator=creator, pid=pid):
                has[pid] = has[creator] if getattr(step, what) else next(fresh)
            case Unshare(pid=pid) if getattr(step, what):
                has[pid] = next(fresh)
            case End(pid=pid) | Death(pid=pid):
                del has[pid]
    return has


@pytest.mark.parametrize("what", ["files", "directories"])
@settings(max_examples=300, deadline=None)
@given(sharing())
def test_what_processes_share_is_shared_again_or_refused_by_name(what: str, tasks: list[Task]) -> None:
    if what == "directories":
        tasks = [replace(task, files=0, directories=task.files) for task in tasks]
    try:
        steps = plan(tasks)
    except UnsupportedSharing:
        return
    has = shared_in_the_end(steps, what)
    assert has.keys() == {task.pid for task in tasks}
    for task in tasks:
        owner = getattr(task, what) or task.pid
        same = {pid for pid in has if has[pid] == has[task.pid]}
        assert same == {other.pid for other in tasks if (getattr(other, what) or other.pid) == owner}
    assert not any(getattr(step, {"files": "directories", "directories": "files"}[what], False) for step in steps)


def task(pid: int, ppid: int, files: int = 0) -> Task:
    return Task(pid=pid, ppid=ppid, pgid=7, sid=7, files=files)


def test_a_process_between_two_that_share_gets_a_copy_afterwards() -> None:
    steps = plan([task(7, 1), task(8, 7), task(9, 8, files=7)])
    assert [step for step in steps if isinstance(step, Fork)] == [Fork(7, 8, files=True), Fork(8, 9, files=True)]
    assert steps[-1] == Unshare(8, files=True)


@pytest.mark.parametrize(
    "tasks",
    [
        [task(7, 1), task(8, 7), task(9, 8, files=7), task(10, 9, files=8)],  # two tables through the same processes
        [task(7, 1), Task(pid=8, ppid=1, pgid=8, sid=8, files=7)],  # nobody bore both
        [task(7, 1), task(8, 7, files=77)],  # with a process that is not there
        [task(7, 1), task(8, 7, files=7), task(9, 8, files=8)],  # with one that has another's
    ],
)
def test_what_no_order_of_births_lets_them_share_is_refused_by_name(tasks: list[Task]) -> None:
    with pytest.raises(UnsupportedSharing, match="descriptors"):
        plan(tasks)


def test_what_was_left_of_common_tables_that_crossed() -> None:
    """A process whose parent, and the one before, have ended shares with a cousin: through whom all were born."""
    tasks = [task(7, 1), task(8, 7), task(9, 8), task(10, 7, files=9)]
    assert shared_in_the_end(plan(tasks), "files")[10] == shared_in_the_end(plan(tasks), "files")[9]


def test_the_first_process_of_a_pid_namespace_is_borne_from_outside() -> None:
    init = Task(pid=1, ppid=0, pgid=0, sid=0)
    leader = Task(pid=5, ppid=1, pgid=5, sid=5)
    in_a_group = Task(pid=6, ppid=1, pgid=6, sid=0)
    plain = Task(pid=7, ppid=6, pgid=0, sid=0)
    assert plan([init, leader, in_a_group, plain]) == [
        *(Spawn(0, stand_in=True), SetSid(0), OwnPids(0), Fork(0, 1, sibling=True), End(0, None)),
        *(Fork(1, 5), Fork(1, 6), SetSid(5), Fork(6, 7)),
        SetPgid(6, 6),
    ]


def test_an_init_that_leads_a_session() -> None:
    steps = plan([Task(pid=1, ppid=0, pgid=1, sid=1), Task(pid=2, ppid=1, pgid=1, sid=1)])
    assert steps[3:] == [Fork(0, 1, sibling=True), End(0, None), SetSid(1), Fork(1, 2), SetPgid(2, 1)]


@pytest.mark.parametrize("other", [Task(pid=9, ppid=0, pgid=0, sid=0), Task(pid=9, ppid=0, pgid=9, sid=9)])
def test_an_init_has_no_siblings(other: Task) -> None:
    with pytest.raises(UnsupportedSession):
        plan([Task(pid=1, ppid=0, pgid=0, sid=0), other])
