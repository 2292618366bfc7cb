"""Memory: attributes of mappings, guard regions, the heap, files behind it, what is shared."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
from collections.abc import Iterator

from tests.system.state.calls import anonymous, call, flags_of, libc, prctl
from tests.system.state.case import Here, case

MPROTECT, MADVISE, MUNMAP, MLOCK2, MLOCKALL, MREMAP, BRK = 10, 28, 11, 325, 151, 25, 12
READ, WRITE = 1, 2
SHARED, PRIVATE, ANONYMOUS, FIXED, GROWSDOWN, NORESERVE = 1, 2, 0x20, 0x10, 0x100, 0x4000


def put(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))


def at(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)


def advised(advice: int, flag: str) -> Iterator[None]:
    area = anonymous(8)
    put(area, b"advised")
    call(MADVISE, area, 8 * 4096, advice)
    yield
    assert at(area, 7) == b"advised"
    assert flag in flags_of(area)


@case("memory/dc")
def not_for_children(here: Here) -> Iterator[None]:
    area = anonymous(4)
    call(MADVISE, area, 4 * 4096, 10)  # MADV_DONTFORK
    yield
    assert "dc" in flags_of(area)
    child = os.fork()
    if child == 0:
        try:
            flags_of(area)
        except LookupError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@case("memory/wf")
def empty_for_children(here: Here) -> Iterator[None]:
    area = anonymous(4)
    put(area, b"secret")
    call(MADVISE, area, 4 * 4096, 18)  # MADV_WIPEONFORK
    yield
    assert at(area, 6) == b"secret"
    child = os.fork()
    if child == 0:
        os._exit(at(area, 6) != bytes(6))
    assert os.waitpid(child, 0)[1] == 0


@case("memory/dd")
def not_for_core_files(here: Here) -> Iterator[None]:
    yield from advised(16, "dd")


@case("memory/hg")
def huge_pages_wanted(here: Here) -> Iterator[None]:
    yield from advised(14, "hg")


@case("memory/nh")
def huge_pages_not_wanted(here: Here) -> Iterator[None]:
    yield from advised(15, "nh")


@case("memory/ac")
def protected_for_a_while(here: Here) -> Iterator[None]:
    """A part that could be written and again can be is one mapping with the rest: mremap takes no two."""
    area = anonymous(8)
    for page in range(8):
        put(area + page * 4096, b"written")
    call(MPROTECT, area + 2 * 4096, 3 * 4096, READ)
    yield
    call(MPROTECT, area + 2 * 4096, 3 * 4096, READ | WRITE)
    moved = call(MREMAP, area, 8 * 4096, 16 * 4096, 1)
    assert all(at(moved + page * 4096, 7) == b"written" for page in range(8))


@case("memory/mg")
def pages_of_equal_content_may_be_merged(here: Here) -> Iterator[None]:
    yield from advised(12, "mg")


@case("memory/names")
def a_name_for_memory(here: Here) -> Iterator[None]:
    area = anonymous(3)
    name = ctypes.create_string_buffer(b"my own")
    try:
        call(157, 0x53564D41, 0, area, 3 * 4096, ctypes.addressof(name))
    except OSError as error:
        assert error.errno == errno.EINVAL, "a kernel without such names (CONFIG_ANON_VMA_NAME)"
        yield
        return
    yield
    with open("/proc/self/maps") as maps:
        assert any(line.startswith(f"{area:x}-") and line.endswith("[anon:my own]\n") for line in maps)


@case("memory/sr")
def read_in_sequence(here: Here) -> Iterator[None]:
    yield from advised(2, "sr")


@case("memory/rr")
def read_at_random(here: Here) -> Iterator[None]:
    yield from advised(1, "rr")


@case("memory/lo")
def locked(here: Here) -> Iterator[None]:
    area = anonymous(4)
    call(MLOCK2, area, 4 * 4096, 0)
    yield
    assert "lo" in flags_of(area)
    assert "lf" not in flags_of(area)


@case("memory/lf")
def locked_when_touched(here: Here) -> Iterator[None]:
    area = anonymous(4)
    call(MLOCK2, area, 4 * 4096, 1)
    yield
    assert {"lo", "lf"} <= set(flags_of(area))


@case("state/memory-switches")
def new_memory_is_locked(here: Here) -> Iterator[None]:
    call(MLOCKALL, 2)  # MCL_FUTURE
    yield
    assert "lo" in flags_of(anonymous(1))
    assert "lf" not in flags_of(anonymous(1))


@case("state/memory-switches", "memory/lo")
def all_memory_is_locked_when_touched(here: Here) -> Iterator[None]:
    call(MLOCKALL, 7)  # MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT
    before = anonymous(1)
    yield
    assert {"lo", "lf"} <= set(flags_of(before))
    assert {"lo", "lf"} <= set(flags_of(anonymous(1)))


@case("memory/nr")
def without_a_reservation(here: Here) -> Iterator[None]:
    area = anonymous(1 << 20, flags=PRIVATE | ANONYMOUS | NORESERVE)
    put(area + (1 << 30), b"far")
    yield
    assert "nr" in flags_of(area)
    assert at(area + (1 << 30), 3) == b"far"


@case("memory/gd")
def that_grows_downwards(here: Here) -> Iterator[None]:
    room = anonymous(512, prot=0)
    call(MUNMAP, room, 512 * 4096)
    area = anonymous(4, flags=PRIVATE | ANONYMOUS | GROWSDOWN | FIXED, at=room + 508 * 4096)
    put(area, b"top")
    yield
    assert at(area, 3) == b"top"
    put(area - 4096, b"grown")
    assert at(area - 4096, 5) == b"grown"


@case("memory/dp")
def that_the_kernel_may_drop(here: Here) -> Iterator[None]:
    area = anonymous(4, flags=0x08 | ANONYMOUS)  # MAP_DROPPABLE
    put(area, b"maybe")
    yield
    assert "dp" in flags_of(area)
    assert at(area, 5) in (b"maybe", bytes(5))


@case("memory/guards")
def guard_regions(here: Here) -> Iterator[None]:
    area = anonymous(16)
    put(area, b"before")
    put(area + 8 * 4096, b"after")
    call(MADVISE, area + 2 * 4096, 3 * 4096, 102)  # MADV_GUARD_INSTALL
    yield
    assert at(area, 6) == b"before"
    assert at(area + 8 * 4096, 5) == b"after"
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        prctl(4, 0)  # no core file
        at(area + 3 * 4096, 1)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV


@case("memory/fields")
def the_heap_goes_on_growing(here: Here) -> Iterator[None]:
    end = int(libc.syscall(BRK, ctypes.c_long(0)))
    yield
    assert int(libc.syscall(BRK, ctypes.c_long(0))) == end
    assert int(libc.syscall(BRK, ctypes.c_long(end + 123_456))) == end + 123_456
    put(end, b"new")
    libc.syscall(BRK, ctypes.c_long(end))


@case("memory/pages")
def every_protection(here: Here) -> Iterator[None]:
    areas = {}
    for prot in range(8):
        areas[prot] = area = anonymous(2)
        put(area, b"kept %d" % prot)
        call(MPROTECT, area, 2 * 4096, prot)
    yield
    with open("/proc/self/maps") as file:
        lines = file.read().splitlines()
    for prot, area in areas.items():
        wanted = "".join(c if prot & bit else "-" for c, bit in zip("rwx", (1, 2, 4), strict=True)) + "p"
        inside = [line for line in lines if _covers(line, area)]
        assert [line.split()[1] for line in inside] == [wanted]
        call(MPROTECT, area, 2 * 4096, 3)
        assert at(area, 6) == b"kept %d" % prot


def _covers(line: str, address: int) -> bool:
    start, _, end = line.split()[0].partition("-")
    return int(start, 16) <= address < int(end, 16)


@case("files/shared-memory")
def shared_with_a_child(here: Here) -> Iterator[None]:
    area = mmap.mmap(-1, 1 << 16)
    area[:5] = b"hello"
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reading, 1)
        area[100:105] = bytes(reversed(area[:5]))
        os._exit(0)
    yield
    area[:5] = b"abcde"
    os.write(writing, b"x")
    os.waitpid(child, 0)
    assert area[100:105] == b"edcba"


@case("memory/pages")
def a_file_changed_privately(here: Here) -> Iterator[None]:
    path = here.path("mapped")
    with open(path, "wb") as file:
        file.write(bytes(range(256)) * 64)
    with open(path, "rb") as file:
        area = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=READ | WRITE)
    area[5000:5004] = b"mine"
    yield
    assert area[5000:5004] == b"mine"
    assert area[0:4] == bytes(range(4))
    with open(path, "rb") as file:
        assert file.read()[5000:5004] != b"mine"


@case("memory/pages")
def a_file_mapped_shared(here: Here) -> Iterator[None]:
    path = here.path("shared")
    with open(path, "wb") as file:
        file.write(bytes(3 * 4096 + 17))
    with open(path, "r+b") as file:
        area = mmap.mmap(file.fileno(), 0)
    area[12300:12305] = b"first"
    yield
    assert area[12300:12305] == b"first"
    area[0:6] = b"second"
    with open(path, "rb") as file:
        assert file.read(6) == b"second"


@case("files/deleted-file")
def a_mapped_file_that_was_deleted(here: Here) -> Iterator[None]:
    path = here.path("gone")
    with open(path, "w+b") as file:
        file.write(b"x" * 10_000)
        file.flush()
        area = mmap.mmap(file.fileno(), 0)
    os.unlink(path)
    area[3:6] = b"abc"
    child_reads, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(child_reads, 1)
        os._exit(area[9000:9003] != b"new")
    yield
    assert area[:8] == b"xxxabcxx"
    area[9000:9003] = b"new"
    os.write(go, b"x")
    assert os.waitpid(child, 0)[1] == 0


@case("files/memfd")
def a_mapped_memfd(here: Here) -> Iterator[None]:
    fd = os.memfd_create("block", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 16)
    area = mmap.mmap(fd, 1 << 16)
    area[100:103] = b"abc"
    yield
    assert os.pread(fd, 3, 100) == b"abc"
    os.pwrite(fd, b"xyz", 200)
    assert area[200:203] == b"xyz"


@case("files/deleted-file")
def a_posix_semaphore(here: Here) -> Iterator[None]:
    """As a process pool has them: in /dev/shm, the name gone."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    mutex = context.Semaphore(0)
    child = os.fork()
    if child == 0:
        os._exit(0 if mutex.acquire(timeout=60) else 1)
    yield
    mutex.release()
    assert os.waitpid(child, 0)[1] == 0


@case("memory/pages")
def a_page_that_moved(here: Here) -> Iterator[None]:
    area = anonymous(4)
    put(area, b"moved")
    to = anonymous(16, prot=0)
    moved = call(MREMAP, area, 4 * 4096, 4 * 4096, 3, to)
    yield
    assert moved == to
    assert at(to, 5) == b"moved"
