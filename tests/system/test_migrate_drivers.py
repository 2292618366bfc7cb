"""Source and target against each other, with stand-ins for the processes, failing at every point in every way.

The line is a real one (a socket pair between two threads, or a remote shell), the journals are real; most tests have no
addresses to move, the last ones move them between two network namespaces.
"""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.verdict import Status, Verdict
from migrate.errors import (
    AddressChangeFailed,
    AddressTakenAtTarget,
    InDoubt,
    JournalUnusable,
    LinkLost,
    NotTcpmig,
    PreparedDiffers,
    RemoteStartFailed,
    TargetStuck,
)
from migrate.journal import End, Journal, JournalRecord, StepKind, journals
from migrate.messages import Difference
from migrate.source import Source
from migrate.summary import SourceOptions, Summary
from migrate.target import Received
from migrate.transport import Remote
from tcpstate.errors import Outcome, TcpmigError
from tests.system.standins import Broken, FakeOutgoing, Run, World
from tests.system.test_takeover import Host, hosts

__all__ = ["hosts"]


def test_a_migration(tmp_path: Path) -> None:
    run = Run(World(), tmp_path).go()
    assert isinstance(run.sent, Summary), run.sent
    assert run.received == Received(migration=run.sent.migration, pids={77: 78}, addresses=())
    assert (run.world.here, run.world.there) == ("gone", "running")
    rounds, skeleton = (b"round" + bytes(1 << 20)) * 2, (b"head" + bytes(1 << 20)) * 3
    assert bytes(run.incoming.image) == rounds + b"idle connections" + skeleton + b"tail"
    assert run.incoming.replayed == [b"segment 1", b"segment 2", b"segment 3"]
    assert 0 <= run.incoming.elapsed < 2
    assert run.ends() == (End.MOVED, End.MOVED)
    summary = run.sent
    assert (summary.outcome, summary.status, summary.pid, summary.target_pid) == ("done", Outcome.DONE, 77, 78)
    assert 0 < summary.stop_ms < summary.total_ms
    assert summary.bytes_sent > 3 << 20
    assert summary.connections == 3
    assert summary.rounds[-1].bytes == 3 * ((1 << 20) + 4)
    order = [e for e in run.world.events if e not in ("replay", "close", "close there")]
    assert order == [
        "needs", "check", "prepare", "stop", "build", "send", "freeze", "rebuild", "keep", "release", "run", "forget",
        "discard",
    ] or set(order) >= {"build", "send"}  # fmt: skip
    assert order.index("rebuild") < order.index("keep") < order.index("release") < order.index("run")


def test_many_megabytes_of_captured_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    much = [os.urandom(60_000) for _ in range(400)]
    run = Run(World(), tmp_path)
    monkeypatch.setattr(run.outgoing, "segments", lambda: [much.pop(0) for _ in range(len(much))])
    sent = list(much)
    run.go()
    assert isinstance(run.sent, Summary)
    assert run.incoming.replayed == sent


def test_only_a_check(tmp_path: Path) -> None:
    run = Run(World(), tmp_path, only_check=True).go()
    assert (run.sent, run.received) == (None, None)
    assert run.world.here == "running"
    assert "stop" not in run.world.events
    assert list(journals(tmp_path / "here")) == list(journals(tmp_path / "there")) == []


@pytest.mark.parametrize("point", ["needs", "prepare", "check"])
def test_what_is_refused_before_the_stop(tmp_path: Path, point: str) -> None:
    world = World()
    world.fail[point] = Broken("no", object="pid 77", fix="do it differently")
    run = Run(world, tmp_path).go()
    assert isinstance(run.sent, TcpmigError)
    assert (world.here, world.there) == ("running", "none")
    assert "stop" not in world.events
    if point != "check":
        assert (run.sent.code, run.sent.outcome) == ("TM-9900", Outcome.REFUSED)


def test_the_targets_verdict_is_the_sources_error(tmp_path: Path) -> None:
    run = Run(World(), tmp_path)
    run.incoming.verdicts = [
        Verdict(subject="a", kind="file"),
        Verdict(subject="pid 77", kind="pid", status=Status.REFUSE, code="TM-0202", text="it is taken", fix="free it"),
    ]
    run.go()
    for error in (run.sent, run.received):
        assert isinstance(error, TcpmigError)
        assert (error.code, error.outcome, error.object, error.fix) == ("TM-0202", Outcome.REFUSED, "pid 77", "free it")
    assert "prepare" not in run.world.events
    assert run.world.here == "running"


