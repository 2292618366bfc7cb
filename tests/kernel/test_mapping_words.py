"""The flags word of a mapping: a BPF iterator tells it, and smaps gives one set of names to one word."""

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.inject import Injection
from checkpoint.kernel import vmaiter
from checkpoint.kernel.mman import Advice
from checkpoint.memory import layout, vma, vmflags
from checkpoint.memory.vma import PAGE, VSYSCALL
from checkpoint.tracee import Tree
from tcpstate.kernel.calls import CallTable

libc = ctypes.CDLL(None, use_errno=True)


def place_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@pytest.fixture
def child() -> Iterator[int]:
    """A process that stands still."""
    with subprocess.Popen([sys.executable, "-IS", "-c", "input()"], stdin=subprocess.PIPE) as process:
        while Path(f"/proc/{process.pid}/wchan").read_text() not in ("pipe_read", "anon_pipe_read"):
            assert process.poll() is None
        yield process.pid
        process.kill()


def test_there_is_a_word_for_each_mapping_but_the_vsyscall_page(child: int) -> None:
    words = vmaiter.words(child)
    assert words is not None
    assert set(words.flags) == {(v.start, v.end) for v in vma.read_maps(child) if v.name != VSYSCALL}


MANY = """
import mmap, sys
kept = []
while sum(1 for _ in open("/proc/self/maps")) - 1 < int(sys.argv[1]):
    # neighbours differ, and are not put together
    kept.append(mmap.mmap(-1, mmap.PAGESIZE, prot=(1, 3)[len(kept) % 2]))
print("there", flush=True)
input()
"""


@pytest.mark.parametrize("count", [1000, 1022, 1023, 1024, 1500, 2046, 2047, 3000])
def test_many_mappings_are_told_once(count: int) -> None:
    """One read brings 1,023 of them; behind the last ones the iterator begins those of the last read again."""
    argv = [sys.executable, "-IS", "-c", MANY, str(count)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        while Path(f"/proc/{process.pid}/wchan").read_text() not in ("pipe_read", "anon_pipe_read"):
            assert process.poll() is None
        words = vmaiter.words(process.pid)
        assert words is not None
        found = {(v.start, v.end) for v in vma.read_maps(process.pid) if v.name != VSYSCALL}
        assert set(words.flags) == found
        assert len(found) >= count
        process.kill()


def test_one_word_has_one_set_of_names(child: int) -> None:
    words = vmaiter.words(child)
    assert words is not None
    names: dict[int, object] = {}
    for each in vma.read_smaps(child):
        if each.name != VSYSCALL:
            told = each.flags, each.pkey
            assert names.setdefault(words.flags[each.start, each.end], told) == told


def test_the_same_is_told_as_by_smaps(child: int) -> None:
    assert vmflags.foresee(child) == vma.foresee(child)
    # with nothing to learn any more, and going on from what was told
    again = vmflags.foresee(child, vmflags.foresee(child))
    assert again == vma.foresee(child)


def test_a_zombie_has_none() -> None:
    with subprocess.Popen([sys.executable, "-IS", "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert vma.lines(process.pid) == []
        assert vmflags.foresee(process.pid) == vma.foresee(process.pid) == {}


@pytest.mark.parametrize("advice", ["DONTDUMP", "WIPEONFORK", "NOHUGEPAGE"])
def test_what_splits_no_mapping_is_noticed(advice: str) -> None:
    """smaps that was read before does not know of it, and the line in maps is the same as before."""
    with mmap.mmap(-1, 16 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        start = place_of(memory)
        # with guards beside it, it is no neighbour's part
        assert libc.mprotect(ctypes.c_void_p(start), PAGE, 0) == 0
        assert libc.mprotect(ctypes.c_void_p(start + 15 * PAGE), PAGE, 0) == 0
        before = vmflags.foresee(os.getpid())
        number = int(getattr(Advice, advice))
        assert libc.madvise(ctypes.c_void_p(start + PAGE), ctypes.c_size_t(14 * PAGE), number) == 0
        (old,) = (v for v in before.values() if v.start == start + PAGE)
        (now,) = (v for v in vmflags.mappings(os.getpid(), before)[0] if v.start == start + PAGE)
        (true,) = (v for v in vma.read_smaps(os.getpid()) if v.start == start + PAGE)
        assert now.key == old.key
        assert now == true
        assert now.flags != old.flags


def test_nothing_of_a_process_that_has_ended() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert vmaiter.words(process.pid) == ({}, 0)


def test_the_end_of_the_heap_is_told(child: int) -> None:
    """As brk(2), called in the process itself, tells it."""
    words = vmaiter.words(child)
    assert words is not None
    tree = Tree.stop([child])
    try:
        with Injection(tree.processes[0]) as injection:
            calls = CallTable()
            brk = layout.query_brk(calls)
            injection.run({child: calls})
    finally:
        tree.resume()
    assert words.brk == brk.value > 0


def test_without_iterators_the_process_is_asked_for_the_end_of_its_heap(child: int) -> None:
    words = vmaiter.words(child)
    assert words is not None
    tree = Tree.stop([child])
    try:
        (process,) = tree.processes
        assert not process.foreseen
        assert process.brk is None
        assert layout.brk_of(process) == words.brk
    finally:
        tree.resume()
