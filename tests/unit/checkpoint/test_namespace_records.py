"""Records of trees in namespaces of their own: by their own numbers, written and read."""

from __future__ import annotations

import dataclasses
import os
import signal
from dataclasses import dataclass
from typing import Any

import pytest

from checkpoint.errors import ImageIncomplete
from checkpoint.files.abi import OwnerType
from checkpoint.files.base import AsyncOwner, OpenFile
from checkpoint.files.epoll import Epoll, EpollWatch
from checkpoint.files.peercred import PeerCredentials
from checkpoint.files.pidfd import PidFd
from checkpoint.files.procfile import ProcFile
from checkpoint.files.treefiles import TreeFiles
from checkpoint.files.unixqueue import Message
from checkpoint.ipc.queues import MessageQueue
from checkpoint.ipc.semaphores import SemaphoreSet, Undo
from checkpoint.kernel.mountinfo import parse
from checkpoint.kernel.mounts import MountFlag
from checkpoint.namespaces.here import number_here
from checkpoint.namespaces.ipc import IpcSettings
from checkpoint.namespaces.mounts import Mount, Mounts
from checkpoint.namespaces.network import Link, Network
from checkpoint.namespaces.numbers import Numbers
from checkpoint.namespaces.spaces import NO_SPACES, Spaces, Uts
from checkpoint.newpids import with_init
from checkpoint.tree import Task
from tcpstate.codec import pack, unpack
from tcpstate.kernel.calls import CallTable

COMMON: dict[str, Any] = {"number": 7, "key": -5, "mode": 0o640, "uid": 1, "gid": 2}
INNER = {100: 1, 101: 2, 102: 3}


def number(outer: int) -> int:
    return INNER.get(outer, 0)


def test_files_name_processes_as_the_tree_does() -> None:
    owner = AsyncOwner(type=OwnerType.PROCESS, pid=101, signal=0)
    watch = EpollWatch(number=4, pid=100, file=1, events=1, data=0)
    files: list[OpenFile] = [
        Epoll(flags=0, owner=owner, watches=(watch,)),
        PidFd(flags=0, pid=102),
        PidFd(flags=0, pid=-1),
        ProcFile(flags=0, pid=101, thread=102, name="stat"),
    ]
    told = TreeFiles(files=files, contents=[], tables={100: {4: (0, False)}}).renumbered(number)
    assert told.tables == {1: {4: (0, False)}}
    epoll, there, reaped, shown = told.files
    assert isinstance(epoll, Epoll)
    assert isinstance(there, PidFd)
    assert isinstance(reaped, PidFd)
    assert (epoll.watches[0].pid, epoll.owner) == (1, AsyncOwner(type=OwnerType.PROCESS, pid=2, signal=0))
    assert (there.pid, reaped.pid) == (3, -1)
    assert shown == ProcFile(flags=0, pid=2, thread=3, name="stat")


def test_credentials_of_outsiders_have_no_number() -> None:
    assert PeerCredentials(pid=101, uid=5, gid=6).renumbered(number).pid == 2
    assert PeerCredentials(pid=9, uid=5, gid=6).renumbered(number).pid == 0
    assert Message(data=b"", credentials=(102, 5, 6)).renumbered(number).credentials == (3, 5, 6)
    assert Message(data=b"").renumbered(number).credentials is None


def test_system_v_objects_too() -> None:
    undo = (Undo(pid=101, place=0, add=1),)
    sets = SemaphoreSet(**COMMON, values=(1, 2), last=(0, 100), undo=undo).renumbered(number)
    assert (sets.last, sets.undo[0].pid) == ((0, 1), 2)
    queue = MessageQueue(**COMMON, room=9, messages=(), sender=102, receiver=9).renumbered(number)
    assert (queue.sender, queue.receiver) == (3, 0)


def test_in_our_namespace_nothing_is_renumbered() -> None:
    same = Numbers([os.getpid()])
    task = Task(pid=100, ppid=7, pgid=9, sid=9)
    assert same.same
    assert (same(100), same.task(task)) == (100, task)


MOUNT = Mount(kind="tmpfs", source="none", at="/mnt", flags=MountFlag.NOSUID, data="size=1024k")
BIND = Mount(kind="", source="/etc", at="/opt", flags=MountFlag.RDONLY | MountFlag.RELATIME)
LINK = Link(name="eth0", mac="02:00:00:00:77:01", mtu=1500, up=True, outer="vc0", bridge="br0")