@pytest.mark.parametrize(
    "point", ["round 1", "round 2", "connections", "stop", "send", "freeze", "build", "rebuild", "keep"]
)
@pytest.mark.parametrize(
    "failure", [Broken("no"), KeyboardInterrupt(), RuntimeError("a defect")], ids=lambda f: type(f).__name__
)
def test_a_failure_before_the_release_gives_everything_back(tmp_path: Path, point: str, failure: BaseException) -> None:
    """`keep` is after COMMIT: the target says Abort, and the source takes back what it had given."""
    world = World()
    world.fail[point] = failure
    run = Run(world, tmp_path).go()
    assert isinstance(run.sent, BaseException)
    assert (world.here, world.there) == ("running", "none"), world.events
    assert world.events.count("resume") >= 1
    assert "discard" not in world.events
    assert "release" not in world.events
    assert run.ends() == (End.ABORTED, End.ABORTED)
    if isinstance(failure, Broken):
        assert isinstance(run.sent, TcpmigError)
        assert (run.sent.code, run.sent.outcome) == ("TM-9900", Outcome.FAILED), "something had begun"


def test_connections_that_differ_are_not_committed(tmp_path: Path) -> None:
    run = Run(World(), tmp_path)
    run.incoming.differences = (Difference(connection="tcp:a-b", item="rcv_nxt", sent="1", found="2"),)
    run.go()
    assert isinstance(run.sent, PreparedDiffers)
    assert run.sent.object == "tcp:a-b"
    assert (run.world.here, run.world.there) == ("running", "none")


@pytest.mark.parametrize("point", ["prepare", "stop", "send", "freeze", "build", "rebuild"])
def test_a_line_cut_before_commit_gives_everything_back(tmp_path: Path, point: str) -> None:
    world = World()
    run = Run(world, tmp_path)
    world.fail[point] = run.cut
    run.go()
    assert isinstance(run.sent, LinkLost), run.sent
    assert run.sent.outcome is Outcome.FAILED
    assert (world.here, world.there) == ("running", "none"), world.events
    assert isinstance(run.received, TcpmigError)


def test_a_line_cut_after_commit_leaves_the_source_in_doubt_and_the_target_running(tmp_path: Path) -> None:
    world = World()
    run = Run(world, tmp_path)
    world.fail["release"] = run.cut
    run.go()
    assert isinstance(run.sent, InDoubt), run.sent
    assert run.sent.outcome is Outcome.IN_DOUBT
    assert (world.here, world.there) == ("stopped", "running")
    assert "hold" in world.events
    assert run.ends() == (None, End.MOVED)
    (view,) = journals(tmp_path / "here")
    assert view.reached(StepKind.COMMIT)
    assert not view.reached(StepKind.RUNNING)
    assert (view.opened.host, view.opened.rsh) == ("b", "ssh")


def test_a_target_that_says_nothing_after_commit_leaves_the_source_in_doubt(tmp_path: Path) -> None:
    world = World()
    run = Run(world, tmp_path, silence=2.0)

    def say_nothing() -> None:
        assert run.over.wait(20)

    world.fail["run"] = say_nothing
    run.go()
    assert isinstance(run.sent, InDoubt), run.sent
    assert world.here == "stopped"


def test_the_source_may_take_minutes_to_look_at_what_it_has_and_no_longer_for_anything_else(tmp_path: Path) -> None:
    world, seen = World(), []
    run = Run(world, tmp_path)

    def look() -> None:
        # the target is another thread: it may only have said who it is
        end = time.monotonic() + 5
        while run.channel.silence < 600.0 and time.monotonic() < end:
            time.sleep(0.001)
        seen.append(run.channel.silence)

    world.fail["needs"] = look
    world.fail["prepare"] = lambda: seen.append(run.channel.silence)
    run.go()
    assert isinstance(run.sent, Summary), run.sent
    assert seen == [600.0, 10.0]


@pytest.mark.parametrize("point", ["release", "run"])
def test_a_failure_after_the_release_began_holds_both(tmp_path: Path, point: str) -> None:
    world = World()
    world.fail[point] = Broken("no")
    run = Run(world, tmp_path).go()
    assert isinstance(run.sent, TargetStuck)
    assert isinstance(run.received, TargetStuck)
    assert run.sent.outcome is run.received.outcome is Outcome.IN_DOUBT
    assert world.here == "stopped"
    assert "hold" in world.events
    assert "hold there" in world.events
    assert "undo" not in world.events
    assert run.ends() == (None, None)


