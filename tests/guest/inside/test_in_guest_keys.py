"""Protection keys, which this machine's CPU may not have: refused by name before the stop; those of the kernel's own
choice, for memory that may only be executed, are made again."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from checkpoint import preflight
from checkpoint.kernel import protkeys
from checkpoint.verdict import Status
from tests.tscnet import wait_until

HEAD = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.mmap.restype = ctypes.c_void_p
def call(number, *args):
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) for a in args))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
page = libc.mmap(None, ctypes.c_size_t(4096), 3, 0x22, -1, ctypes.c_long(0))
ALLOC, FREE, PROTECT = 330, 331, 329
"""
TAIL = """
print(page, flush=True)
sys.stdin.readline()
print("on", flush=True)
sys.stdin.readline()
"""


def program(source):
    argv = [sys.executable, "-ISc", HEAD + source + TAIL]
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return process, int(process.stdout.readline())


def refused(pid):
    return [(verdict.code, verdict.text) for verdict in preflight.check([pid]) if verdict.status is Status.REFUSE]


def end(process):
    with process:
        process.stdin.write("\n\n")
        process.stdin.flush()
        assert process.stdout.readline() == "on\n"


def key_of(pid, page):
    found = re.search(rf"^{page:x}-.*?^ProtectionKey: +(\d+)$", Path(f"/proc/{pid}/smaps").read_text(), re.M | re.S)
    return int(found[1])


def test_this_machine_has_keys():
    assert protkeys.machine_has_keys()
    assert protkeys.allocated(os.getpid()) == frozenset()


def test_memory_with_a_key():
    process, page = program("key = call(ALLOC, 0, 0); call(PROTECT, page, 4096, 3, key)")
    assert key_of(process.pid, page) == 1
    found = [text for code, text in refused(process.pid) if code == "TM-0370"]
    assert sorted(found) == ["memory with protection key 1", "protection keys are allocated: 1"]
    end(process)


def test_keys_that_no_memory_has():
    process, page = program("keys = [call(ALLOC, 0, 0) for _ in range(3)]; call(FREE, keys[1])")
    assert key_of(process.pid, page) == 0
    assert ("TM-0370", "protection keys are allocated: 1, 3") in refused(process.pid)
    end(process)


def test_memory_that_may_only_be_executed(tmp_path):
    """Checked, and through a file: the kernel chooses a key for it once more."""
    told, null = tmp_path / "page", subprocess.DEVNULL
    source = f"call(10, page, 4096, 4); open({str(told)!r}, 'w').write(str(page)); import time; time.sleep(1000)"
    process = subprocess.Popen([sys.executable, "-ISc", HEAD + source], stdin=null, stdout=null, stderr=null)
    wait_until(lambda: told.exists() and told.read_text().isdecimal())
    page, image = int(told.read_text()), tmp_path / "image"
    assert key_of(process.pid, page) == 1
    assert refused(process.pid) == []
    for command in (["checkpoint", str(process.pid), "-o", image], ["restore", image]):
        done = subprocess.run([sys.executable, "-m", "cli.main", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        process.poll()
    assert key_of(process.pid, page) == 1
    assert protkeys.allocated(process.pid) == frozenset()
    os.kill(process.pid, signal.SIGKILL)
