"""Locks of every sort, signals of readiness, leases."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator

from tests.system.state.case import Here, case

F_SETOWN_EX, F_GETOWN_EX, F_OFD_SETLK, F_OFD_GETLK = 15, 16, 37, 36


def told(by: list[int]) -> list[int]:
    """The signals, once one has come: Python calls its handlers a little later."""
    end = time.monotonic() + 20
    while not by and time.monotonic() < end:
        time.sleep(0.001)
    return by


def holder(here: Here, code: int, path: str) -> int:
    """The PID that fcntl(F_GETLK) names as holder of a lock that a child of ours asks for; 0: nobody."""
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        fd = os.open(path, os.O_RDWR)
        found = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack("hhqqi4x", code, 0, 0, 0, 0))
        kind, _, _, _, owner = struct.unpack("hhqqi4x", found)
        os.write(w, struct.pack("i", owner if kind != fcntl.F_UNLCK else 0))
        os._exit(0)
    os.waitpid(pid, 0)
    (owner,) = struct.unpack("i", os.read(r, 4))
    os.close(r)
    os.close(w)
    return int(owner)


def opened(here: Here, flags: int = os.O_RDWR) -> tuple[int, str]:
    path = here.path("locked")
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    return os.open(path, flags), path


def free(path: str, how: int) -> bool:
    """Whether another description can have flock(2) this way."""
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def waiter(here: Here, path: str, take: Callable[[int, int], object]) -> None:
    """A child that waits for the whole file, and makes a file ``got`` when it has it."""
    pid = os.fork()
    if pid == 0:
        other = os.open(path, os.O_RDWR)
        take(other, fcntl.LOCK_EX)
        os.close(os.open(here.path("got"), os.O_CREAT | os.O_WRONLY))
        while True:
            time.sleep(1)
    while not any("->" in line and f" {pid} " in line for line in open("/proc/locks")):
        time.sleep(0.001)


def comes(path: str) -> None:
    """Until the file is there."""
    end = time.monotonic() + 20
    while not os.path.exists(path):
        assert time.monotonic() < end
        time.sleep(0.002)


@case("aspect/locks")
def flock_exclusive(here: Here) -> Iterator[None]:
    fd, path = opened(here)
    fcntl.flock(fd, fcntl.LOCK_EX)
    yield
    assert not free(path, fcntl.LOCK_SH)
    fcntl.flock(fd, fcntl.LOCK_UN)
    assert free(path, fcntl.LOCK_EX)


@case("aspect/locks")
def flock_shared_by_two_processes(here: Here) -> Iterator[None]:
    fd, path = opened(here)
    fcntl.flock(fd, fcntl.LOCK_SH)
    child = os.fork()
    if child == 0:
        while True:
            time.sleep(1)
    yield
    assert free(path, fcntl.LOCK_SH)
    assert not free(path, fcntl.LOCK_EX)
    os.close(fd)
    # one description: the child still has it
    assert not free(path, fcntl.LOCK_EX)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert free(path, fcntl.LOCK_EX)


@case("aspect/record-locks")
def record_locks_of_a_process(here: Here) -> Iterator[None]:
    fd, path = opened(here)
    fcntl.lockf(fd, fcntl.LOCK_EX, 10, 5)
    fcntl.lockf(fd, fcntl.LOCK_SH, 0, 1000)
    yield
    assert holder(here, fcntl.F_WRLCK, path) == os.getpid()
    other = os.open(path, os.O_RDWR)
    fcntl.lockf(fd, fcntl.LOCK_UN, 10, 5)
    assert holder(here, fcntl.F_RDLCK, path) == 0
    os.close(other)  # closing any descriptor gives up all
    assert holder(here, fcntl.F_WRLCK, path) == 0


@case("aspect/record-locks")
def record_lock_that_somebody_waits_for(here: Here) -> Iterator[None]:
    fd, path = opened(here)
    fcntl.lockf(fd, fcntl.LOCK_EX)
    waiter(here, path, fcntl.lockf)
    yield
    assert not os.path.exists(here.path("got"))
    fcntl.lockf(fd, fcntl.LOCK_UN)
    comes(here.path("got"))


@case("aspect/locks")
def flock_that_somebody_waits_for(here: Here) -> Iterator[None]:
    fd, path = opened(here)
    fcntl.flock(fd, fcntl.LOCK_EX)
    waiter(here, path, fcntl.flock)
    yield
    assert not os.path.exists(here.path("got"))
    fcntl.flock(fd, fcntl.LOCK_UN)
    comes(here.path("got"))


def ofd(fd: int, command: int, kind: int, start: int, length: int) -> int:
    found = fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, 0, start, length, 0))
    return int(struct.unpack_from("h", found)[0])


@case("aspect/locks")
def locks_of_open_file_descriptions(here: Here) -> Iterator[None]:
    fd, path = opened(here)
    ofd(fd, F_OFD_SETLK, fcntl.F_WRLCK, 100, 50)
    ofd(fd, F_OFD_SETLK, fcntl.F_RDLCK, 500, 0)
    yield
    other = os.open(path, os.O_RDWR)
    assert ofd(other, F_OFD_GETLK, fcntl.F_RDLCK, 149, 1) == fcntl.F_WRLCK
    assert ofd(other, F_OFD_GETLK, fcntl.F_WRLCK, 1 << 40, 1) == fcntl.F_RDLCK
    assert ofd(other, F_OFD_GETLK, fcntl.F_WRLCK, 150, 350) == fcntl.F_UNLCK
    os.close(fd)
    assert ofd(other, F_OFD_GETLK, fcntl.F_WRLCK, 0, 0) == fcntl.F_UNLCK


@case("aspect/locks")
def write_lease(here: Here) -> Iterator[None]:
    fd, path = opened(here)
    broken: list[int] = []
    signal.signal(signal.SIGIO, lambda number, _: broken.append(number))
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    yield
    assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK
    try:
        os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except BlockingIOError:
        assert told(broken) == [signal.SIGIO]
    else:
        raise AssertionError("the lease is gone")


@case("aspect/locks", "aspect/owner")
def read_lease_with_a_signal_of_its_own(here: Here) -> Iterator[None]:
    fd, path = opened(here, os.O_RDONLY)
    broken: list[int] = []
    signal.signal(signal.SIGRTMIN + 3, lambda number, _: broken.append(number))
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGRTMIN + 3)
    yield
    assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK
    os.close(os.open(path, os.O_RDONLY))
    assert broken == []
    try:
        os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except BlockingIOError:
        assert told(broken) == [signal.SIGRTMIN + 3]
    else:
        raise AssertionError("the lease is gone")


def owner(fd: int) -> tuple[int, int]:
    kind, pid = struct.unpack("ii", fcntl.fcntl(fd, F_GETOWN_EX, bytes(8)))
    return kind, pid


@case("aspect/owner")
def sigio_of_a_socket(here: Here) -> Iterator[None]:
    one, other = socket.socketpair()
    got: list[int] = []
    signal.signal(signal.SIGIO, lambda number, _: got.append(number))
    fcntl.fcntl(one, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(one, fcntl.F_SETFL, os.O_ASYNC)
    yield
    assert owner(one.fileno()) == (1, os.getpid())
    other.send(b"x")
    assert told(got) == [signal.SIGIO]


@case("aspect/owner")
def signal_of_choice_of_a_pipe_to_a_group(here: Here) -> Iterator[None]:
    r, w = os.pipe()
    os.setpgid(0, 0)
    got: list[int] = []
    signal.signal(signal.SIGRTMIN + 5, lambda number, _: got.append(number))
    fcntl.fcntl(r, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(r, fcntl.F_SETSIG, signal.SIGRTMIN + 5)
    fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    yield
    assert owner(r) == (2, os.getpid())
    assert fcntl.fcntl(r, fcntl.F_GETSIG) == signal.SIGRTMIN + 5
    os.write(w, b"x")
    assert told(got) == [signal.SIGRTMIN + 5]


@case("aspect/owner")
def owner_without_signals(here: Here) -> Iterator[None]:
    r, _ = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            time.sleep(1)
    fcntl.fcntl(r, fcntl.F_SETOWN, child)
    yield
    assert owner(r) == (1, child)
    assert not fcntl.fcntl(r, fcntl.F_GETFL) & os.O_ASYNC
