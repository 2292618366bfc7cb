"""Stubs in a user namespace: what the kernel allows from inside, and what the keeper is for."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoint import lastpid
from checkpoint.errors import NamespaceNotMade, PidTaken
from checkpoint.kernel import nsfs
from checkpoint.kernel.clone import CloneFlag
from checkpoint.namespaces.users import Extent, Users, UserSpace
from checkpoint.procfs import read_status
from checkpoint.spawn import Stub, spawn_stub
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.calls import CallError, CallTable
from tcpstate.kernel.machine import SYS

#: stubs of ours take the numbers that others have found free
pytestmark = pytest.mark.alone

MAP = (Extent(0, 100000, 10),)
USERS = Users(uids=MAP, gids=MAP, setgroups=True, owner=1234, groups=(55,))


@pytest.fixture
def space() -> Iterator[UserSpace]:
    with UserSpace(USERS) as made:
        yield made


@pytest.fixture
def stub(space: UserSpace) -> Iterator[Stub]:
    made = spawn_stub(None, [], space.pid)
    try:
        space.enter(made)
        yield made
    finally:
        made.kill()


def failed(stub: Stub, number: int, *args: int) -> int:
    calls = CallTable()
    calls.call(number, *args, label="try")
    try:
        stub.run(calls)
    except CallError as error:
        return error.errno or -1
    return 0


def test_the_namespace_is_as_it_was_told(space: UserSpace, stub: Stub) -> None:
    fd = nsfs.opened(stub.pid, "user")
    above = nsfs.parent(fd)
    assert os.fstat(above).st_ino == os.stat("/proc/self/ns/user").st_ino
    assert nsfs.owner_uid(fd) == 1234
    os.close(above)
    os.close(fd)
    assert Users.read(stub.pid) == USERS
    assert read_status(stub.pid)["CapEff"].lstrip("0") == read_status(stub.pid)["CapBnd"].lstrip("0") != ""


def test_setgroups_may_be_denied() -> None:
    users = Users(uids=MAP, gids=MAP, setgroups=False, owner=0)
    with UserSpace(users) as space:
        assert Path(f"/proc/{space.pid}/setgroups").read_text() == "deny\n"


def test_a_stub_takes_descriptors_of_the_keeper_and_not_ours(stub: Stub) -> None:
    reader, writer = os.pipe()  # made after the keeper: its table of descriptors is ours
    try:
        assert failed(stub, SYS.pidfd_getfd, stub.tool_pidfd, writer, 0) == 0
    finally:
        os.close(reader)
        os.close(writer)
    calls = CallTable()
    tool = calls.call(SYS.pidfd_open, os.getpid(), 0, label="open the tool")
    calls.call(SYS.pidfd_getfd, tool, 0, 0, label="take")
    with pytest.raises(CallError) as caught:
        stub.run(calls)
    assert (caught.value.label, caught.value.errno) == ("take", errno.EPERM)


def among_ourselves(work: Callable[[], None]) -> None:
    """Where nobody else has children: in a PID namespace of our own, with its /proc."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            syscall(SYS.unshare, CloneFlag.NEWPID | CloneFlag.NEWNS)
            inner = os.fork()
            if inner:
                status = os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])
            else:
                subprocess.run(["mount", "--make-rprivate", "/"], check=True)
                subprocess.run(["mount", "-t", "proc", "proc", "/proc"], check=True)
                work()
                status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@contextlib.contextmanager
def inside() -> Iterator[Stub]:
    with UserSpace(USERS) as space:
        stub = spawn_stub(None, [], space.pid)
        try:
            space.enter(stub)
            yield stub
        finally:
            stub.kill()


def test_threads_get_their_numbers_by_counting() -> None:
    def work() -> None:
        with inside() as stub:
            stub.clone_threads([500, 501])
            assert [thread.tid for thread in stub.threads] == [stub.pid, 500, 501]
            with pytest.raises(PidTaken):
                lastpid.next_is(500)

    among_ourselves(work)


def test_where_a_number_is_taken_the_threads_before_it_end_too() -> None:
    def work() -> None:
        with inside() as stub, inside() as other:
            with pytest.raises(PidTaken):
                stub.clone_threads([500, other.pid])
            assert len(stub.threads) == 2
            pid = stub.pid
        assert not Path(f"/proc/{pid}").exists()

    among_ourselves(work)


def test_a_thread_with_another_number_is_dismissed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else has a child between the telling and the birth."""
    tell, told = lastpid.next_is, []

    def interfered(number: int | None) -> None:
        tell(number)
        told.append(number)
        if len(told) == 1:
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)

    def work() -> None:
        with inside() as stub:
            stub.clone_threads([600])
            assert [thread.tid for thread in stub.threads] == [stub.pid, 600]
            assert len(told) == 2
            assert sorted(map(int, os.listdir(f"/proc/{stub.pid}/task"))) == [stub.pid, 600]

    monkeypatch.setattr("checkpoint.spawn.next_is", interfered)
    among_ourselves(work)


def test_from_inside_a_number_outside_cannot_be_chosen(stub: Stub) -> None:
    stub.chooses_numbers = True
    with pytest.raises(Exception, match="Operation not permitted"):
        stub.clone_threads([stub.pid + 70])


def test_a_process_with_threads_cannot_enter(space: UserSpace) -> None:
    stub = spawn_stub(None, [], space.pid)
    try:
        stub.clone_threads([None])
        with pytest.raises(NamespaceNotMade, match="enter the user namespace: Invalid argument"):
            space.enter(stub)
    finally:
        stub.kill()


def test_a_namespace_belongs_to_whom_it_was_made_by() -> None:
    with UserSpace(USERS, network=True) as space:
        own, theirs = nsfs.opened(space.pid, "net"), nsfs.opened(space.pid, "user")
        owner = nsfs.owning(own)
        assert os.fstat(owner).st_ino == os.fstat(theirs).st_ino
        with UserSpace(USERS, like=own) as again:
            assert os.stat(f"/proc/{again.pid}/ns/user").st_ino == os.fstat(theirs).st_ino
        other = Users(uids=MAP, gids=(Extent(0, 5, 1),), setgroups=True, owner=1234)
        with pytest.raises(NamespaceNotMade, match="another one now"):
            UserSpace(other, like=own)
        for fd in (owner, own, theirs):
            os.close(fd)


def test_the_keeper_ends_with_us() -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, str(UserSpace(USERS).pid).encode())
            signal.pause()
        finally:
            os._exit(1)
    keeper = int(os.read(reading, 20))
    os.close(reading)
    os.close(writing)
    assert Path(f"/proc/{keeper}/status").exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    end = time.monotonic() + 10
    while Path(f"/proc/{keeper}").exists() and read_status(keeper)["State"][0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_map_that_the_kernel_refuses_is_named(space: UserSpace) -> None:
    with pytest.raises(NamespaceNotMade, match="its uid_map: Operation not permitted"):
        space._map()  # it can be written once
