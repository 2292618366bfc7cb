"""System V semaphores and message queues."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
import time
from collections.abc import Iterator

from tests.system.state.calls import call
from tests.system.state.case import Here, case

SEMGET, SEMOP, SEMCTL = 64, 65, 66
MSGGET, MSGSND, MSGRCV, MSGCTL = 68, 69, 70, 71
RMID, SET, STAT = 0, 1, 2
GETPID, GETVAL, GETALL, GETNCNT, GETZCNT, SETVAL, SETALL = 11, 12, 13, 14, 15, 16, 17
CREATE, NOWAIT, UNDO = 0o1000, 0o4000, 0x1000


def operate(number: int, *operations: tuple[int, int, int]) -> None:
    data = b"".join(struct.pack("<Hhh", *each) for each in operations)
    call(SEMOP, number, ctypes.create_string_buffer(data, len(data)), len(operations))


def values(number: int, count: int) -> tuple[int, ...]:
    return tuple(call(SEMCTL, number, place, GETVAL, 0) for place in range(count))


def owner(control: int, number: int, *extra: object) -> tuple[int, ...]:
    """key, uid, gid, mode"""
    room = ctypes.create_string_buffer(256)
    call(control, number, *extra, STAT, room)
    key, uid, gid, _, _, mode = struct.unpack_from("<iIIIII", room.raw)
    return key, uid, gid, mode


def send(number: int, type: int, text: bytes) -> None:
    data = struct.pack("<q", type) + text
    call(MSGSND, number, ctypes.create_string_buffer(data, len(data)), len(text), NOWAIT)


def receive(number: int, type: int = 0, flags: int = NOWAIT) -> tuple[int, bytes]:
    room = ctypes.create_string_buffer(9000)
    length = call(MSGRCV, number, room, 8992, type, flags)
    return struct.unpack_from("<q", room.raw)[0], room.raw[8 : 8 + length]


def gone(*args: int) -> bool:
    try:
        call(*args)
    except OSError as error:
        return error.errno in (errno.EINVAL, errno.EIDRM)
    return False


@case("ipc/semaphores")
def a_set_with_a_key(here: Here) -> Iterator[None]:
    key = 0x73650000 | here.slot
    number = call(SEMGET, key, 3, CREATE | 0o640)
    for place, value in enumerate((5, 0, 32767)):
        call(SEMCTL, number, place, SETVAL, value)
    data = struct.pack("<iIIIII", 0, 2001, 2002, 0, 0, 0o604).ljust(256, b"\0")
    call(SEMCTL, number, 0, SET, ctypes.create_string_buffer(data, 256))
    before = owner(SEMCTL, number, 0)
    yield
    assert call(SEMGET, key, 0, 0) == number
    assert owner(SEMCTL, number, 0) == before
    assert before[1:] == (2001, 2002, 0o604)
    assert values(number, 3) == (5, 0, 32767)
    assert [call(SEMCTL, number, place, GETPID, 0) for place in range(3)] == [os.getpid()] * 3
    operate(number, (0, -5, NOWAIT), (2, -7, NOWAIT))
    assert values(number, 3) == (0, 0, 32760)
    call(SEMCTL, number, 0, RMID, 0)


@case("ipc/semaphores")
def a_lock_that_a_child_holds_until_its_end(here: Here) -> Iterator[None]:
    number = call(SEMGET, 0, 2, CREATE | 0o600)
    call(SEMCTL, number, 0, SETVAL, 1)
    call(SEMCTL, number, 1, SETVAL, 7)
    reading, writing = os.pipe()
    said, says = os.pipe()
    child = os.fork()
    if child == 0:
        operate(number, (0, -1, UNDO), (1, 3, UNDO))
        os.write(says, b"x")
        os.read(reading, 1)
        os._exit(0)
    os.read(said, 1)
    yield
    assert values(number, 2) == (0, 10)
    assert call(SEMCTL, number, 0, GETPID, 0) == child
    os.write(writing, b"x")
    os.waitpid(child, 0)
    # what it had taken is given back, what it had added is gone
    assert values(number, 2) == (1, 7)
    call(SEMCTL, number, 0, RMID, 0)


@case("ipc/semaphores")
def somebody_waits_for_a_semaphore(here: Here) -> Iterator[None]:
    number = call(SEMGET, 0, 1, CREATE | 0o600)
    child = os.fork()
    if child == 0:
        try:
            operate(number, (0, -2, 0))
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    while not call(SEMCTL, number, 0, GETNCNT, 0):
        time.sleep(0.001)
    yield
    operate(number, (0, 1, 0))
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    operate(number, (0, 1, 0))
    assert os.waitpid(child, 0)[1] == 0
    assert values(number, 1) == (0,)
    call(SEMCTL, number, 0, RMID, 0)


@case("ipc/semaphores")
def a_thread_waits_for_zero(here: Here) -> Iterator[None]:
    number = call(SEMGET, 0, 1, CREATE | 0o600)
    operate(number, (0, 1, UNDO))
    thread = threading.Thread(target=operate, args=(number, (0, 0, 0)), daemon=True)
    thread.start()
    while not call(SEMCTL, number, 0, GETZCNT, 0):
        time.sleep(0.001)
    yield
    assert thread.is_alive()
    operate(number, (0, -1, UNDO))
    thread.join()
    call(SEMCTL, number, 0, RMID, 0)


@case("ipc/message-queue")
def messages_of_several_types(here: Here) -> Iterator[None]:
    key = 0x6D730000 | here.slot
    number = call(MSGGET, key, CREATE | 0o620)
    send(number, 1, b"one")
    send(number, 7, b"")
    send(number, 2, bytes(range(256)) * 32)
    send(number, 1, b"again")
    before = owner(MSGCTL, number)
    yield
    assert call(MSGGET, key, 0) == number
    assert owner(MSGCTL, number) == before
    assert receive(number, 7) == (7, b"")
    assert receive(number) == (1, b"one")
    assert receive(number, -2) == (1, b"again")
    assert receive(number) == (2, bytes(range(256)) * 32)
    call(MSGCTL, number, RMID, 0)


@case("ipc/message-queue")
def a_queue_that_is_full_and_who_waits_for_room(here: Here) -> Iterator[None]:
    number = call(MSGGET, 0, CREATE | 0o600)
    data = struct.pack("<iIIIIIHH", 0, 0, 0, 0, 0, 0o600, 0, 0).ljust(48, b"\0") + struct.pack("<6Q", 0, 0, 0, 0, 0, 64)
    call(MSGCTL, number, SET, ctypes.create_string_buffer(data.ljust(256, b"\0"), 256))
    send(number, 3, b"x" * 60)
    said, says = os.pipe()
    child = os.fork()
    if child == 0:
        data = struct.pack("<q", 4) + b"late, and long"
        os.write(says, b"x")
        try:
            call(MSGSND, number, ctypes.create_string_buffer(data, len(data)), len(data) - 8, 0)
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    os.read(said, 1)
    while not _in_call(child, MSGSND):
        time.sleep(0.001)
    yield
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    assert receive(number) == (3, b"x" * 60)
    assert os.waitpid(child, 0)[1] == 0
    assert receive(number) == (4, b"late, and long")
    call(MSGCTL, number, RMID, 0)


@case("ipc/message-queue")
def an_empty_queue_that_a_child_reads(here: Here) -> Iterator[None]:
    number = call(MSGGET, 0, CREATE | 0o600)
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if receive(number, 5, 0) == (5, b"for you") else 1)
        except OSError as error:
            os._exit(error.errno or 1)
    while not _in_call(child, MSGRCV):
        time.sleep(0.001)
    yield
    send(number, 5, b"for you")
    assert os.waitpid(child, 0)[1] == 0
    call(MSGCTL, number, RMID, 0)


def _in_call(pid: int, number: int) -> bool:
    with open(f"/proc/{pid}/syscall") as file:
        return file.read().split()[0] == str(number)
