"""Descriptors that name processes."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator

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
