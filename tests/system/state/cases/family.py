"""Trees: children, the dead, the stopped, sessions and groups without leaders."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

from tests.system.state.calls import call, prctl
from tests.system.state.case import Here, case


def child(body: Callable[[], object]) -> int:
    """PID of a forked process that does this and ends."""
    pid = os.fork()
    if pid == 0:
        body()
        os._exit(0)
    return pid


def sleep_on() -> None:
    while True:
        time.sleep(1000)


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.001)


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@case("state/registers")
def a_zombie_that_exited(here: Here) -> Iterator[None]:
    pid = child(lambda: os._exit(37))
    until(lambda: state_of(pid) == "Z")
    yield
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 37


@case("state/registers")
def a_zombie_that_was_killed(here: Here) -> Iterator[None]:
    pid = child(sleep_on)
    os.kill(pid, signal.SIGTERM)
    until(lambda: state_of(pid) == "Z")
    yield
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


@case("state/registers")
def many_zombies_in_their_groups(here: Here) -> Iterator[None]:
    def grouped(status: int) -> None:
        os.setpgid(0, 0)
        os._exit(status)

    pids = [child(lambda n=n: grouped(n)) for n in range(5)]
    for pid in pids:
        until(lambda pid=pid: state_of(pid) == "Z")
    yield
    found = dict(os.waitpid(-1, 0) for _ in pids)
    assert {pid: os.waitstatus_to_exitcode(found[pid]) for pid in pids} == dict(zip(pids, range(5), strict=True))


@case("state/pending-signals-of-the-process")
def the_death_of_a_child_waits_to_be_heard(here: Here) -> Iterator[None]:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    signal.signal(signal.SIGCHLD, lambda *_: None)
    pid = child(lambda: None)
    until(lambda: state_of(pid) == "Z" and signal.SIGCHLD in signal.sigpending())
    yield
    assert signal.sigwait([signal.SIGCHLD]) == signal.SIGCHLD
    assert os.waitpid(pid, 0) == (pid, 0)


@case("state/registers")
def a_stopped_child(here: Here) -> Iterator[None]:
    pid = child(sleep_on)
    os.kill(pid, signal.SIGSTOP)
    until(lambda: state_of(pid) == "T")
    yield
    assert state_of(pid) == "T"
    os.kill(pid, signal.SIGCONT)
    until(lambda: state_of(pid) != "T")
    end(pid)


@case("state/registers")
def stopped_by_the_terminals_key(here: Here) -> Iterator[None]:
    """SIGTSTP, of a group of its own so that it is no orphan."""
    pid = child(sleep_on)
    os.setpgid(pid, pid)
    os.kill(pid, signal.SIGTSTP)
    until(lambda: state_of(pid) == "T")
    yield
    assert state_of(pid) == "T"
    os.kill(pid, signal.SIGCONT)
    until(lambda: state_of(pid) != "T")
    end(pid)


@case("state/registers")
def a_session_of_its_own(here: Here) -> Iterator[None]:
    def lead() -> None:
        os.setsid()
        member = os.fork()
        if member == 0:
            sleep_on()
        with open(here.path("member"), "w") as file:
            file.write(str(member))
        sleep_on()

    pid = child(lead)
    until(lambda: os.path.exists(here.path("member")) and os.path.getsize(here.path("member")) > 0)
    with open(here.path("member")) as file:
        member = int(file.read())
    yield
    assert os.getsid(pid) == os.getsid(member) == os.getpgid(member) == pid
    os.kill(member, signal.SIGKILL)
    end(pid)


@case("state/registers")
def a_session_that_has_lost_its_leader(here: Here) -> Iterator[None]:
    prctl(36, 1)  # the orphan comes to us

    def lead() -> None:
        os.setsid()
        if os.fork() == 0:
            with open(here.path("made"), "w") as file:
                file.write(f"{os.getpid()} {os.getsid(0)}")
            os.rename(here.path("made"), here.path("member"))
            sleep_on()

    leader = child(lead)
    os.waitpid(leader, 0)
    until(lambda: os.path.exists(here.path("member")))
    with open(here.path("member")) as file:
        member, session = map(int, file.read().split())
    assert session == leader
    yield
    assert os.getsid(member) == os.getpgid(member) == leader
    end(member)


@case("state/registers")
def a_group_that_has_lost_its_leader(here: Here) -> Iterator[None]:
    leader = child(sleep_on)
    os.setpgid(leader, leader)
    members = [child(sleep_on) for _ in range(2)]
    for pid in members:
        os.setpgid(pid, leader)
    end(leader)
    yield
    assert [os.getpgid(pid) for pid in members] == [leader, leader]
    os.killpg(leader, signal.SIGTERM)
    for pid in members:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


@case("state/registers")
def a_signal_of_its_own_at_the_end(here: Here) -> Iterator[None]:
    """clone with another exit signal than SIGCHLD."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    reading, writing = os.pipe()
    pid = call(56, int(signal.SIGUSR1), 0, 0, 0, 0)
    if pid == 0:
        os.read(reading, 1)
        os._exit(3)
    yield
    os.write(writing, b"x")
    assert signal.sigwait([signal.SIGUSR1]) == signal.SIGUSR1
    # wait4 with __WALL: others do not see such a child
    import ctypes

    found = ctypes.c_int()
    assert call(61, pid, ctypes.byref(found), 0x40000000, 0) == pid
    assert os.waitstatus_to_exitcode(found.value) == 3


@case("state/registers")
def three_generations(here: Here) -> Iterator[None]:
    reading, writing = os.pipe()

    def grandchild() -> None:
        os.read(reading, 1)
        os._exit(11)

    def parent() -> None:
        pid = child(grandchild)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) + 1)

    pid = child(parent)
    yield
    os.write(writing, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 12
