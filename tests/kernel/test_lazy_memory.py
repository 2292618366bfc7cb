"""Memory whose pages come later: what userfaultfd tells of a process that changes its mappings meanwhile, and what not.

The process under test makes the descriptor itself and hands it over; the pages are brought by our PageServer, only when
they are asked for.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoint.kernel import process_vm, userfaultfd
from checkpoint.kernel.mman import Advice
from checkpoint.kernel.pagemap import Category, scan
from checkpoint.kernel.userfaultfd import CREATE_SERVED, Event, Feature, Mode
from checkpoint.memory import lazy
from checkpoint.memory.lazy import LazySpace
from checkpoint.memory.missing import Missing
from checkpoint.memory.pagelog import PageLog
from checkpoint.memory.vma import PAGE
from checkpoint.pageserver import AROUND_AT_HAND, PageServer, Sourced
from tcpstate.kernel.batch import libc, syscall
from tcpstate.kernel.machine import SYS

PAGES = 256
EVENTS = Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP


def content(address: int, page: int) -> bytes:
    """What the image has there."""
    return (address + page * PAGE).to_bytes(8, "little") * (PAGE // 8)


class OnDemand:
    """A source that has every page, and gives only what is urgent."""

    def __init__(self) -> None:
        self._wanted: list[tuple[int, int, int]] = []
        self.room = False

        self.immediate = True

    def look(self) -> None:
        """Nothing can be wrong."""

    def want(self, pid: int, origin: int, size: int, *, urgent: bool) -> bool:
        self._wanted.append((pid, origin, size))
        return True

    def ready(self) -> Iterator[Sourced]:
        while self._wanted:
            pid, origin, size = self._wanted.pop()
            yield pid, origin, memoryview(b"".join(content(origin, i) for i in range(size // PAGE)))

    def forget(self) -> None:
        self._wanted.clear()


class Owner:
    """Runs in the child: memory of which every page is missing."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory = memory
        with process_vm.address_of(memoryview(memory)) as start:
            self.start = start

    def right(self, *pages: int) -> None:
        for page in pages:
            found = ctypes.string_at(self.start + page * PAGE, PAGE)
            if found != content(self.start, page):
                raise AssertionError(f"page {page} is {found[:16].hex()}")

    def zero(self, *pages: int) -> None:
        for page in pages:
            if ctypes.string_at(self.start + page * PAGE, PAGE) != bytes(PAGE):
                raise AssertionError(f"page {page} is not empty")