def test_a_target_that_cannot_undo_does_not_say_that_it_did(tmp_path: Path) -> None:
    world = World()
    world.fail["keep"] = Broken("no")
    world.fail["undo"] = Broken("nor back")
    run = Run(world, tmp_path).go()
    assert isinstance(run.sent, TargetStuck)
    assert world.here == "stopped"


@pytest.mark.parametrize("point", ["replay", "discard"])
def test_what_is_not_essential_after_the_release_changes_nothing(tmp_path: Path, point: str) -> None:
    world = World()
    world.fail[point] = Broken("no")
    run = Run(world, tmp_path).go()
    assert isinstance(run.sent, Summary)
    assert (world.here, world.there) == ("gone", "running")


def test_an_undo_that_fails_is_said(tmp_path: Path) -> None:
    world = World()
    world.fail["rebuild"] = Broken("no")
    world.fail["resume"] = Broken("nor resume")
    run = Run(world, tmp_path).go()
    assert isinstance(run.sent, TcpmigError)
    assert "undoing failed" in run.sent.message
    assert "nor resume" in run.sent.message


def test_a_disk_that_is_full_at_commit_gives_everything_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target may not start what it cannot journal."""
    append = Journal.append

    def full(journal: Journal, *records: JournalRecord) -> None:
        if "there" in str(journal.path) and any(getattr(r, "step", None) is StepKind.STARTED for r in records):
            raise JournalUnusable("No space left on device")
        append(journal, *records)

    monkeypatch.setattr(Journal, "append", full)
    run = Run(World(), tmp_path).go()
    assert isinstance(run.sent, JournalUnusable)
    assert run.sent.outcome is Outcome.FAILED
    assert (run.world.here, run.world.there) == ("running", "none")
    assert run.ends() == (End.ABORTED, End.ABORTED)


# --- the remote shell


def script(tmp_path: Path, text: str) -> str:
    """An --rsh that runs a Python program."""
    path = tmp_path / "rsh.py"
    path.write_text(textwrap.dedent(text))
    return shlex.join([sys.executable, str(path)])


@pytest.mark.parametrize(
    ("rsh", "shown"),
    [
        (
            "import sys; print('ssh: connect to host b port 22: No route to host', file=sys.stderr); sys.exit(255)",
            "No route",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("import os; os.close(0); os.close(1); import time; time.sleep(30)", "closed the line"),
    ],
)
def test_a_host_that_cannot_be_reached(tmp_path: Path, rsh: str, shown: str) -> None:
    start = time.monotonic()
    with Remote("b", rsh=script(tmp_path, rsh)) as remote:
        with pytest.raises(RemoteStartFailed, match=shown) as caught:
            remote.first()
    assert (caught.value.code, caught.value.outcome, caught.value.object) == ("TM-0607", Outcome.REFUSED, "b")
    assert time.monotonic() - start < 15


def test_a_host_that_does_not_answer(tmp_path: Path) -> None:
    with Remote("b", rsh=script(tmp_path, "import time; time.sleep(60)")) as remote:
        with pytest.raises(RemoteStartFailed, match="no answer within"):
            remote.first(0.2)


def test_a_program_that_does_not_exist() -> None:
    with pytest.raises(RemoteStartFailed, match="No such file"):
        Remote("b", rsh="/no/such/rsh")


def test_a_login_script_that_prints(tmp_path: Path) -> None:
    with Remote("b", rsh=script(tmp_path, "print('Welcome!', flush=True); input()")) as remote:
        with pytest.raises(NotTcpmig, match="Welcome"):
            remote.first()


def test_the_command_line_and_the_errors_of_the_remote_shell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "migrate.transport")
    rsh = script(tmp_path, "import sys; print(sys.argv[1:], file=sys.stderr); sys.exit(3)")
    with Remote("root@b", rsh=rsh, remote_command="sudo tcpmig receive") as remote:
        with pytest.raises(RemoteStartFailed, match="ended with status 3"):
            remote.first()
    assert "root@b: ['root@b', 'sudo', 'tcpmig', 'receive']" in caplog.messages


def test_a_child_that_floods_its_standard_error_is_not_blocked(tmp_path: Path) -> None:
    rsh = script(tmp_path, "import sys; sys.stderr.write('x' * 5_000_000); sys.exit(1)")
    with Remote("b", rsh=rsh) as remote, pytest.raises(RemoteStartFailed):
        remote.first()


RECEIVER = """
    import sys, time
    sys.path.insert(0, {root!r})
    from pathlib import Path
    from migrate.target import Target
    from migrate.transport import standard_channel
    from tests.system.standins import FakeIncoming, World
    world = World()
    world.here = "elsewhere"
    with standard_channel() as channel:
        print("a stray print goes to standard error", flush=True)
        Target(FakeIncoming(world), channel, state_directory=Path({state!r})).run()
    """


def test_through_a_remote_shell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "migrate.transport")
    root = str(Path(__file__).resolve().parents[2])
    rsh = script(tmp_path, RECEIVER.format(root=root, state=str(tmp_path / "there")))
    with Remote("b", rsh=rsh) as remote:
        options = SourceOptions(forwarded={"map": "/a=/b"}, state_directory=tmp_path / "here")
        world = World()
        summary = Source(FakeOutgoing(world), remote, options).run()
    assert summary.pids == {77: 78}
    assert any("a stray print goes to standard error" in m for m in caplog.messages)
    assert [v.closed.end for v in journals(tmp_path / "there") if v.closed] == [End.MOVED]


# --- with addresses

MOVED = ("10.94.0.100", "fd94::100")


@pytest.fixture
def pair(hosts: tuple[Host, Host, Host], tmp_path: Path) -> Callable[[World], Run]:
    """A migration from the first host to the second that takes two addresses along."""
    a, b, _ = hosts
    a.ip("addr add 10.94.0.100/24 dev eth0")
    a.ip("addr add fd94::100/64 dev eth0 nodad")

    def make(world: World) -> Run:
        run = Run(world, tmp_path)
        run.outgoing.addresses = MOVED
        run.inside = b.inside
        return run

    return make


def test_addresses_go_along(hosts: tuple[Host, Host, Host], pair: Callable[[World], Run]) -> None:
    a, b, c = hosts
    for address in MOVED:
        c.reach(address)
    run = pair(World())
    with a.inside():
        run.go()
    assert isinstance(run.sent, Summary), run.sent
    assert run.sent.addresses == MOVED
    assert isinstance(run.received, Received)
    for address in MOVED:
        assert address not in a.ip("addr")
        assert address in b.ip("addr")
        assert c.neighbour(address) == b.mac()
        c.reach(address)


@pytest.mark.parametrize("point", ["freeze", "rebuild", "keep"])
def test_addresses_stay_where_they_were_if_it_fails(
    hosts: tuple[Host, Host, Host], pair: Callable[[World], Run], point: str
) -> None:
    a, b, _ = hosts
    before = a.addresses(), a.routes(), b.addresses(), b.routes()
    world = World()
    world.fail[point] = Broken("no")
    with a.inside():
        run = pair(world).go()
    assert isinstance(run.sent, Broken)
    assert (a.addresses(), a.routes(), b.addresses(), b.routes()) == before


def test_an_address_that_appears_at_the_target_after_the_check_undoes_the_move(
    hosts: tuple[Host, Host, Host], pair: Callable[[World], Run]
) -> None:
    a, b, _ = hosts
    before = a.addresses(), a.routes()
    world = World()
    world.fail["rebuild"] = lambda: b.ip("addr add fd94::100/64 dev eth0 nodad") and None
    with a.inside():
        run = pair(world).go()
    assert isinstance(run.sent, AddressChangeFailed), run.sent
    assert run.sent.outcome is Outcome.FAILED
    assert (world.here, world.there) == ("running", "none")
    assert (a.addresses(), a.routes()) == before
    assert "10.94.0.100" not in b.ip("addr")
    assert "fd94::100" in b.ip("addr"), "somebody else's"


def test_an_address_in_use_is_refused_before_the_stop(
    hosts: tuple[Host, Host, Host], pair: Callable[[World], Run]
) -> None:
    a, _, c = hosts
    c.ip("addr add 10.94.0.100/32 dev lo")
    world = World()
    with a.inside():
        run = pair(world).go()
    assert isinstance(run.sent, AddressTakenAtTarget)
    assert run.sent.outcome is Outcome.REFUSED
    assert "prepare" not in world.events
