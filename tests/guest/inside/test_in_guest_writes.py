"""Which pages were written, by soft-dirty bits: this kernel has no asynchronous write protection."""

import ctypes
import mmap
import os
import subprocess
import sys

import pytest

from checkpoint import births
from checkpoint.kernel import pagemap
from checkpoint.kernel.mman import droppable_known
from checkpoint.memory import softdirty, tracking
from checkpoint.memory.vma import PAGE

PAGES = 16
#: obeys words on its standard input: maps memory, writes, reads and gives back pages of it
PROGRAM = f"""
import ctypes, mmap, sys
area = mmap.mmap(-1, {PAGES * PAGE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
for line in sys.stdin:
    word, page = line.split()
    at = int(page) * {PAGE}
    if word == "write":
        area[at] = 1
    elif word == "read":
        area[at]
    else:
        area.madvise(mmap.MADV_DONTNEED, at, {PAGE})
    print("done", flush=True)
"""


class Other:
    """Another process, and its tracking."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.start = int(self.process.stdout.readline())
        self.end = self.start + PAGES * PAGE
        self.track = softdirty.Tracking(self.process.pid)

    def tell(self, word, *pages):
        for page in pages:
            self.process.stdin.write(f"{word} {page}\n")
            self.process.stdin.flush()
            assert self.process.stdout.readline() == "done\n"

    def pages(self, runs):
        return [page for a, b in runs for page in range((a - self.start) // PAGE, (b - self.start) // PAGE)]

    def protect(self):
        # it waits for a word: nobody writes
        self.track.look()
        found = self.track.protect(self.start, self.end, anonymous=True)
        return self.pages(found.full), self.pages(found.empty)

    def written(self):
        found = self.track.written(self.start, self.end, anonymous=True)
        return self.pages(found.full), self.pages(found.empty)


@pytest.fixture
def other():
    made = Other()
    yield made
    made.track.close()
    made.process.kill()
    made.process.communicate()


def test_this_kernel_has_only_the_bits():
    assert "PAGEMAP_SCAN" in tracking.available() or "userfaultfd" in tracking.available()
    assert softdirty.available() == ""
    assert not droppable_known()
    assert not births.threads_go_on()


def test_rounds_tell_what_was_written(other):
    other.tell("write", 1, 2, 9)
    other.track.look()
    other.track.add(other.start, other.end)
    assert other.protect() == ([1, 2, 9], [])
    assert other.protect() == ([], [])
    other.tell("write", 2, 3)
    assert other.written() == ([2, 3], [])
    assert other.protect() == ([2, 3], [])
    assert other.written() == ([], [])


def test_what_was_given_back_and_what_is_read_in_its_place(other):
    other.tell("write", 4, 5, 6)
    other.track.look()
    other.track.add(other.start, other.end)
    other.protect()
    other.tell("give-back", 4, 5)
    other.tell("read", 5)
    assert other.written() == ([], [4, 5])
    assert other.protect() == ([], [4, 5])
    other.tell("write", 5)
    assert other.written() == ([5], [])


def test_the_zero_page_is_not_a_page_of_its_own():
    with mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_NOHUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        assert area[0] == area[PAGE] == 0
        area[2 * PAGE] = 1
        fd = os.open("/proc/self/pagemap", os.O_RDONLY)
        found = list(pagemap.entries(fd, start, start + PAGES * PAGE, with_file=False))
        os.close(fd)
        assert found == [(start + 2 * PAGE, start + 3 * PAGE)]
