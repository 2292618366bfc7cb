"""The plan of births is run against a model of Linux's rules, on trees that the same model grew at random."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.errors import UnsupportedSession
from checkpoint.tree import Death, End, Fork, SetPgid, SetSid, Spawn, Task, plan

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
            case Fork(creator, pid, sibling, _):
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
