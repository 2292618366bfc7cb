"""CRIU beside it, where one is installed and works on this kernel."""

from __future__ import annotations

import functools
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["dump_and_restore", "lacking"]


@functools.cache
def lacking() -> str:
    """Why there is nothing to compare with; empty if there is. Asked of the program itself: ``criu check``."""
    if shutil.which("criu") is None:
        return "criu is not on PATH"
    done = subprocess.run(["criu", "check"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        return f"the criu on PATH does not run here: {words[-1] if words else f'status {done.returncode}'}"
    return ""


def dump_and_restore(pid: int, folder: Path, ended: Callable[[], object]) -> tuple[float, float]:
    """Seconds of `criu dump` of a process, whose end ``ended`` waits for, and of `criu restore`, as whole commands."""
    folder.mkdir()
    common = ["-D", str(folder), "--shell-job", "-v0"]
    began = time.perf_counter()
    subprocess.run(["criu", "dump", "-t", str(pid), *common], stdin=subprocess.DEVNULL, check=True)
    dumped = time.perf_counter() - began
    ended()
    began = time.perf_counter()
    subprocess.run(["criu", "restore", "-d", *common], stdin=subprocess.DEVNULL, check=True)
    return dumped, time.perf_counter() - began
