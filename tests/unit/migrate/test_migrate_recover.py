"""What a journal says is to be done, what its notes tell, and a journal taken over from a dead program."""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.image.frames import Frame, Header, Kind, PageRun, Runs, Space
from checkpoint.traces import FrozenTree, Made, Roots, Rules, Trace, Traced, alive, write
from migrate import recover
from migrate.asking import answer, stands
from migrate.errors import JournalDamaged, KeptFramesLost, NothingToRecover, NotInDoubt
from migrate.journal import End, Journal, JournalView, Place, Role, StepKind, find_journal, journals, read_journal
from migrate.kept import NOTE, KeptFrames, read_kept
from migrate.messages import Ask, Standing
from migrate.recover import Assume, State, state_of
from migrate.traces import Traces
from tcpstate.errors import Outcome

NAME = "0123456789abcdef" * 2
OTHER = "f" * 32


def made(directory: Path, role: Role, *steps: StepKind, name: str = NAME, end: End | None = None) -> JournalView:
    """A journal whose program has ended."""
    journal = Journal.open(role, name, roots=(7,), host="b", directory=directory)
    for step in steps:
        journal.step(step)
    if end is not None:
        journal.finish(end)
    journal.leave()
    return read_journal(journal.path)


@pytest.mark.parametrize(
    ("role", "steps", "state"),
    [
        (Role.SOURCE, [], State.HERE),
        (Role.SOURCE, [StepKind.ABORTED], State.HERE),
        (Role.SOURCE, [StepKind.COMMIT], State.DOUBT),
        (Role.SOURCE, [StepKind.COMMIT, StepKind.RUNNING], State.GONE),
        (Role.TARGET, [], State.NOT_ARRIVED),
        (Role.TARGET, [StepKind.STARTED], State.ARRIVED),
        (Role.TARGET, [StepKind.STARTED, StepKind.RUNNING], State.ARRIVED),
        (Role.CHECKPOINT, [], State.HERE),
        (Role.CHECKPOINT, [StepKind.COMMIT], State.GONE),
        (Role.RESTORE, [], State.NOT_ARRIVED),
        (Role.RESTORE, [StepKind.STARTED], State.ARRIVED),
    ],
)
def test_what_a_journal_says(tmp_path: Path, role: Role, steps: list[StepKind], state: State) -> None:
    assert state_of(made(tmp_path, role, *steps)) is state


def test_a_journal_of_another_boot_is_left_alone(tmp_path: Path) -> None:
    view = dataclasses.replace(made(tmp_path, Role.SOURCE), mine=False)
    assert state_of(view) is State.FOREIGN


def test_a_program_at_work_is_left_alone(tmp_path: Path) -> None:
    journal = Journal.open(Role.SOURCE, NAME, directory=tmp_path)
    report = recover.recover(directory=tmp_path)
    assert [item.state for item in report.items] == [State.BUSY]
    assert report.status is Outcome.DONE
    journal.leave()


def test_a_closed_journal_is_settled(tmp_path: Path) -> None:
    made(tmp_path, Role.SOURCE, StepKind.COMMIT, end=End.MOVED)
    assert recover.recover(directory=tmp_path).items == ()


def test_nothing_changed_is_settled_by_closing_the_journal(tmp_path: Path) -> None:
    for role in (Role.SOURCE, Role.CHECKPOINT, Role.RESTORE, Role.TARGET):
        made(tmp_path, role)
    report = recover.recover(directory=tmp_path, dry_run=True)
    assert [item.settled for item in report.items] == [False] * 4
    report = recover.recover(directory=tmp_path)
    assert [item.settled for item in report.items] == [True] * 4
    assert {view.closed.end for view in journals(tmp_path) if view.closed} == {End.ABORTED}
    assert recover.recover(directory=tmp_path).items == ()


def test_names(tmp_path: Path) -> None:
    made(tmp_path, Role.CHECKPOINT)
    made(tmp_path, Role.CHECKPOINT, name=OTHER)
    with pytest.raises(NothingToRecover):
        recover.recover("aa", directory=tmp_path)
    with pytest.raises(NotInDoubt):
        recover.recover("ff", assume=Assume.HERE, directory=tmp_path)
    report = recover.recover("ff", directory=tmp_path)
    assert [item.id for item in report.items] == [OTHER]


