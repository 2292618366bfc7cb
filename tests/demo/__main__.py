"""python -m tests.demo: see --help. As root."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.demo.show import COLUMNS, say, show
from tests.hosts import CommandFailed, ThreeHosts, three_hosts
from tests.workloads import scenes
from tests.workloads.move import Mover, MoveReport, Stage, by_tcpmig, pretend


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One server with its clients."""

    title: str
    scene: Callable[[ThreeHosts, Path, argparse.Namespace, Mover], contextlib.AbstractContextManager[Stage]]


PARTS = {
    "redis": Part(
        "redis-server under pipelines, waiting and new connections",
        lambda hosts, folder, given, mover: scenes.redis(hosts, folder, megabytes=given.megabytes, mover=mover),
    ),
    "http": Part(
        "python3 -m http.server, a big file to curl",
        lambda hosts, folder, given, mover: scenes.http(
            hosts, folder, megabytes=20 * (4 + 4 * given.moves), rate=20, mover=mover
        ),
    ),
    "nginx": Part(
        "nginx, master and workers, keep-alive clients",
        lambda hosts, folder, given, mover: scenes.nginx(hosts, folder, mover=mover),
    ),
    "echo": Part(
        "echo server, a message every millisecond",
        lambda hosts, folder, given, mover: scenes.echo(hosts, folder, mover=mover),
    ),
    "stream": Part(
        "random streams both ways at full speed, every byte checked",
        lambda hosts, folder, given, mover: scenes.stream(hosts, folder, mover=mover),
    ),
}


def main() -> int:
    """0 if nobody noticed anything."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.demo",
        description="Move real servers between two hosts (of namespaces, on this machine) while clients in a third one "
        "check every reply. Exit status 0: nobody noticed.",
        epilog="; ".join(f"{heading}: {meaning}" for heading, meaning in COLUMNS if meaning),
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: redis http nginx")
    parser.add_argument("--moves", type=int, default=2, help="moves of each server; the second goes back (%(default)s)")
    parser.add_argument("--megabytes", type=int, default=50, help="data in redis (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line instead of tables")
    parser.add_argument(
        "--pretend", type=float, metavar="MS", help="do not migrate: stop the server for MS milliseconds"
    )
    parser.add_argument(
        "--option", action="append", default=[], help="a further argument of tcpmig migrate; repeatable"
    )
    given = parser.parse_args()
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if os.geteuid() != 0:
        say("The demo makes hosts of namespaces: run it as root (sudo make demo).")
        return 2
    mover = by_tcpmig(*given.option) if given.pretend is None else pretend(given.pretend)
    results = [play(name, given, mover) for name in given.parts or ["redis", "http", "nginx"]]
    if given.json:
        say(json.dumps({"parts": results}))
    bad = [result["part"] for result in results if result["problems"]]
    if not given.json:
        say("\nNobody noticed." if not bad else f"\nNot as it should be: {', '.join(bad)}.")
    return 1 if bad else 0


def play(name: str, given: argparse.Namespace, mover: Mover) -> dict[str, Any]:
    """One part on hosts of its own; what came of it."""
    part = PARTS[name]
    reports: list[MoveReport] = []
    problems: list[str] = []
    with three_hosts() as hosts, tempfile.TemporaryDirectory(dir=hosts.net.directory) as folder:
        try:
            with part.scene(hosts, Path(folder), given, mover) as stage:
                for number in range(given.moves):
                    report = stage.move()
                    reports.append(report)
                    problems += [f"move {number + 1}: {problem}" for problem in report.problems]
                problems += [f"at the end: {problem}" for problem in stage.finish()]
        except CommandFailed as error:
            problems.append(str(error))
    if not given.json:
        show(part.title, reports, problems)
        for report in reports:
            if report.log:
                say(report.log)
    return {"part": name, "moves": [report.json() for report in reports], "problems": problems}


if __name__ == "__main__":
    sys.exit(main())
