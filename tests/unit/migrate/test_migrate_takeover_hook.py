"""The takeover hook: when it is called, what its failures are, what may be done beside it. The hooks are real
programs."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import pytest

from migrate.errors import AddressNotTaken, NothingToTakeOver, TakeoverHookRefused, TakeoverHookSyntax
from migrate.sourcehooks import SourceHooks
from migrate.summary import SourceOptions
from migrate.takeoverhook import TakeoverHook
from migrate.unithook import HookFacts
from tcpstate.errors import Outcome

FACTS = HookFacts(
    command="migrate", role="source", migration="ab12", host="there", pids=(7, 9), addresses=("10.0.0.5", "fd00::5")
)


def hook(script: str, *, limit: float = 30.0) -> TakeoverHook:
    return TakeoverHook(shlex.join(["/bin/sh", "-c", script]), FACTS, limit=limit)


def test_it_is_told_where_the_processes_are(tmp_path: Path) -> None:
    one = hook(f'echo "$TCPMIG_HOOK $TCPMIG_TARGET_PIDS $TCPMIG_ADDRESSES $TCPMIG_HOST" >>{tmp_path}/log')
    one.check()
    one.take((70, 90))
    one.undo()
    assert (tmp_path / "log").read_text().splitlines() == [
        "check  10.0.0.5 fd00::5 there",
        "take 70 90 10.0.0.5 fd00::5 there",
    ]


def test_without_check_nothing_is_called(tmp_path: Path) -> None:
    one = hook(f"touch {tmp_path}/called")
    one.take(())
    one.undo()
    assert not (tmp_path / "called").exists()


def test_a_failed_check_refuses_and_is_undone(tmp_path: Path) -> None:
    one = hook(f"echo $TCPMIG_HOOK >>{tmp_path}/log; test $TCPMIG_HOOK != check")
    with pytest.raises(TakeoverHookRefused, match="status 1") as failed:
        one.check()
    assert failed.value.outcome is Outcome.REFUSED
    one.undo()
    assert (tmp_path / "log").read_text().split() == ["check", "undo"]


def test_while_it_runs_something_else_is_done(tmp_path: Path) -> None:
    # it waits for what is done beside it
    one = hook(f"test $TCPMIG_HOOK = check || while ! test -e {tmp_path}/go; do sleep 0.01; done")
    one.check()
    called = []

    def meanwhile() -> None:
        called.append(time.monotonic())
        if len(called) == 3:
            (tmp_path / "go").touch()

    one.take((), meanwhile)
    assert len(called) >= 3


def test_a_failed_take_is_partial_and_can_be_made_up_for(tmp_path: Path) -> None:
    one = hook(f"test $TCPMIG_HOOK = check || test -e {tmp_path}/works")
    one.check()
    note = one.note()
    with pytest.raises(AddressNotTaken) as failed:
        one.take((70, 90))
    assert (failed.value.outcome, failed.value.object) == (Outcome.PARTIAL, "10.0.0.5, fd00::5")
    (tmp_path / "works").touch()
    TakeoverHook.noted(note).take((70, 90))


def test_its_time_is_limited_also_beside_other_work() -> None:
    one = hook("test $TCPMIG_HOOK = check || exec sleep 1000", limit=0.3)
    one.check()
    with pytest.raises(AddressNotTaken, match=r"took longer than 0\.3 seconds and was killed at take"):
        one.take((), lambda: None)


def test_what_is_done_beside_it_may_fail_and_it_ends_all_the_same(tmp_path: Path) -> None:
    one = hook(f"test $TCPMIG_HOOK = check || echo done >{tmp_path}/log")
    one.check()

    def broken() -> None:
        raise KeyError("broken")

    slow = hook(f"test $TCPMIG_HOOK = check || {{ sleep 0.3; echo done >{tmp_path}/log; }}")
    slow.check()
    with pytest.raises(KeyError):
        slow.take((), broken)
    assert (tmp_path / "log").read_text() == "done\n"


@pytest.mark.parametrize("command", ["  ", "open 'quote"])
def test_a_command_that_is_none(command: str) -> None:
    with pytest.raises(TakeoverHookSyntax):
        TakeoverHook(command, FACTS)


def test_an_address_must_move() -> None:
    hooks = SourceHooks(SourceOptions(takeover_hook="true"), "ab12", "there")
    assert hooks
    with pytest.raises(NothingToTakeOver):
        hooks.judge(())
    hooks.judge(["10.0.0.5"])
    none = SourceHooks(SourceOptions(), "ab12", "there")
    assert not none
    none.judge(())