def test_a_host_that_cannot_be_asked_stays_in_doubt(tmp_path: Path) -> None:
    journal = Journal.open(Role.SOURCE, NAME, host="b", rsh="/no/such/rsh", directory=tmp_path)
    journal.step(StepKind.COMMIT)
    journal.leave()
    for dry_run in (True, False):
        report = recover.recover(directory=tmp_path, dry_run=dry_run)
        assert report.status is Outcome.IN_DOUBT
        assert (report.items[0].code, report.items[0].settled) == ("TM-0636", False)
        assert "No such file" in report.items[0].error
    assert recover.recover(NAME, assume=Assume.HERE, directory=tmp_path).items[0].settled


@pytest.mark.parametrize(
    ("change", "standing"),
    [
        (lambda d: made(d, Role.TARGET), Standing.ABORTED),
        (lambda d: made(d, Role.TARGET, end=End.ABORTED), Standing.ABORTED),
        (lambda d: made(d, Role.TARGET, StepKind.STARTED), Standing.HELD),
        (lambda d: made(d, Role.TARGET, StepKind.STARTED, StepKind.RUNNING, end=End.MOVED), Standing.RUNS),
    ],
)
def test_how_a_target_stands(tmp_path: Path, change: Callable[[Path], JournalView], standing: Standing) -> None:
    view = change(tmp_path)
    assert stands(view) is standing
    told = answer(Ask(migration=NAME), lambda: None, directory=tmp_path)
    assert told.standing is standing
    assert read_journal(view.path).records == view.records, "only asked"


def test_a_target_of_an_earlier_boot(tmp_path: Path) -> None:
    started = dataclasses.replace(made(tmp_path, Role.TARGET, StepKind.STARTED), mine=False)
    assert stands(started) is Standing.UNKNOWN, "the same boot: we look from the wrong namespace"
    opened = dataclasses.replace(started.opened, boot_id="another")
    assert stands(dataclasses.replace(started, opened=opened)) is Standing.LOST
    building = dataclasses.replace(made(tmp_path, Role.TARGET, name=OTHER), mine=False)
    assert stands(building) is Standing.ABORTED


def test_settling_before_the_answer(tmp_path: Path) -> None:
    made(tmp_path, Role.TARGET)
    told = answer(Ask(migration=NAME, settle=True), lambda: None, directory=tmp_path)
    assert told.standing is Standing.ABORTED
    view = find_journal(NAME, Role.TARGET, tmp_path)
    assert view is not None
    assert view.closed is not None
    assert view.closed.end is End.ABORTED
    unknown = answer(Ask(migration=OTHER, settle=True), lambda: None, directory=tmp_path)
    assert unknown.standing is Standing.UNKNOWN


def test_a_name_from_the_wire_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "journals").mkdir()
    told = answer(Ask(migration="../../etc/passwd"), lambda: None, directory=tmp_path)
    assert told.standing is Standing.UNKNOWN


# --- journals taken over


def test_a_torn_record_is_overwritten(tmp_path: Path) -> None:
    view = made(tmp_path, Role.SOURCE, StepKind.COMMIT)
    end = len(view.path.read_bytes().rstrip(b"\0"))
    torn = view.path.stat().st_size
    with view.path.open("r+b") as file:
        # the beginning of a record that never got its end
        file.seek(end)
        file.write((100).to_bytes(4, "little") + b"\1\2\3\4half a record")
    torn_view = read_journal(view.path)
    assert torn_view.torn
    journal = Journal.take(torn_view)
    assert journal is not None
    journal.step(StepKind.RUNNING)
    again = read_journal(view.path)
    assert not again.torn
    assert again.records[: len(view.records)] == view.records
    assert again.reached(StepKind.RUNNING)
    assert view.path.stat().st_size == torn
    journal.finish(End.MOVED)
    assert read_journal(view.path).closed is not None


