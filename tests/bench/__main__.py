"""All measurements, one after the other: ``python -m tests.bench [NAME ...] [--quick] [--resume]`` (as root).

Each prints its table, with its floor beside it (the same calls in C, memcpy, a plain write, a plain line), measured in
the same run. Tables, rows (JSON) and pictures (SVG) of a whole run go to docs/bench; of some that are named, or with
--quick, which is for a look, to build/bench. Rows are kept as they come: a run that was ended goes on with --resume, as
long as the commit is the same. Nothing is judged by these figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import criu, plots
from tests.bench.results import VARIABLE, Row, note, read

ROOT = Path(__file__).parents[2]
ROOMS = ("tcpstate", "checkpoint", "migrate", "cli")
#: the tables of a run that is about the run itself
_RUN, _TEXT = "run", "text"


@dataclass(frozen=True, slots=True)
class Bench:
    """One of them: tests/bench/bench_NAME.py.

    title        what it shows
    full, quick  its arguments
    plots        the tables that are drawn
    """

    title: str
    full: tuple[str, ...]
    quick: tuple[str, ...]
    plots: tuple[str, ...] = ()


ALL: Mapping[str, Bench] = {
    "startup": Bench("The command line", ("10",), ("3",), ("startup",)),
    "stop": Bench("The stop of a small server, step by step", ("50",), ("5",), ("stop", "steps")),
    "many": Bench("The stop by the number of connections", ("0", "100", "1000", "10000"), ("0", "1000"), ("many",)),
    "descriptors": Bench(
        "The stop by the number of open files", ("0", "100", "1000", "4000"), ("0", "1000"), ("descriptors",)
    ),
    "threads": Bench("The stop by the number of threads", ("1", "100", "300", "1000"), ("1", "100"), ("threads",)),
    "connections": Bench("Freeze, export and rebuild beside C", ("1000", "10000"), ("1000",), ("connections",)),
    "precopy": Bench("The stop by memory and by how fast it is written", ("1024", "8192"), ("64",), ("precopy",)),
    "lazy": Bench("The first answer after a restore", ("256", "1024", "4096"), ("256",), ("lazy",)),
    "files": Bench("To a file, out of it, and over the line", ("1024",), ("128",), ("files",)),
    "forward": Bench("Connections that the source forwards", ("1024",), ("64",), ("forward",)),
    "tree": Bench("Trees of many processes", ("10", "100"), ("10",), ("tree",)),
    "memory": Bench("Copying pages out of a process and into one", ("1024",), ("128",)),
    "splice": Bench("Memory to a line and to a file, read or spliced", ("512",), ("64",)),
    "image": Bench("The image container", ("256",), ("64",)),
    "softstate": Bench("What learned state is worth", ("2",), ("1",)),
}


def run(name: str, arguments: Sequence[str]) -> tuple[str, int]:
    """What one printed, which is shown as it comes, and its exit status."""
    argv = [sys.executable, "-m", f"tests.bench.bench_{name}", *arguments]
    printed = []
    with subprocess.Popen(
        argv, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            printed.append(line)
    return "".join(printed), process.returncode


def machine() -> Row:
    """What the figures are of."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    return {
        "commit": commit.stdout.strip(),
        "kernel": platform.release(),
        "processors": f"{os.cpu_count()} x {model or platform.machine()}",
        "memory_mib": memory,
        "criu": criu.lacking() or "measured",
    }


def begun(rows: Path, what: Row, *, resume: bool) -> None:
    """Keep what is there of the same commit and size, if that is asked for; else begin anew."""
    before = read(rows).get(_RUN, [])
    if not (resume and before and all(before[-1].get(key) == value for key, value in what.items())):
        rows.unlink(missing_ok=True)
        note(_RUN, **what, date=time.strftime("%F"))


def written(folder: Path, rows: Path, given: str, names: Sequence[str]) -> None:
    """README.md, results.json and the pictures."""
    found = read(rows)
    about, texts = found[_RUN][-1], {row["name"]: row["text"] for row in found.get(_TEXT, [])}
    drawn = plots.draw(found, folder)
    parts = [
        f"# Measurements\n\n`python -m tests.bench{given}` at {about['commit']}, Linux {about['kernel']}, "
        f"{about['processors']}, {about['memory_mib']} MiB, {about['date']}. Nothing is judged by these figures: they "
        "are one machine's, of one day. The rows are in [results.json](results.json).\n"
        + (f"\nCRIU: {about['criu']}.\n" if about["criu"] != "measured" else "")
    ]
    for name in names:
        if name in texts:
            parts.append(f"## {ALL[name].title}\n\n`tests/bench/bench_{name}.py`\n\n```\n{texts[name].rstrip()}\n```\n")
            parts += [f"![{table}]({table}.svg)\n" for table in ALL[name].plots if f"{table}.svg" in drawn]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")
    kept = {table: some for table, some in found.items() if table != _TEXT}
    (folder / "results.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """The exit status: 1 if one of them broke."""
    about = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=about)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(ALL)}; all if none is named")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer moves: a look, in minutes")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was ended")
    parser.add_argument("--output", type=Path, help="where tables, rows and pictures go")
    given = parser.parse_args()
    unknown = set(given.names) - set(ALL)
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    names = given.names or list(ALL)
    look = "-quick" * given.quick + "-some" * bool(given.names)
    folder: Path = given.output or ROOT / ("build/bench" if look else "docs/bench")
    folder.mkdir(parents=True, exist_ok=True)
    (ROOT / "build").mkdir(exist_ok=True)
    rows = ROOT / f"build/bench{look}.rows"
    os.environ[VARIABLE] = str(rows)
    # as an installed program is: a checkout may have no compiled modules, and each command would compile them all
    subprocess.run([sys.executable, "-m", "compileall", "-q", *ROOMS], cwd=ROOT, check=True)
    begun(rows, machine() | {"quick": given.quick}, resume=given.resume)
    broken = []
    for name in names:
        print(f"\n== {ALL[name].title} (bench_{name})", flush=True)
        done = [row for row in read(rows).get(_TEXT, []) if row["name"] == name]
        if done:
            print(done[-1]["text"], end="")
            continue
        began = time.monotonic()
        text, status = run(name, ALL[name].quick if given.quick else ALL[name].full)
        print(f"({time.monotonic() - began:.0f} s)", flush=True)
        if status:
            broken.append(name)
            print(f"bench_{name} ended with status {status}", file=sys.stderr)
        else:
            note(_TEXT, name=name, text=text)
    options = "".join(f" {word}" for word in [*given.names, *["--quick"] * given.quick])
    written(folder, rows, options, list(ALL))
    print(f"\nwritten to {folder}")
    if criu.lacking():
        print(f"CRIU: {criu.lacking()}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
