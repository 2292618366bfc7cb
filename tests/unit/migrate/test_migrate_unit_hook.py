"""The unit hook: what it is told, what its failures are called, when it is called. The hooks are real programs."""

from __future__ import annotations

import json
import os
import select
import shlex
from pathlib import Path

import pytest

from migrate.errors import UnitHookFailed, UnitHookSyntax
from migrate.unithook import HookFacts, HookNote, HookPoint, HookUnit, UnitHook
from tcpstate import codec

FACTS = HookFacts(
    command="migrate",
    role="source",
    migration="ab12",
    host="there",
    pids=(7, 9),
    addresses=("10.0.0.5",),
    units=(HookUnit(name="web.service", restart="always", main=True, pids=(7,)),),
)


def hook(script: str, *, limit: float = 30.0) -> UnitHook:
    return UnitHook(shlex.join(["/bin/sh", "-c", script]), FACTS, limit=limit)


def test_what_it_is_told(tmp_path: Path) -> None:
    script = f"env >{tmp_path}/env; cat >{tmp_path}/stdin"
    one = hook(script)
    one.before_stop()
    one.committed((70, 90))
    environment = (tmp_path / "env").read_text().splitlines()
    assert {"TCPMIG_HOOK=committed", "TCPMIG_PIDS=7 9", "TCPMIG_TARGET_PIDS=70 90", "TCPMIG_HOST=there"} <= {
        *environment
    }
    said = json.loads((tmp_path / "stdin").read_text())
    assert (said["hook"], said["pids"], said["target_pids"]) == ("committed", [7, 9], [70, 90])
    assert said["units"] == [{"name": "web.service", "user": None, "restart": "always", "main": True, "pids": [7]}]
    assert codec.unpack(HookNote, one.note()) == HookNote(command=one.command, facts=one.facts)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo this; echo that >&2; exit 3", "failed (status 3) at before-stop; it said: that"),
        ("kill -9 $$", "killed by SIGKILL"),
        ("exec /no/such/program", "status 127"),
    ],
)
def test_what_its_failures_are_called(script: str, words: str) -> None:
    with pytest.raises(UnitHookFailed) as failed:
        hook(script).before_stop()
    assert words in failed.value.message


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(UnitHookFailed, match="cannot be started"):
        UnitHook("/no/such/program", FACTS).before_stop()


def test_its_time_is_limited_also_for_its_children(tmp_path: Path) -> None:
    # a reader of its pipe sees the end of file only when all of them are dead
    read, write = os.pipe()
    os.set_inheritable(write, True)
    slow = UnitHook("/bin/sh -c 'sleep 1000 & sleep 1000'", FACTS, limit=0.3)
    with pytest.raises(UnitHookFailed, match=r"took longer than 0.3 seconds and was killed"):
        slow.before_stop()
    os.close(write)
    assert select.select([read], [], [], 30)[0]
    assert os.read(read, 1) == b""
    os.close(read)


def test_each_end_is_called_once_and_only_after_the_beginning(tmp_path: Path) -> None:
    log = tmp_path / "log"
    one = hook(f"echo $TCPMIG_HOOK >>{log}; test $TCPMIG_HOOK != before-stop")
    one.aborted()
    one.committed()
    assert not log.exists()
    with pytest.raises(UnitHookFailed):
        one.before_stop()
    one.aborted()
    one.aborted()
    one.committed()
    assert log.read_text().split() == ["before-stop", "aborted"]


@pytest.mark.parametrize("command", ["", "  ", "open 'quote"])
def test_a_command_that_is_none(command: str) -> None:
    with pytest.raises(UnitHookSyntax):
        UnitHook(command, FACTS)


@pytest.mark.parametrize("point", HookPoint)
def test_the_document_is_one_line(point: HookPoint) -> None:
    assert FACTS.document(point).count(b"\n") == 1
