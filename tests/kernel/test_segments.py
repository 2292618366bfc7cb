"""System V shared memory: what the rebuilding of segments assumes of the kernel."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest

from checkpoint.errors import SysvSharedMemory
from checkpoint.kernel import sysv
from checkpoint.memory import segments
from checkpoint.memory.vma import read_maps
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS

NUMBER, KEY, SIZE = 1_234_567, 0x7463_6D67, 10_000


@pytest.fixture
def segment():
    assert sysv.create(NUMBER, KEY, SIZE, 0o640)
    yield NUMBER
    if sysv.look(NUMBER) is not None:
        sysv.remove(NUMBER)


def test_a_segment_can_be_made_under_a_wanted_id(segment):
    found = sysv.look(segment)
    assert (found.key, found.mode, found.size, found.attached) == (KEY, 0o640, SIZE, 0)


def test_an_id_that_is_taken_is_told(segment):
    assert not sysv.create(NUMBER, KEY + 1, SIZE, 0o600)
    assert sysv.look(NUMBER).key == KEY


def test_a_key_that_is_taken_is_told(segment):
    with pytest.raises(FileExistsError):
        sysv.create(NUMBER + 1, KEY, SIZE, 0o600)


def test_the_inode_of_a_mapping_is_the_id_and_its_file_can_be_opened(segment):
    address = syscall(SYS.shmat, segment, 0, 0)
    try:
        (vma,) = [vma for vma in read_maps(os.getpid()) if vma.start == address]
        assert (vma.inode, vma.name) == (NUMBER, f"/SYSV{KEY:08x} (deleted)")
        assert vma.size == SIZE + -SIZE % mmap.PAGESIZE
        fd = os.open(f"/proc/self/map_files/{vma.start:x}-{vma.end:x}", os.O_RDWR)
        assert os.fstat(fd).st_ino == NUMBER
        assert os.fstat(fd).st_size == SIZE
        os.pwrite(fd, b"by the file", 5000)
        os.close(fd)
        assert ctypes.string_at(address + 5000, 11) == b"by the file"
        assert sysv.look(segment).attached == 1
    finally:
        syscall(SYS.shmdt, address)
    # an open file is no attachment, and keeps nothing: the segment lives by itself
    assert sysv.look(segment).attached == 0


def test_owner_and_permissions_can_be_given(segment):
    sysv.change_owner(segment, 2001, 2002, 0o604)
    found = sysv.look(segment)
    assert (found.uid, found.gid, found.mode) == (2001, 2002, 0o604)


def test_a_removed_segment_stays_for_those_who_have_it(segment):
    address = syscall(SYS.shmat, segment, 0, 0)
    sysv.remove(segment)
    found = sysv.look(segment)
    assert (found.key, found.mode & sysv.Mode.DEST) == (0, sysv.Mode.DEST)
    syscall(SYS.shmdt, address)
    assert sysv.look(segment) is None


def test_what_somebody_else_has_too_is_refused(segment):
    address = syscall(SYS.shmat, segment, 0, 0)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reading, 1)
        os._exit(0)
    try:
        assert segments.require_alone(segment, [child, os.getpid()]).attached == 2
        with pytest.raises(SysvSharedMemory, match="attached 2 times, 1 times by the tree"):
            segments.require_alone(segment, [child])
        assert [v.code for v in segments.verdicts([child])] == [SysvSharedMemory.code]
    finally:
        os.write(writing, b"x")
        os.waitpid(child, 0)
        syscall(SYS.shmdt, address)
        for fd in (reading, writing):
            os.close(fd)


def test_what_is_mapped_in_parts_is_refused(segment):
    address = syscall(SYS.shmat, segment, 0, 0)
    try:
        syscall(SYS.mprotect, address + mmap.PAGESIZE, mmap.PAGESIZE, 1)
        with pytest.raises(SysvSharedMemory, match="in parts"):
            segments.require_alone(segment, [os.getpid()])
    finally:
        syscall(SYS.shmdt, address)
