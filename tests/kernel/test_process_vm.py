"""process_vm_readv, process_vm_writev and /proc/PID/mem: what each may touch."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from checkpoint.errors import MemoryUnreadable, MemoryUnwritable
from checkpoint.image.frames import PageRun, Space
from checkpoint.kernel import process_vm
from checkpoint.memory import pages
from checkpoint.memory.layout import Mapping, MemoryFields, MemoryLayout
from checkpoint.memory.vma import PAGE

LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def area() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as made:
        made[:] = b"".join(bytes([65 + i]) * PAGE for i in range(4))
        yield made
        protect(made, 0, 4, 3)


def address(area: mmap.mmap) -> int:
    with process_vm.address_of(memoryview(area)) as start:
        return start


def protect(area: mmap.mmap, first: int, count: int, prot: int) -> None:
    start = address(area) + first * PAGE
    assert LIBC.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(count * PAGE), prot) == 0


def test_ranges_are_gathered_into_one_buffer(area: mmap.mmap) -> None:
    start, into = address(area), bytearray(2 * PAGE)
    with process_vm.address_of(into, writable=True) as local:
        ranges = [(start + 3 * PAGE, PAGE), (start, PAGE)]
        assert process_vm.readv(os.getpid(), local, ranges) == 2 * PAGE
    assert into == b"D" * PAGE + b"A" * PAGE


def test_a_read_stops_short_at_memory_that_may_not_be_read(area: mmap.mmap) -> None:
    start, into = address(area), bytearray(4 * PAGE)
    protect(area, 2, 1, 0)
    with process_vm.address_of(into, writable=True) as local:
        assert process_vm.readv(os.getpid(), local, [(start, 4 * PAGE)]) == 2 * PAGE
        with pytest.raises(OSError, match="process_vm_readv") as caught:
            process_vm.readv(os.getpid(), local, [(start + 2 * PAGE, PAGE)])
    assert caught.value.errno == errno.EFAULT


def test_proc_mem_reads_and_writes_private_memory_whatever_its_protection(area: mmap.mmap) -> None:
    protect(area, 1, 1, 0)
    protect(area, 2, 1, 1)
    fd = os.open("/proc/self/mem", os.O_RDWR)
    try:
        assert os.pread(fd, PAGE, address(area) + PAGE) == b"B" * PAGE
        for page in (1, 2):
            assert os.pwrite(fd, b"new", address(area) + page * PAGE) == 3
    finally:
        os.close(fd)
    protect(area, 0, 4, 3)
    assert area[PAGE : PAGE + 3] == area[2 * PAGE : 2 * PAGE + 3] == b"new"


def test_process_vm_writev_does_not_write_to_read_only_memory(area: mmap.mmap) -> None:
    protect(area, 0, 1, 1)
    with process_vm.address_of(b"x" * PAGE) as local, pytest.raises(OSError, match="process_vm_writev") as caught:
        process_vm.writev(os.getpid(), local, [(address(area), PAGE)])
    assert caught.value.errno == errno.EFAULT


def test_a_read_only_buffer_can_be_written_from(area: mmap.mmap) -> None:
    with process_vm.address_of(memoryview(b"y" * PAGE)) as local:
        assert process_vm.writev(os.getpid(), local, [(address(area) + PAGE, PAGE)]) == PAGE
    assert area[PAGE : 2 * PAGE] == b"y" * PAGE
    with pytest.raises(BufferError), process_vm.address_of(b"fixed", writable=True):
        raise RuntimeError("not reached")


def test_the_number_of_ranges_is_checked() -> None:
    for count in (0, process_vm.IOV_MAX + 1):
        with pytest.raises(ValueError, match="ranges"):
            process_vm.readv(os.getpid(), 0, [(0, 1)] * count)


class Ourselves:
    """As much of a stopped process as copying needs."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.mem_fd = os.open("/proc/self/mem", os.O_RDWR)


@pytest.fixture
def ourselves() -> Iterator[Ourselves]:
    made = Ourselves()
    yield made
    os.close(made.mem_fd)


def layout_of(area: mmap.mmap) -> MemoryLayout:
    start = address(area)
    return MemoryLayout(
        pid=1,
        mappings=(Mapping(start=start, end=start + 4 * PAGE, prot=3),),
        fields=MemoryFields(**dict.fromkeys(MemoryFields.__slots__, PAGE)),
        auxv=b"x",
        exe="",
        exe_file=0,
        vdso=b"",
    )


def test_pages_of_every_protection_are_read_and_written(area: mmap.mmap, ourselves: Ourselves) -> None:
    start = address(area)
    for page, prot in enumerate((0, 1, 3, 0)):
        protect(area, page, 1, prot)
    # a run that begins in memory that process_vm cannot reach, and goes on in memory that it can
    ranges = [(start, start + 3 * PAGE), (start + 3 * PAGE, start + 4 * PAGE)]
    run = next(pages.read_runs(ourselves, 1, ranges))  # type: ignore[arg-type]
    assert bytes(run.data) == b"".join(bytes([65 + i]) * PAGE for i in range(4))
    new = PageRun(space=Space.MEMORY, id=1, runs=run.runs, data=memoryview(b"n" * 4 * PAGE))
    assert pages.write(ourselves, layout_of(area), [new]) == 4 * PAGE  # type: ignore[arg-type]
    protect(area, 0, 4, 3)
    assert area[:] == b"n" * 4 * PAGE


def test_pages_that_are_not_there_are_named(area: mmap.mmap, ourselves: Ourselves) -> None:
    start = address(area)
    with mmap.mmap(-1, PAGE) as other:
        gone = address(other)
    with pytest.raises(MemoryUnreadable) as unreadable:
        list(pages.read_runs(ourselves, 1, [(start, start + PAGE), (gone, gone + PAGE)]))  # type: ignore[arg-type]
    assert f"{gone:#x}" in unreadable.value.object
    memory = layout_of(area)
    wrong = MemoryLayout(
        pid=1,
        mappings=(Mapping(start=gone, end=gone + PAGE, prot=3),),
        fields=memory.fields,
        auxv=b"x",
        exe="",
        exe_file=0,
        vdso=b"",
    )
    run = PageRun(space=Space.MEMORY, id=1, runs=((gone, PAGE),), data=memoryview(b"n" * PAGE))
    with pytest.raises(MemoryUnwritable):
        pages.write(ourselves, wrong, [run])  # type: ignore[arg-type]