def served(tmp_path: Path, act: Callable[[Owner], None]) -> PageServer:
    """Let a child do something with such memory; the server as it was at the end."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            ours.close()
            memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            owner = Owner(memory)
            fd = syscall(SYS.userfaultfd, CREATE_SERVED)
            userfaultfd.enable(fd, EVENTS)
            userfaultfd.register(fd, owner.start, owner.start + PAGES * PAGE, Mode.MISSING)
            socket.send_fds(theirs, [owner.start.to_bytes(8, "little")], [fd])
            os.close(fd)
            theirs.recv(1)
            act(owner)
            status = 0
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(status)
    theirs.close()
    with ours:
        data, fds, _, _ = socket.recv_fds(ours, 8, 1)
        start = int.from_bytes(data, "little")
        space = LazySpace(pid, fds[0], Missing([(start, start + PAGES * PAGE)]))
        forked: list[int] = []
        log = PageLog(tmp_path / "pages")
        server = PageServer([space], OnDemand(), log, forked.append)
        ended = os.pidfd_open(pid)
        thread = threading.Thread(target=_until, args=(server, ended), daemon=True)
        thread.start()
        ours.send(b"x")
        _, status = os.waitpid(pid, 0)
        thread.join(10)
        os.close(ended)
        assert not thread.is_alive()
    for one in server.spaces:
        one.close()
    assert os.waitstatus_to_exitcode(status) == 0
    return server


class _Ended(Exception):
    pass


def _until(server: PageServer, ended: int) -> None:
    def stop() -> None:
        raise _Ended

    server.also(ended, stop)
    with pytest.raises(_Ended):
        server.run()


def call(owner: Owner, page: int, count: int, advice: int) -> None:
    if libc.madvise(ctypes.c_void_p(owner.start + page * PAGE), ctypes.c_size_t(count * PAGE), advice):
        raise OSError(ctypes.get_errno(), "madvise")


def test_this_kernel_can() -> None:
    assert lazy.available() == ""


def test_pages_come_with_what_lies_around(tmp_path: Path) -> None:
    server = served(tmp_path, lambda owner: owner.right(0, 100, 255))
    missing = server.spaces[0].missing
    assert 3 * PAGE < PAGES * PAGE - missing.bytes <= 3 * AROUND_AT_HAND < PAGES * PAGE


def test_the_kernel_itself_waits_for_a_page(tmp_path: Path) -> None:
    def act(owner: Owner) -> None:
        read, write = os.pipe()
        with process_vm.address_of(memoryview(owner.memory)) as start:
            if libc.write(write, ctypes.c_void_p(start), ctypes.c_size_t(PAGE)) != PAGE:
                raise OSError(ctypes.get_errno(), "write")
        if os.read(read, PAGE) != content(owner.start, 0):
            raise AssertionError("other bytes were written")

    served(tmp_path, act)


def test_what_was_given_back_is_empty(tmp_path: Path) -> None:
    def act(owner: Owner) -> None:
        call(owner, 32, 16, Advice.DONTNEED)
        owner.zero(32, 47)
        owner.right(31, 48)

    served(tmp_path, act)


def test_memory_that_moves_takes_its_pages_along(tmp_path: Path) -> None:
    def act(owner: Owner) -> None:
        address = owner.start
        fresh = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with process_vm.address_of(memoryview(fresh)) as place:
            libc.mremap.restype = ctypes.c_void_p
            moved = libc.mremap(
                ctypes.c_void_p(address + 64 * PAGE),
                ctypes.c_size_t(64 * PAGE),
                ctypes.c_size_t(64 * PAGE),
                3,  # MREMAP_MAYMOVE | MREMAP_FIXED
                ctypes.c_void_p(place),
            )
            if moved != place:
                raise OSError(ctypes.get_errno(), "mremap")
            for page in (0, 63):
                if ctypes.string_at(place + page * PAGE, PAGE) != content(address, 64 + page):
                    raise AssertionError(f"page {page} of what was moved")
        owner.right(63, 128)

    served(tmp_path, act)


def test_what_was_mapped_anew_is_empty(tmp_path: Path) -> None:
    def act(owner: Owner) -> None:
        libc.mmap.restype = ctypes.c_void_p
        place = ctypes.c_void_p(owner.start + 16 * PAGE)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
        if libc.mmap(place, ctypes.c_size_t(16 * PAGE), 3, flags, -1, ctypes.c_long(0)) != place.value:
            raise OSError(ctypes.get_errno(), "mmap")
        owner.zero(16, 31)
        owner.right(15, 32)

    served(tmp_path, act)


def test_a_child_has_what_its_parent_had_at_that_moment(tmp_path: Path) -> None:
    def act(owner: Owner) -> None:
        call(owner, 32, 16, Advice.DONTNEED)
        ctypes.memset(owner.start + 5 * PAGE, 7, PAGE)
        child = os.fork()
        if not child:
            status = 1
            try:
                if ctypes.string_at(owner.start + 5 * PAGE, PAGE) != b"\x07" * PAGE:
                    raise AssertionError("what was written before is lost")
                owner.zero(33)
                owner.right(4, 64, 200)
                status = 0
            finally:
                os._exit(status)
        call(owner, 64, 64, Advice.DONTNEED)  # the child's stay
        owner.zero(64)
        _, status = os.waitpid(child, 0)
        if status:
            raise AssertionError("the child found something else")
        owner.right(200)

    server = served(tmp_path, act)
    assert len(server.spaces) == 2


def test_a_page_that_is_brought_overwrites_a_guard() -> None:
    """Why LazySpace looks for guards first: no message tells of them."""
    memory = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    owner = Owner(memory)
    fd = syscall(SYS.userfaultfd, CREATE_SERVED)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    source = mmap.mmap(-1, 4 * PAGE)
    try:
        userfaultfd.enable(fd, EVENTS)
        userfaultfd.register(fd, owner.start, owner.start + 4 * PAGE, Mode.MISSING)
        call(owner, 0, 2, Advice.GUARD_INSTALL)
        with process_vm.address_of(memoryview(source)) as address:
            assert userfaultfd.copy(fd, owner.start, address, PAGE) == PAGE
            space = LazySpace(1, fd, Missing([(owner.start, owner.start + 4 * PAGE)]), pagemap)
            (piece,) = space.missing.find(owner.start + PAGE, owner.start + 4 * PAGE)
            space.put(piece, address)
            assert space.missing.bytes == PAGE
            with pytest.raises(FileExistsError):
                userfaultfd.copy(fd, owner.start + 2 * PAGE, address, PAGE)
        guards = [run[:2] for run in scan(pagemap, owner.start, owner.start + 4 * PAGE, all_of=Category.GUARD)]
        assert guards == [(owner.start + PAGE, owner.start + 2 * PAGE)]
    finally:
        os.close(fd)
        os.close(pagemap)
        source.close()


def test_who_takes_over_knows_what_was_changed(tmp_path: Path) -> None:
    """A server that goes through the log of another finds the same pages missing."""
    server = served(tmp_path, lambda owner: (call(owner, 32, 16, Advice.DONTNEED), owner.right(0))[-1])
    left = server.spaces[0].missing
    changes = list(server._log.again())
    assert [(number, message.event) for number, message in changes] == [(0, Event.REMOVE)]
    start = changes[0][1].first - 32 * PAGE
    space = LazySpace(1, -1, Missing([(start, start + PAGES * PAGE)]))
    space.changed(changes[0][1])
    assert not space.missing.find(start + 32 * PAGE, start + 48 * PAGE)
    # of what was brought it knows nothing: it brings it again, and the kernel refuses
    assert left.bytes < space.missing.bytes == (PAGES - 16) * PAGE