def test_a_journal_that_somebody_writes_cannot_be_taken(tmp_path: Path) -> None:
    journal = Journal.open(Role.SOURCE, NAME, directory=tmp_path)
    assert Journal.take(read_journal(journal.path)) is None
    journal.leave()
    taken = Journal.take(read_journal(journal.path))
    assert taken is not None
    with open(journal.path) as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    taken.leave()


# --- notes


def test_the_newest_note_counts(tmp_path: Path) -> None:
    journal = Journal.open(Role.SOURCE, NAME, directory=tmp_path)
    me = Traced.now(os.getpid())
    write(journal.note, Trace.ROOTS, Roots(processes=[me]))
    write(journal.note, Trace.RULES, Rules(priorities={2: 200}))
    write(journal.note, Trace.RULES, Rules(priorities={2: 200, 10: 300}))
    write(journal.note, Trace.MADE, Made(path=str(tmp_path)))
    write(journal.note, Trace.TREE, FrozenTree(processes=[me], connections=[], locks=[]))
    journal.leave()
    traces = Traces.of(read_journal(journal.path))
    assert traces.rules == Rules(priorities={2: 200, 10: 300})
    assert traces.originals == [me]
    assert traces.found() == [f"processes {os.getpid()}", "rules 200 300", str(tmp_path)]


def test_a_note_that_cannot_be_read(tmp_path: Path) -> None:
    journal = Journal.open(Role.SOURCE, NAME, directory=tmp_path)
    journal.note(Trace.TREE, b"\xc1")
    journal.leave()
    with pytest.raises(JournalDamaged):
        Traces.of(read_journal(journal.path))


def test_another_process_under_the_number_is_not_meant() -> None:
    me = Traced.now(os.getpid())
    assert alive([me]) == [me]
    assert alive([dataclasses.replace(me, start_time=me.start_time - 1)]) == []


def test_places_are_compared() -> None:
    assert Place(boot_id="a", network=1, pids=2) != Place(boot_id="b", network=1, pids=2)


# --- kept frames


def frame(kind: Kind, record: bytes, data: bytes = b"") -> Frame:
    header = Header(kind.value, 0, len(record), 0, len(data), b"", b"", 0)
    return Frame(header, record, memoryview(data))


def test_only_what_the_release_needs_is_kept(tmp_path: Path) -> None:
    notes: list[tuple[str, bytes]] = []
    os.environ["TCPMIG_RUNTIME_DIR"], before = str(tmp_path), os.environ.get("TCPMIG_RUNTIME_DIR")
    try:
        kept = KeptFrames.noted(lambda name, data: notes.append((name, data)))
    finally:
        del os.environ["TCPMIG_RUNTIME_DIR"]
        if before is not None:
            os.environ["TCPMIG_RUNTIME_DIR"] = before
    sent = Runs(space=Space.SENT, id=3, runs=((0, 4),)).pack()
    kept.keep(frame(Kind.FILES, b"files"))
    kept.keep(frame(Kind.TREE, b"tree"))
    kept.keep(frame(Kind.PAGES, Runs(space=Space.MEMORY, id=3, runs=((0, 4096),)).pack(), bytes(4096)))
    kept.keep(frame(Kind.PAGES, sent, b"data"))
    kept.keep(frame(Kind.FILES_DELTA, b"delta"))
    kept.close()
    assert notes == [(NOTE, os.fsencode(kept.path))]
    assert kept.path.stat().st_mode & 0o777 == 0o600
    found = [(each.kind, each.record, each.data) for each in read_kept(kept.path)]
    assert found == [("FILES", b"files", b""), ("PAGES", sent, b"data"), ("FILES_DELTA", b"delta", b"")]
    kept.path.write_bytes(kept.path.read_bytes()[:-1])
    with pytest.raises(KeptFramesLost):
        list(read_kept(kept.path))
    kept.remove()
    with pytest.raises(KeptFramesLost):
        list(read_kept(kept.path))


def test_the_longest_record_of_one_run_is_looked_at() -> None:
    longest = PageRun(space=Space.SENT, id=(1 << 62), runs=(((1 << 62), 1 << 20),), data=memoryview(b""))
    assert len(Runs(space=longest.space, id=longest.id, runs=longest.runs).pack()) <= 96
