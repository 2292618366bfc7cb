"""GB/s of copying pages out of a process and into one, against memcpy: ``python -m tests.bench.bench_memory [MiB]``."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from checkpoint.image.frames import DATA_MAX, PageRun, Space, aligned_buffer
from checkpoint.memory import pages, scan
from checkpoint.memory.layout import Mapping, MemoryFields, MemoryLayout
from checkpoint.memory.vma import Vma, read_smaps
from tests.bench.results import note

CHILD = """
import ctypes, mmap, sys
size, huge = int(sys.argv[1]), int(sys.argv[2])
a, b = (mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2))
for m in (a, b):
    m.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
block = bytes(range(256)) * 4096
for at in range(0, size, len(block)):
    a[at : at + len(block)] = block
print(*(ctypes.addressof(ctypes.c_char.from_buffer(m)) for m in (a, b)), flush=True)
sys.stdin.read()
"""


class Target:
    """As much of a tracee.Process as copying needs; it rests by itself."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.mem_fd = os.open(f"/proc/{pid}/mem", os.O_RDWR)
        self.pagemap_fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)


def timed(name: str, size: int, start: float) -> None:
    took = time.perf_counter() - start
    print(f"{name:44s} {size / took / 1e9:6.2f} GB/s {took * 1e3:8.1f} ms", flush=True)
    note("memory", what=name, rate=size / took / 1e9)


def layout(areas: Iterable[tuple[int, int]]) -> MemoryLayout:
    return MemoryLayout(
        pid=1,
        mappings=tuple(Mapping(start=a, end=b, prot=3) for a, b in areas),
        fields=MemoryFields(**dict.fromkeys(MemoryFields.__slots__, 4096)),
        auxv=b"x",
        exe="",
        exe_file=0,
        vdso=b"",
    )


def measure(size: int, huge: bool) -> None:
    print("transparent huge pages" if huge else "4 KiB pages")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(size), str(int(huge))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        full, empty = map(int, child.stdout.readline().split())
        target = Target(child.pid)
        start = time.perf_counter()
        ranges = list(scan.private_pages(target.pagemap_fd, [Vma(full, full + size, 3, False, 0, 0, 0, "")]))
        timed(f"scan ({len(ranges)} runs)", size, start)
        memory = layout(sorted([(full, full + size), (empty, empty + size)]))
        start = time.perf_counter()
        total = sum(len(run.data) for run in pages.read_runs(target, 1, ranges))  # type: ignore[arg-type]
        timed("read", total, start)
        block = aligned_buffer(DATA_MAX)
        block[:] = bytes(range(256)) * (DATA_MAX // 256)
        runs = [
            PageRun(space=Space.MEMORY, id=1, runs=((at, DATA_MAX),), data=block)
            for at in range(empty, empty + size, DATA_MAX)
        ]
        start = time.perf_counter()
        timed("write, pages not there yet", pages.write(target, memory, runs), start)  # type: ignore[arg-type]
        start = time.perf_counter()
        timed("write again", pages.write(target, memory, runs), start)  # type: ignore[arg-type]
        writer = pages.PageWriter(target, memory)  # type: ignore[arg-type]
        with ThreadPoolExecutor(2) as pool:
            start = time.perf_counter()
            timed("write again, 2 threads", sum(pool.map(writer.write, runs)), start)
        start = time.perf_counter()
        smaps = read_smaps(child.pid)
        timed(f"smaps ({len(smaps)} mappings)", 2 * size, start)
    finally:
        child.communicate()


def main() -> None:
    size = (int(sys.argv[1]) if len(sys.argv) > 1 else 1024) << 20
    a, b = (ctypes.create_string_buffer(DATA_MAX) for _ in range(2))
    start = time.perf_counter()
    for _ in range(size // DATA_MAX):
        ctypes.memmove(a, b, DATA_MAX)
    timed("memcpy, 1 MiB, in the cache", size, start)
    large = bytearray(size)
    for at in range(0, size, 4096):
        large[at] = 1
    start = time.perf_counter()
    source = (ctypes.c_char * size).from_buffer(large)
    for at in range(0, size, DATA_MAX):
        ctypes.memmove(a, ctypes.addressof(source) + at, DATA_MAX)
    timed("memcpy, out of memory", size, start)
    del source, large
    for huge in (False, True):
        measure(size, huge)


if __name__ == "__main__":
    main()
