"""Descriptors that name processes."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import threading
import time
from collections.abc import Iterator

from tests.system.state.calls import threaded
from tests.system.state.case import Here, case


def sleeper() -> int:
    pid = os.fork()
    if pid == 0:
        while True:
            time.sleep(1)
    return pid


@case("files/pidfd")
def pidfd_of_a_child(here: Here) -> Iterator[None]:
    pid = sleeper()
    fd = os.pidfd_open(pid)
    yield
    assert not select.select([fd], [], [], 0)[0]
    signal.pidfd_send_signal(fd, signal.SIGKILL)
    found = os.waitid(os.P_PIDFD, fd, os.WEXITED)
    assert found is not None
    assert (found.si_pid, found.si_status) == (pid, signal.SIGKILL)


@case("files/pidfd")
def pidfd_of_oneself_that_does_not_block(here: Here) -> Iterator[None]:
    fd = os.pidfd_open(os.getpid(), os.O_NONBLOCK)
    yield
    assert not os.get_blocking(fd)
    got: list[int] = []
    signal.signal(signal.SIGUSR1, lambda n, _: got.append(n))
    signal.pidfd_send_signal(fd, signal.SIGUSR1)
    assert got == [signal.SIGUSR1]


@case("files/pidfd")
def pidfd_of_a_zombie(here: Here) -> Iterator[None]:
    pid = os.fork()
    if pid == 0:
        os._exit(17)
    fd = os.pidfd_open(pid)
    select.select([fd], [], [])
    yield
    assert select.select([fd], [], [], 0)[0]
    found = os.waitid(os.P_PIDFD, fd, os.WEXITED)
    assert found is not None
    assert (found.si_pid, found.si_status) == (pid, 17)


@case("files/pidfd")
def pidfd_of_nobody(here: Here) -> Iterator[None]:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    fd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    yield
    assert select.select([fd], [], [], 0)[0]
    try:
        signal.pidfd_send_signal(fd, 0)
    except ProcessLookupError:
        return
    raise AssertionError("it names somebody")


@case("files/pidfd")
def pidfd_of_a_thread(here: Here) -> Iterator[None]:
    fds = [-1]

    def own() -> None:
        fds[0] = os.pidfd_open(threading.get_native_id(), os.O_EXCL)

    thread = threaded(own, lambda _: None)
    yield
    with open(f"/proc/self/fdinfo/{fds[0]}") as file:
        assert f"Pid:\t{thread.tid}\n" in file.read()
    assert fcntl.fcntl(fds[0], fcntl.F_GETFL) & os.O_EXCL
    assert not select.select([fds[0]], [], [], 0)[0]
    got: list[int] = []
    signal.signal(signal.SIGUSR2, lambda n, _: got.append(n))
    signal.pidfd_send_signal(fds[0], signal.SIGUSR2)
    thread.verify()
    # readable when the thread has ended, though the process lives
    assert select.select([fds[0]], [], [], 20)[0]
    assert got == [signal.SIGUSR2]


@case("files/pidfd")
def pidfd_of_a_thread_that_has_ended(here: Here) -> Iterator[None]:
    fds = [-1]
    thread = threading.Thread(target=lambda: fds.__setitem__(0, os.pidfd_open(threading.get_native_id(), os.O_EXCL)))
    thread.start()
    thread.join()
    select.select([fds[0]], [], [])
    yield
    assert select.select([fds[0]], [], [], 0)[0]
    assert fcntl.fcntl(fds[0], fcntl.F_GETFL) & os.O_EXCL
