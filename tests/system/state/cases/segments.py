"""System V shared memory."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator

from tests.system.state.calls import call
from tests.system.state.case import Here, case

SHMGET, SHMAT, SHMCTL, SHMDT = 29, 30, 31, 67
RMID, SET, STAT, LOCK = 0, 1, 2, 11
CREATE, RDONLY = 0o1000, 0o10000


def told(number: int) -> tuple[int, ...]:
    """key, uid, gid, mode, size, attachments"""
    room = ctypes.create_string_buffer(112)
    call(SHMCTL, number, STAT, room)
    key, uid, gid, _, _, mode = struct.unpack_from("<iIIIII", room.raw)
    (size,) = struct.unpack_from("<Q", room.raw, 48)
    (attached,) = struct.unpack_from("<Q", room.raw, 88)
    return key, uid, gid, mode, size, attached


def attach(number: int, flags: int = 0) -> int:
    return call(SHMAT, number, 0, flags)


@case("files/sysv-shm")
def a_segment_with_a_key(here: Here) -> Iterator[None]:
    key = 0x74630000 | here.slot
    number = call(SHMGET, key, 3 * 4096 + 5, CREATE | 0o640)
    area = attach(number)
    ctypes.memmove(area + 4096, b"segment", 7)
    before = told(number)
    yield
    assert told(number) == before
    assert call(SHMGET, key, 0, 0) == number
    again = attach(number)
    assert ctypes.string_at(again + 4096, 7) == b"segment"
    ctypes.memmove(again, b"both", 4)
    assert ctypes.string_at(area, 4) == b"both"
    call(SHMDT, area)
    call(SHMDT, again)
    assert told(number)[5] == 0
    call(SHMCTL, number, RMID, None)


@case("files/sysv-shm")
def a_segment_that_a_child_shares(here: Here) -> Iterator[None]:
    number = call(SHMGET, 0, 8192, 0o600)
    area = attach(number)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reading, 1)
        ctypes.memmove(area + 100, b"from the child", 14)
        os._exit(0)
    assert told(number)[5] == 2
    yield
    assert told(number)[5] == 2
    os.write(writing, b"x")
    os.waitpid(child, 0)
    assert ctypes.string_at(area + 100, 14) == b"from the child"
    call(SHMCTL, number, RMID, None)


@case("files/sysv-shm")
def a_segment_that_goes_with_its_last_user(here: Here) -> Iterator[None]:
    number = call(SHMGET, 0, 4096, 0o600)
    area = attach(number)
    call(SHMCTL, number, RMID, None)
    ctypes.memmove(area, b"last", 4)
    yield
    assert ctypes.string_at(area, 4) == b"last"
    assert told(number)[3] & 0o1000
    call(SHMDT, area)
    try:
        told(number)
    except OSError:
        return
    raise AssertionError("it is still there")


@case("files/sysv-shm")
def a_segment_that_may_only_be_read(here: Here) -> Iterator[None]:
    number = call(SHMGET, 0, 4096, 0o600)
    writable, area = attach(number), attach(number, RDONLY)
    ctypes.memmove(writable, b"given", 5)
    call(SHMCTL, number, LOCK, None)
    yield
    ctypes.memmove(writable, b"taken", 5)
    assert ctypes.string_at(area, 5) == b"taken"
    try:
        call(10, area, 4096, 3)  # mprotect
    except OSError:
        assert told(number)[3] & 0o2000
        call(SHMCTL, number, RMID, None)
        return
    raise AssertionError("it became writable")


@case("files/sysv-shm")
def a_segment_of_somebody_else(here: Here) -> Iterator[None]:
    number = call(SHMGET, 0, 4096, 0o600)
    area = attach(number)
    owner = struct.pack("<iIIIII", 0, 2001, 2002, 0, 0, 0o604).ljust(112, b"\0")
    call(SHMCTL, number, SET, ctypes.create_string_buffer(owner, 112))
    ctypes.memmove(area, b"mine", 4)
    before = told(number)
    yield
    assert told(number) == before
    assert before[1:4] == (2001, 2002, 0o604)
    call(SHMCTL, number, RMID, None)
