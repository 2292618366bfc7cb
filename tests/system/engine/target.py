"""Programs that check themselves, as targets of the engine."""

from __future__ import annotations

import functools
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Self

from checkpoint.tracee import Tree

HERE = Path(__file__).parent
WORDS = struct.Struct("<qq")


@functools.cache
def program(name: str) -> Path:
    """The C program of that name, compiled once per test run."""
    out = Path(_build_directory()) / name
    subprocess.run(
        [
            "gcc",
            "-O1",
            "-mavx2",
            "-Wall",
            "-Werror",
            "-Wno-return-type",
            "-pthread",
            "-o",
            out,
            HERE / f"{name}.c",
            "-lm",
        ],
        check=True,
    )
    return out


@functools.cache
def _build_directory() -> str:
    keep = tempfile.TemporaryDirectory(prefix="tcpmig-engine-")
    _kept.append(keep)
    return keep.name


_kept: list[tempfile.TemporaryDirectory[str]] = []


class Target:
    """A running program that checks itself, and says in a file how it fares."""

    def __init__(self, name: str, directory: Path, *options: str) -> None:
        self.words = directory / f"{name}.words"
        self.process = subprocess.Popen([program(name), self.words, *options], start_new_session=True)
        self.pid = self.process.pid
        self.wait_progress(20)  # all its threads have begun

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def read(self) -> tuple[int, int]:
        try:
            data = self.words.read_bytes()
        except FileNotFoundError:
            data = b""
        progress, failed = WORDS.unpack(data[: WORDS.size].ljust(WORDS.size, b"\0"))
        return progress, failed

    @property
    def progress(self) -> int:
        return self.read()[0]

    def check(self) -> None:
        """It runs, and none of its own checks has failed."""
        assert self.process.poll() is None, f"it ended: {self.process.poll()}, check {self.read()[1]}"
        assert self.read()[1] == 0, f"its check {self.read()[1]} failed"

    def wait_progress(self, above: int, timeout: float = 20.0) -> None:
        """Until it has done more than ``above``."""
        end = time.monotonic() + timeout
        while self.progress <= above:
            assert self.process.poll() is None, f"it ended: {self.process.poll()}, check {self.read()[1]}"
            assert time.monotonic() < end, f"it stands still at {self.progress}"
            time.sleep(0.001)

    def goes_on(self) -> None:
        """It makes progress from now on, and finds itself whole."""
        self.wait_progress(self.progress + 1)
        self.check()


def python(source: str, *args: str) -> subprocess.Popen[str]:
    """A Python program that has printed its first line."""
    child = subprocess.Popen(
        [sys.executable, "-c", source, *args],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def end(child: subprocess.Popen[str]) -> None:
    """Kill it and its session's rest."""
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()


def state(pid: int) -> str:
    """The letter of its state."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def wait_state(pid: int, letters: str, timeout: float = 5.0) -> None:
    """Until it is in one of these states."""
    deadline = time.monotonic() + timeout
    while state(pid) not in letters:
        assert time.monotonic() < deadline, f"pid {pid} is in state {state(pid)}, not {letters}"
        time.sleep(0.002)


def outside_view(pid: int) -> dict[str, object]:
    """All that /proc shows of what injected calls could leave behind."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    tasks = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        status = (task / "status").read_text().splitlines()
        tasks[int(task.name)] = [line for line in status if line.startswith(("SigPnd", "Seccomp", "NoNew"))]
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {
        "maps": lines,
        "fds": sorted((int(fd.name), os.readlink(fd)) for fd in Path(f"/proc/{pid}/fd").iterdir()),
        "tasks": tasks,
        "signals": [line for line in status if line.startswith(("ShdPnd", "SigIgn", "SigCgt", "TracerPid"))],
        "timers": Path(f"/proc/{pid}/timers").read_text(),
    }


def wait_view(pid: int, expected: dict[str, object], *parts: str) -> None:
    """Until these parts of the outside view are as expected: threads may still be on their way home."""
    deadline = time.monotonic() + 5
    while True:
        now = outside_view(pid)
        if all(now[part] == expected[part] for part in parts):
            return
        assert time.monotonic() < deadline, {part: (now[part], expected[part]) for part in parts}
        time.sleep(0.002)


def masks(pid: int) -> list[int]:
    """The signals that its threads block, apart from the temporary masks of calls like ppoll."""
    tree = Tree.stop([pid])
    found = [thread.sigmask for thread in tree.processes[0].threads]
    tree.resume()
    return found


def vdso(pid: int) -> bytes:
    """The bytes of its vdso."""
    line = next(line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if line.endswith("[vdso]"))
    start, end_ = (int(text, 16) for text in line.split()[0].split("-"))
    with open(f"/proc/{pid}/mem", "rb") as memory:
        memory.seek(start)
        return memory.read(end_ - start)


def resume_stopped(pid: int) -> None:
    """SIGCONT."""
    os.kill(pid, signal.SIGCONT)


def as_tool(work: Callable[[], object]) -> int:
    """Do ``work`` in a process of its own; its wait status."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitpid(child, 0)[1]
