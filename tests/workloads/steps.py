"""tcpmig killed before a chosen one of the small steps of its work (:mod:`tests.workloads.killed_at`), in each command.

A *place* is a command and what is counted in it; some need something done before, such as a death that there is
something to recover from.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from tests.hosts import Host, warm
from tests.hosts.tcpmig import RSH, TCPMIG
from tests.workloads import breaks
from tests.workloads.deaths import Death
from tests.workloads.move import Stage

__all__ = ["PLACES", "Place", "die_recovering", "run"]

KILLED_AT = [sys.executable, "-m", "tests.workloads.killed_at"]


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """moment: what is counted; command: in which one; before: what is done before; there: on the other host."""

    moment: str
    command: str
    before: Callable[[Stage, Path], None] | None = None
    there: bool = False


def _die_frozen(stage: Stage, folder: Path) -> None:
    """Half of the sockets are frozen."""
    status, _ = run(stage, folder, "freeze", 20)
    assert status == -9


def _die_released(stage: Stage, folder: Path) -> None:
    """Half of the sockets are released."""
    status, _ = run(stage, folder, "release", 6)
    assert status != 0


def _cut_started(stage: Stage, folder: Path) -> None:
    """The copy runs, and the source does not know."""
    status, _, reached = breaks.migrate(stage, folder, breaks.Break("target:started:1", "cut"))
    assert (status, reached) == (5, True)


PLACES = {
    "freeze": Place("freeze", "migrate"),
    "inject": Place("inject", "migrate"),
    "rebuild": Place("rebuild", "receive"),
    "release": Place("release", "receive"),
    "stubs": Place("inject", "receive"),
    "starts": Place("start", "migrate"),
    "stub-starts": Place("start", "receive"),
    "thaw": Place("thaw", "checkpoint -R"),
    "hold": Place("freeze", "checkpoint"),
    "back": Place("rebuild", "restore", breaks.hold),
    "resume": Place("settle", "recover", _die_frozen),
    "discard": Place("settle", "recover", _cut_started),
    "finish": Place("settle", "recover", _die_released, there=True),
}


def run(stage: Stage, folder: Path, name: str, number: int) -> tuple[int, int]:
    """Exit status of the command (of `migrate` where `receive` is killed), and how many steps there were: 0 if it was
    killed."""
    place = PLACES[name]
    if place.before is not None:
        place.before(stage, folder)
    count = folder / "steps"
    count.unlink(missing_ok=True)
    at: list[object] = [place.moment, number, count]
    host: Host = stage.there if place.there else stage.here
    if place.command in ("migrate", "receive"):
        dies = place.command == "receive"
        receive = shlex.join([*map(str, [*KILLED_AT, *at] if dies else TCPMIG), "receive"])
        warm.ready(stage.there)
        line = ["--rsh", shlex.join([*RSH, "--warm"]), "--remote-command", receive, "--json"]
        migrate = [*(["cli.main"] if dies else [KILLED_AT[-1], *at]), "migrate"]
        status, out, err = warm.run(host, *migrate, stage.pid, stage.there.name, *line)
    else:
        image = folder / "image"
        options: list[object] = (
            [stage.pid, "-o", image] if "checkpoint" in place.command else [image] * (place.command == "restore")
        )
        status, out, err = warm.run(host, KILLED_AT[-1], *at, *place.command.split(), *options, "--json")
    (folder / "tool.log").write_text(out + err)
    return status, int(count.read_text()) if count.exists() else 0


#: states that `recover` finds, by what was done before (and how far it may go), and where it is run then
RECOVERED = (("freeze", 90, False), ("release", 20, True), ("release", 20, False), ("", 0, False))
#: how many functions it has called so far in each of them
_calls = [2000] * len(RECOVERED)


def die_recovering(stage: Stage, folder: Path, share: float) -> Death:
    """A death inside the stop, or a cut line, and then one of `recover`, at that share (0..1) of its work."""
    turn = int(share * 1000) % len(RECOVERED)
    before, most, there = RECOVERED[turn]
    if before:
        run(stage, folder, before, 1 + int(share * 7 % 1 * most))
    else:
        _cut_started(stage, folder)
    host = stage.there if there else stage.here
    number = 1 + int(share * _calls[turn])
    count = folder / "steps"
    count.unlink(missing_ok=True)
    status, out, err = warm.run(host, KILLED_AT[-1], "recover", number, count, "recover", "--json")
    (folder / "tool.log").write_text(f"{turn} {number}\n{out}{err}")
    if count.exists():
        _calls[turn] = max(_calls[turn], int(count.read_text()))
    states = [each.state(stage.pid) for each in (host, stage.here, stage.there)]
    return Death(status, next((state for state in states if state == "T"), states[0]), 0.0)
