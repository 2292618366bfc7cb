"""How mappings that cannot be moved show in smaps: one kind per test, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.errors import (
    DeviceMapping,
    HugePageMapping,
    Refused,
    SealedMapping,
    SecretMemory,
    UnsupportedMemory,
    UserfaultMapping,
)
from checkpoint.memory.verdicts import check, verdicts
from checkpoint.memory.vma import read_smaps
from checkpoint.verdict import Status

# `area()` is a private anonymous mapping that cannot be merged with others
PRELUDE = """
import ctypes, mmap, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.shmat.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
def call(nr, *args):
    result = libc.syscall(ctypes.c_long(nr), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def mapped(size=4096, prot=3, flags=0x22, fd=-1, offset=0):
    at = libc.mmap(None, size, prot, flags, fd, offset)
    if at in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return at
def area():
    at = mapped(3 * 4096, prot=0)
    libc.mprotect(ctypes.c_void_p(at + 4096), 4096, 3)
    return at + 4096
"""

KINDS: dict[str, tuple[type[Refused], str]] = {
    "secret memory": (SecretMemory, "fd = call(447, 0); os.ftruncate(fd, 4096); mapped(flags=1, fd=fd)"),
    "hugetlb": (
        HugePageMapping,
        "n = call(29, 0, 2 << 20, 0o1000 | 0o4000 | 0o10000 | 0o600); libc.shmat(n, None, 0); libc.shmctl(n, 0, None)",
    ),
    "userfaultfd": (
        UserfaultMapping,
        "u = call(323, 1); b = ctypes.create_string_buffer(struct.pack('<QQQ', 0xAA, 0, 0));"
        "assert libc.ioctl(u, ctypes.c_ulong(0xC018AA3F), b) == 0;"
        "r = ctypes.create_string_buffer(struct.pack('<QQQQ', area(), 4096, 1, 0));"
        "assert libc.ioctl(u, ctypes.c_ulong(0xC020AA00), r) == 0",
    ),
    "sealed": (SealedMapping, "call(462, area(), 4096, 0)"),
    "io_uring": (
        UnsupportedMemory,
        "p = ctypes.create_string_buffer(120); fd = call(425, 4, p); mapped(4096, flags=0x8001, fd=fd)",
    ),
    "ring of a socket": (
        UnsupportedMemory,
        "import socket; s = socket.socket(17, 3, 0); s.setsockopt(263, 5, struct.pack('IIII', 4096, 1, 2048, 2));"
        "mapped(4096, flags=1, fd=s.fileno())",
    ),
}


def told(code: str) -> tuple[list[tuple[Status, str]], set[str]]:
    """(verdicts as status and code, all flags) of a process that has run ``code``."""
    command = [sys.executable, "-c", f"{PRELUDE}\n{code}\nprint('ready', flush=True)\nsys.stdin.read()"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        flags = set().union(*(vma.flags for vma in read_smaps(process.pid)))
        return [(v.status, v.code) for v in verdicts(process.pid)], flags
    finally:
        process.communicate()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapping_that_cannot_be_moved_is_refused(kind: str) -> None:
    error, code = KINDS[kind]
    found, _ = told(code)
    assert found
    assert set(found) == {(Status.REFUSE, error.code)}


def test_an_ordinary_process_is_not_refused() -> None:
    assert told("area()")[0] == [(Status.OK, "")]


def test_memory_that_may_only_be_executed_is_not_refused_for_its_key() -> None:
    assert told("libc.mprotect(ctypes.c_void_p(area()), 4096, 4)")[0] == [(Status.OK, "")]


def test_droppable_memory_shows_as_dp() -> None:
    found, flags = told("mapped(flags=0x08 | 0x20)")
    assert "dp" in flags
    assert found == [(Status.OK, "")]


def test_memory_under_a_protection_key_is_refused() -> None:
    if "ospke" in Path("/proc/cpuinfo").read_text().split():
        found, _ = told("key = call(330, 0, 0); call(329, area(), 4096, 3, key)")
        assert set(found) == {(Status.REFUSE, UnsupportedMemory.code)}
    else:
        # such a CPU gives no key to anyone: there is only what smaps would say
        with pytest.raises(AssertionError):
            told("call(330, 0, 0)")
    ordinary = next(vma for vma in read_smaps(os.getpid()) if vma.name == "[heap]")
    with pytest.raises(UnsupportedMemory):
        check(os.getpid(), ordinary._replace(pkey=1))


def test_memory_of_a_device_shows_as_io_and_pf() -> None:
    # the kernel's own clock data are such memory, and the only one that every machine has
    data = next(vma for vma in read_smaps(os.getpid()) if vma.name == "[vvar]")
    assert {"io", "pf"} <= data.flags
    check(os.getpid(), data)
    with pytest.raises(DeviceMapping):
        check(os.getpid(), data._replace(name="/dev/some"))


def test_a_program_that_unmapped_its_own_file_is_refused() -> None:
    with subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()"], stdin=-1, stdout=-1) as other:
        assert other.stdout is not None
        other.stdout.readline()
        exe = os.readlink(f"/proc/{other.pid}/exe")
        smaps = read_smaps(other.pid)
        assert any(vma.name == exe for vma in smaps)
        found = verdicts(other.pid, [vma for vma in smaps if vma.name != exe])
        other.communicate(b"\n")
    assert [v.code for v in found] == [UnsupportedMemory.code]
