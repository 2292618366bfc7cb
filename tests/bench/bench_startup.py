"""What the command line costs: ``python -m tests.bench.bench_startup [TIMES]`` (as root; 20).

``tcpmig --help``, and checkpoint and restore of a process with 10 MB as whole commands, to /dev/shm.  The floors: the
interpreter that does nothing; the same with click, which every command takes; a plain write of the image's bytes.
CRIU beside it, if there is one that works.  Nothing is judged by the clock.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench import criu, floors
from tests.bench.results import Row, measured, spread
from tests.bench.subject import TCPMIG, command, own_directories, subject

TIMES = 20
MIB = 10
PYTHON = sys.executable


def seconds(argv: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def several(times: int, work: Callable[[], float]) -> Row:
    """Milliseconds; the first time, which fills caches, does not count."""
    work()
    return spread([1e3 * work() for _ in range(times)])


def show(row: Row) -> None:
    print(f"{row['what']:52s} {row['median']:8.1f} {row['min']:8.1f} {row['max']:8.1f}", flush=True)


def starts(times: int) -> None:
    for what, argv in (
        ("floor: python3 -IS -c pass", [PYTHON, "-IS", "-c", "pass"]),
        ("floor: python3 -c 'import click'", [PYTHON, "-c", "import click"]),
        ("tcpmig --help", [*TCPMIG, "--help"]),
    ):
        show(measured("startup", {"what": what}, lambda argv=argv: several(times, lambda: seconds(argv))))  # type: ignore[misc]


def commands(times: int, folder: Path) -> None:
    image, size = folder / "image", MIB << 20

    def plain() -> float:
        return size / floors.write_rate(folder / "plain", size) / 1e9

    with subject(MIB, folder) as one:

        def checkpoint() -> float:
            return command("checkpoint", one.pid, "-R", "-o", image)[0]

        def restore() -> float:
            command("checkpoint", one.pid, "-o", image)
            one.ended()
            return command("restore", image)[0]

        works = {
            f"floor: plain write of {MIB} MB": plain,
            f"tcpmig checkpoint -R of {MIB} MB": checkpoint,
            f"tcpmig restore of {MIB} MB": restore,
        }
        for what, work in works.items():
            show(measured("startup", {"what": what}, lambda work=work: several(times, work)))  # type: ignore[misc]
        if criu.lacking():
            print(f"({criu.lacking()}: nothing to compare with)")
            return
        for place, what in enumerate(("criu dump", "criu restore")):
            numbers = itertools.count()

            def theirs(place: int = place, what: str = what, numbers: Iterator[int] = numbers) -> float:
                return criu.dump_and_restore(one.pid, folder / f"{what} {next(numbers)}", one.ended)[place]

            name = f"{what} of {MIB} MB"
            show(measured("startup", {"what": name}, lambda work=theirs: several(times, work)))  # type: ignore[misc]


def main() -> None:
    """The table."""
    times = int(sys.argv[1]) if len(sys.argv) > 1 else TIMES
    print(f"{'ms':52s} {'median':>8s} {'min':>8s} {'max':>8s}")
    starts(times)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, own_directories(Path(name)):
        commands(times, Path(name))


if __name__ == "__main__":
    main()
