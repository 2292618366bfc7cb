"""A process with so much memory and nothing else, on this host, and tcpmig's commands on it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Subject", "command", "own_directories", "subject"]

TCPMIG = [sys.executable, "-m", "cli.main"]
_NULL = subprocess.DEVNULL
_HOLDER = """
import mmap, random, sys, time
size = int(sys.argv[1]) << 20
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
block = random.Random(1).randbytes(1 << 20)
for at in range(0, size, len(block)):
    memory[at : at + len(block)] = block
    memory[at : at + 8] = at.to_bytes(8, "little")
open(sys.argv[2], "w").close()
while True: time.sleep(3600)
"""


class Subject:
    """One process; its number stays the same over dump and restore."""

    def __init__(self, mib: int, mark: Path) -> None:
        argv = [sys.executable, "-IS", "-c", _HOLDER, str(mib), str(mark)]
        self._process = subprocess.Popen(argv, stdin=_NULL, stdout=_NULL, stderr=_NULL, start_new_session=True)
        self.pid = self._process.pid
        while not mark.exists():
            if self._process.poll() is not None:
                raise RuntimeError("the process that was to be measured has ended")
            time.sleep(0.01)
        mark.unlink()

    def ended(self) -> None:
        """Wait until it is gone: whoever is its parent has reaped it."""
        if self._process.returncode is None:
            self._process.wait()
        while os.path.exists(f"/proc/{self.pid}"):
            time.sleep(0.002)

    def kill(self) -> None:
        """End it, wherever it came from."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.ended()


@contextlib.contextmanager
def subject(mib: int, folder: Path) -> Iterator[Subject]:
    """A process with ``mib`` MiB of bytes that do not repeat."""
    one = Subject(mib, folder / "ready")
    try:
        yield one
    finally:
        one.kill()


@contextlib.contextmanager
def own_directories(folder: Path) -> Iterator[None]:
    """tcpmig keeps its state there, not with this machine's own."""
    kept = {name: os.environ.get(name) for name in ("TCPMIG_STATE_DIR", "TCPMIG_RUNTIME_DIR")}
    # a short path: sockets are in it
    with tempfile.TemporaryDirectory(dir=folder, prefix="d") as name:
        os.environ["TCPMIG_STATE_DIR"], os.environ["TCPMIG_RUNTIME_DIR"] = f"{name}/s", f"{name}/r"
        try:
            yield
        finally:
            for variable, value in kept.items():
                if value is None:
                    os.environ.pop(variable, None)
                else:
                    os.environ[variable] = value


def command(*arguments: object) -> tuple[float, dict[str, Any]]:
    """Seconds that a command of tcpmig took as a whole, and what it told."""
    began = time.perf_counter()
    argv = [*TCPMIG, *map(str, arguments), "--json"]
    done = subprocess.run(argv, stdin=_NULL, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return took, told
