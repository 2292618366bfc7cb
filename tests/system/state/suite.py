"""Runs cases of the suite: a tree of them in a test host, three cycles at random moments, then each verifies itself.

Seen from the test.  What is random comes from a seed, which stands in every message.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.hosts import Host
from tests.hosts.host import ROOT
from tests.system.state.case import Case
from tests.system.state.control import GO, PASSED, QUIT, READY, Control
from tests.system.state.hugepool import Pool

__all__ = ["CYCLES", "Bench", "bench", "build"]

CYCLES = 3
#: how long the processes run, at most, before each cycle
LONGEST_RUN = 0.03
#: a SIGSTOP is queued to what is restored until it is let go
_STOP_BIT = 1 << 18
_PENDING = re.compile(r".*/status/(SigPnd|ShdPnd): '(\w+)' -> '(\w+)'")
_TIMEOUT = 60.0
_PROGRAMS = Path(__file__).parent / "programs"


def build(folder: Path) -> Path:
    """The programs in C of the suite, compiled; beside the checkout's other build products, by content."""
    folder.mkdir(parents=True, exist_ok=True)
    header = (_PROGRAMS / "case.h").read_bytes()
    for source in sorted(_PROGRAMS.glob("*.c")):
        mark = folder / f".{source.stem}-{hashlib.sha256(header + source.read_bytes()).hexdigest()[:16]}"
        if not mark.exists():
            command = ["gcc", "-O1", "-Wall", "-Werror", "-pthread", "-o", str(folder / source.stem), str(source)]
            subprocess.run(command, check=True)
            mark.touch()
    return folder


class Bench:
    """A test host with a cycler in it.

    whole  compare also the bytes of files that are only mapped: slow
    """

    def __init__(self, host: Host, folder: Path, *, whole: bool = False) -> None:
        self.whole = whole
        self.host = host
        self.folder = folder
        self.programs = build(ROOT / "build" / "state")
        self._pool = Pool()
        # terminals of its own: those of the machine are numbered by everybody
        host.sh("mount -t devpts -o newinstance,ptmxmode=666,mode=620 none /dev/pts")
        command = [sys.executable, "-m", "tests.system.state.cycler"]
        self._log = (folder / "cycler.log").open("wb")
        self._cycler = host.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, cwd=ROOT)
        self._kept = {*host.processes(), self._cycler.pid}
        self._count = 0

    def close(self) -> None:
        self._cycler.close()
        self._pool.close()
        self._log.close()

    def cycle(
        self, pid: int, without: Sequence[str] = (), external: Sequence[str] = (), ship: Sequence[str] = ()
    ) -> dict[str, Any]:
        """One checkpoint and one restore; what the cycler says."""
        process = self._cycler
        assert process.stdin is not None
        assert process.stdout is not None
        order = {
            "pid": pid,
            "image": str(self.folder / "image"),
            "without": list(without),
            "whole": self.whole,
            "external": list(external),
            "ship": list(ship),
        }
        process.stdin.write(json.dumps(order).encode() + b"\n")
        line = b""
        while not line.endswith(b"\n"):
            piece = os.read(process.stdout.fileno(), 1 << 20)
            if not piece:
                raise AssertionError(f"the cycler ended: {(self.folder / 'cycler.log').read_text()}")
            line += piece
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(
        self,
        cases: Sequence[Case],
        *,
        seed: str,
        cycles: int = CYCLES,
        without: Sequence[str] = (),
        compare: bool = True,
    ) -> dict[str, list[str]]:
        """Problems of each case, by name.

        without  modules that do nothing
        compare  what /proc and memory show, before and after, must be the same; else only the cases' own word counts
        """
        chance = random.Random(seed)
        self._count += 1
        folder = self.folder / f"run-{self._count}"
        folder.mkdir()
        control = Control(folder / "control", len(cases))
        names = [case.name for case in cases]
        command = [sys.executable, "-S", Path(__file__).parent / "runner.py", folder / "control", folder, self.programs]
        log = (folder / "log").open("wb")
        with log, self.host.popen([*command, *names], stdout=subprocess.DEVNULL, stderr=log) as root:
            try:
                problems = self._run(cases, control, root.pid, cycles, chance, list(without), compare)
                return {name: [f"seed {seed}: {one}" for one in found] for name, found in problems.items()}
            finally:
                control.order = QUIT
                self._clear()

    def _run(
        self,
        cases: Sequence[Case],
        control: Control,
        root: int,
        cycles: int,
        chance: random.Random,
        without: list[str],
        compare: bool,
    ) -> dict[str, list[str]]:
        problems: dict[str, list[str]] = {case.name: [] for case in cases}
        slots = range(len(cases))
        _wait(lambda: all(control.state(slot) for slot in slots))
        unready = [(slot, case) for slot, case in enumerate(cases) if control.state(slot) != READY]
        for slot, case in unready:
            problems[case.name].append(f"set-up: {control.text(slot)}")
        if unready:
            return problems
        for number in range(cycles):
            time.sleep(chance.uniform(0, LONGEST_RUN))
            external = [rule for case in cases for rule in case.external]
            ship = [name for case in cases for name in case.ship]
            told = self.cycle(root, without, external, ship)
            where = f"cycle {number + 1}"
            if "error" in told:
                for case in cases:
                    problems[case.name].append(f"{where}: {told['error']}")
                return problems
            expected = [pattern for case in cases for pattern in case.differs]
            for line in told["differs"] if compare else ():
                if not _expected(line, expected):
                    for case in cases:
                        problems[case.name].append(f"{where}: {line}")
        control.order = GO
        with contextlib.suppress(TimeoutError):
            _wait(lambda: all(control.state(slot) not in (0, READY) for slot in slots))
        for slot, case in enumerate(cases):
            if control.state(slot) != PASSED:
                problems[case.name].append(control.text(slot) or "it says nothing")
        return problems

    def _clear(self) -> None:
        """End all that the run has left in the host."""
        end = time.monotonic() + _TIMEOUT
        while True:
            left = [pid for pid in self.host.processes() if pid not in self._kept]
            if not left:
                return
            if time.monotonic() > end:
                raise AssertionError(f"processes {left} do not end")
            self.host.run(["kill", "-9", *left], check=False)
            self._kept &= set(self.host.processes())


def _expected(line: str, patterns: Sequence[str]) -> bool:
    pending = _PENDING.fullmatch(line)
    if pending is not None and int(pending[2], 16) ^ int(pending[3], 16) == _STOP_BIT:
        return True
    return any(re.search(pattern, line) for pattern in patterns)


def _wait(condition: Any) -> None:
    end = time.monotonic() + _TIMEOUT
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the cases do not answer")
        time.sleep(0.002)


@contextlib.contextmanager
def bench(host: Host, *, whole: bool = False) -> Iterator[Bench]:
    """A bench in a host, with a folder that all see."""
    with tempfile.TemporaryDirectory(prefix="tcpmig-state-") as name:
        made = Bench(host, Path(name), whole=whole)
        try:
            yield made
        finally:
            made.close()