@pytest.mark.parametrize(
    "spaces",
    [
        NO_SPACES,
        Spaces(pids=True, uts=Uts(host=b"h" * 64, domain=b"")),
        Spaces(ipc=IpcSettings(values={"kernel/msgmax": "8192", "kernel/sem": "32000\t1024000000 500 32000"})),
        Spaces(mounts=Mounts(slave=True, added=(MOUNT, BIND))),
    ],
)
def test_written_and_read(spaces: Spaces) -> None:
    assert unpack(Spaces, pack(spaces)) == spaces


@pytest.mark.parametrize("name", [b"h" * 65, b"a\0b"])
def test_impossible_names(name: bytes) -> None:
    with pytest.raises(ValueError, match="host or domain"):
        Uts(host=name, domain=b"")
    with pytest.raises(ValueError, match="host or domain"):
        Uts(host=b"", domain=name)


@dataclass(frozen=True)
class Birth:
    task: Task
    exit_signal: int


@dataclass(frozen=True)
class Numbered:
    pid: int


def test_the_roots_become_children_of_the_init() -> None:
    root, child = Birth(Task(pid=50, ppid=9, pgid=50, sid=50), 17), Birth(Task(pid=51, ppid=50, pgid=50, sid=50), 0)
    init, first, second = with_init([root, child])
    assert (init.task, init.exit_signal) == (Task(pid=1, ppid=0, pgid=0, sid=0), signal.SIGCHLD)
    assert (first.task, first.exit_signal) == (Task(pid=50, ppid=1, pgid=50, sid=50), 17)
    assert second is child


def test_no_init_beside_an_init() -> None:
    with pytest.raises(ImageIncomplete):
        with_init([Birth(Task(pid=1, ppid=0, pgid=0, sid=0), 17)])


def test_numbers_here() -> None:
    assert number_here({1: Numbered(900), 2: Numbered(901)}, 2) == 901
    assert number_here({50: Numbered(50)}, 51) == 51
    assert number_here({}, 7) == 7
    assert number_here({1: Numbered(900)}, 0) == 0


def test_networks_are_written_and_read() -> None:
    network = Network(loopback=True, links=(LINK,), settings={"ipv4/conf/eth0.1/forwarding": "1"})
    assert unpack(Network, pack(network)) == network
    assert network.names == {"eth0": "eth0"}


@pytest.mark.parametrize("change", [{"name": "a/b"}, {"mac": "02:00"}, {"mtu": 1}, {"bridge": "x" * 16}, {"outer": ""}])
def test_impossible_links(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="link"):
        dataclasses.replace(LINK, **change)


@pytest.mark.parametrize("name", ["../kernel/x", "ipv4/../../kernel/core_pattern", "kernel/x", "ipv4", "ipv4/a b"])
def test_settings_of_something_else(name: str) -> None:
    with pytest.raises(ValueError, match="no setting"):
        Network(loopback=True, settings={name: "1"})
    with pytest.raises(ValueError, match="no setting"):
        IpcSettings(values={name: "1"})


def test_an_ipc_setting_is_a_number() -> None:
    with pytest.raises(ValueError, match="no setting"):
        IpcSettings(values={"kernel/msgmax": "|/bin/sh"})


def test_two_links_of_one_name() -> None:
    with pytest.raises(ValueError, match="two links"):
        Network(loopback=True, links=(LINK, LINK))


@pytest.mark.parametrize(
    "change",
    [{"kind": "ext4"}, {"at": "mnt"}, {"flags": int(MountFlag.MOVE)}, {"data": "a\0"}, {"kind": "", "source": "x"}],
)
def test_impossible_mounts(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="mount"):
        dataclasses.replace(MOUNT, **change)


def test_a_line_of_mountinfo() -> None:
    found = parse(r"36 35 98:0 /mnt1 /with\040blank rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue")
    assert (found.key, found.options) == (("/with blank", "/mnt1", "98:0", "ext3"), ("rw", "noatime"))
    assert (found.propagation, found.super) == (("master:1", "shared:2"), ("rw", "errors=continue"))


def test_calls_that_make_mounts() -> None:
    calls = CallTable()
    Mounts(slave=False, added=(MOUNT, BIND)).enter(calls, lambda path: "/elsewhere" + path)
    # unshare, private; the file system; the directory, and its flags
    assert len(calls) == 2 + 1 + 2
