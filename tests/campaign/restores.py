"""Each real program into a file and out of it again, on one host, again and again under load: how long it stood still,
and how long until it ran again.

python -m tests.campaign.restores [--seed N] [--times N] [NAME...]

Its connections are held meanwhile; what its clients sent is repeated, and at the end they have seen nothing wrong.
Resumable, as the others; the table is `python -m tests.campaign.figures`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.campaign.run import LONGEST_PAUSE, STATE, code
from tests.hosts import CommandFailed, Host, ThreeHosts, three_hosts
from tests.hosts.tcpmig import tcpmig
from tests.workloads import scenes
from tests.workloads.load import ask_all
from tests.workloads.servers import PROGRAMS
from tests.workloads.session import logged_in

__all__ = ["NAMES", "main", "run"]

NAMES = ("redis", "nginx", *PROGRAMS, "sshd")
#: what of the summaries is kept
_CHECKPOINT, _RESTORE = ("stop_ms", "phases", "bytes", "connections"), ("run_ms", "phases", "held")
_Ask = Callable[[], list[str]]


@dataclass(frozen=True, slots=True)
class _Scene:
    """The root's PID; what is asked before each checkpoint and after each restore, and when it is over: problems."""

    pid: int
    before: _Ask
    after: _Ask
    end: _Ask


def run(name: str, times: int = 20, *, seed: int = 1) -> dict[str, Any]:
    """{name, seed, code, legs: [{restores, problems}]}: all of it with one server."""
    file = STATE / f"restore-{name}-{seed}.json"
    identity = {"name": name, "times": times, "seed": seed, "code": code()}
    state: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if {key: state.get(key) for key in identity} != identity:
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {**identity, "legs": [_leg(name, times, f"{seed}/restore/{name}")]}
        file.write_text(json.dumps(state))
    leg = state["legs"][0]
    print(f"{name}: {len(leg['restores'])} restores; problems {leg['problems'] or 0}", flush=True)
    return state


def _leg(name: str, times: int, seed: str) -> dict[str, Any]:
    chance = random.Random(seed)
    done: list[dict[str, Any]] = []
    problems: list[str] = []
    with three_hosts() as hosts, tempfile.TemporaryDirectory(dir=hosts.net.directory) as folder:
        try:
            with _scene(name, hosts, Path(folder)) as scene:
                for number in range(times):
                    wrong = scene.before()
                    time.sleep(chance.uniform(0, LONGEST_PAUSE))
                    done.append(_through_a_file(hosts.source, scene.pid, Path(folder) / f"image{number}"))
                    problems += [f"restore {number + 1}: {problem}" for problem in wrong + scene.after()]
                problems += [f"at the end: {problem}" for problem in scene.end()]
        except (AssertionError, CommandFailed, OSError) as error:
            problems.append(f"{type(error).__name__}: {error}")
    return {"seed": seed, "restores": done, "problems": problems}


def _through_a_file(host: Host, pid: int, image: Path) -> dict[str, Any]:
    """Checkpoint and restore; what both told of the time. CommandFailed."""
    told: list[dict[str, Any]] = []
    for command in (["checkpoint", pid, "-o", image], ["restore", image]):
        status, summary, said = tcpmig(host, *command, timeout=120)
        if status != 0:
            raise CommandFailed(f"{command[0]} of pid {pid} ended with {status}: {summary} {said}")
        told.append(summary)
    image.unlink()
    made, back = told
    return {
        "checkpoint": {key: made[key] for key in _CHECKPOINT},
        "restore": {key: back[key] for key in _RESTORE},
    }


@contextlib.contextmanager
def _scene(name: str, hosts: ThreeHosts, folder: Path) -> Iterator[_Scene]:
    if name == "sshd":
        with _session(hosts, folder / "keys") as made:
            yield made
        return
    scene = {"redis": scenes.redis, "nginx": scenes.nginx}.get(name)
    with scenes.program(hosts, folder, name) if scene is None else scene(hosts, folder) as stage:

        def ask(word: str) -> list[str]:
            ask_all(stage.loads, word)
            return [f"{load.name}: {text}" for load in stage.loads for text in load.news()]

        yield _Scene(stage.pid, lambda: ask("before"), lambda: ask("after"), stage.finish)


@contextlib.contextmanager
def _session(hosts: ThreeHosts, folder: Path) -> Iterator[_Scene]:
    with logged_in(hosts, folder) as session:
        lines = iter(range(1 << 30))

        def look() -> list[str]:
            number = next(lines)
            session.person.type(f"line {number}\n", f"line {number}\r\nline {number}\r\n")
            return []

        def end() -> list[str]:
            session.person.type("\x1a", r"Stopped\s+cat\s+ready> ")
            session.person.type("echo it is $kept\n", "it is here\r\n")
            hosts.source.kill(session.pid, 9)
            return []

        session.person.type("cat\n", "cat\r\n")
        yield _Scene(session.pid, look, look, end)


def main() -> int:
    """0 if nothing was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.restores")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("names", nargs="*", help=f"default: {' '.join(NAMES)}")
    given = parser.parse_args()
    unknown = sorted({*given.names} - {*NAMES})
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}")
    states = [run(name, given.times, seed=given.seed) for name in given.names or NAMES]
    return 1 if any(leg["problems"] for state in states for leg in state["legs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
