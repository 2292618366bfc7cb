"""Programs that sleep for a relative time, in every call that there is for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from checkpoint.procfs import read_stat
from tests.tscnet import wait_until

__all__ = ["NS", "SLEEPS", "sleeping"]

HEAD = """
import ctypes, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
time = ctypes.create_string_buffer(struct.pack("<qq", 1000, 0), 16)
rest = ctypes.create_string_buffer(16)
word = ctypes.c_uint32(7)
fds = ctypes.create_string_buffer(struct.pack("<ihh", 0, 1, 0), 8)
print(1, flush=True)
"""
SLEEPS = {
    "nanosleep": "libc.syscall(35, time, None)",
    "nanosleep that writes the rest": "libc.syscall(35, time, rest)",
    "clock_nanosleep": "libc.syscall(230, 1, 0, time, None)",
    "clock_nanosleep by another clock": "libc.syscall(230, 7, 0, time, None)",
    "futex": "libc.syscall(202, ctypes.byref(word), 128, 7, time, None, 0)",
    "poll of nothing": "libc.syscall(7, None, 0, 1000000)",
    "poll": "libc.syscall(7, fds, 1, 1000000)",
}
NS = 10**9


@contextmanager
def sleeping(code: str) -> Iterator[int]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-ISc", HEAD + code], **pipes) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            wait_until(lambda: read_stat(process.pid).state == "S")
            yield process.pid
        finally:
            process.kill()
