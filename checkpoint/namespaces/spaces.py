"""The namespaces that are a process tree's own: what is in them, and how a new root enters such ones.

A kind is *own* if the tree's root is in another namespace of it than the tool.  All processes of the tree have to be in
the root's (:mod:`checkpoint.namespaces.verdicts`).  The rebuilt root enters new ones as soon as it is born; whom it
bears inherits them.

Source: namespaces(7), uts_namespaces(7), cgroup_namespaces(7); kernel/nsproxy.c.
"""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

from checkpoint import procfs
from checkpoint.errors import NetworkNotMovable, NoSuchProcess
from checkpoint.kernel import nsfs
from checkpoint.kernel.clone import CloneFlag
from checkpoint.namespaces import network
from checkpoint.namespaces.entering import run_in
from checkpoint.namespaces.ipc import IpcSettings
from checkpoint.namespaces.mountlook import mounts_of
from checkpoint.namespaces.mounts import Mounts
from checkpoint.namespaces.network import Network
from checkpoint.namespaces.users import Users, UserSpace
from checkpoint.state.base import TaskBuilder
from checkpoint.state.cgroup import Cgroup, Cgroups, namespace_roots, read_cgroups
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.spawn import Stub

__all__ = [
    "NO_SPACES",
    "Kind",
    "Spaces",
    "Uts",
    "at_home",
    "cgroup_roots",
    "entered",
    "entered_network",
    "inside",
    "network_reasons",
    "own_kinds",
    "own_network",
    "same_space",
    "silence_network",
    "unified",
]

#: __NEW_UTS_LEN, include/uapi/linux/utsname.h
_NAME_MAX: Final = 64


class Kind(enum.StrEnum):
    """Kinds of namespaces, by their names in /proc/PID/ns."""

    PID = "pid"
    UTS = "uts"
    IPC = "ipc"
    MNT = "mnt"
    NET = "net"
    USER = "user"
    CGROUP = "cgroup"

    @property
    def flag(self) -> CloneFlag:
        """For unshare(2) and setns(2)."""
        return CloneFlag.NEWNS if self is Kind.MNT else CloneFlag[f"NEW{self.name}"]


#: System V objects and the settings of IPC; sockets, addresses and links
_SEEN_INSIDE: Final = frozenset({Kind.IPC, Kind.NET})


def _link(pid: int | str, name: str) -> str:
    """What tells a namespace from others; empty if the kernel has no such kind. NoSuchProcess."""
    try:
        return os.readlink(f"/proc/{pid}/ns/{name}")
    except (FileNotFoundError, ProcessLookupError) as error:
        # one that is about to end is still there, but in no namespace any more
        if isinstance(pid, str) or procfs.lives(pid):
            return ""
        raise NoSuchProcess("the process does not exist, or has just ended", object=f"pid {pid}") from error


def same_space(name: str, first: int | str, second: int | str) -> bool:
    """Whether two processes (``thread-self``: we) are in the same namespace of this kind, named as in /proc/PID/ns.
    NoSuchProcess."""
    return _link(first, name) == _link(second, name)


#: the namespaces that are ours while we are in a tree's (:func:`entered`), and descriptors of them
_home: dict[Kind, str] = {}
_ways_home: dict[Kind, int] = {}


def own_kinds(root: int) -> frozenset[Kind]:
    """The kinds of which a process is in another namespace than we, or than we were before :func:`entered`; none if it
    is a zombie. NoSuchProcess."""
    if procfs.read_stat(root).zombie:
        return frozenset()
    return frozenset(kind for kind in Kind if _link(root, kind) != (_home.get(kind) or _link("thread-self", kind)))


@contextmanager
def entered(root: int, kinds: frozenset[Kind] = _SEEN_INSIDE) -> Iterator[None]:
    """The calling thread is in those namespaces of a process that are its own and that have things in them which are
    only seen from inside, as long as the block lasts. NoSuchProcess, OSError."""
    with ExitStack() as stack:
        for kind in (kinds & own_kinds(root)) - _home.keys():
            home, way = _link("thread-self", kind), os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, way)
            stack.enter_context(inside(root, kind))
            _home[kind], _ways_home[kind] = home, way
            stack.callback(_home.pop, kind)
            stack.callback(_ways_home.pop, kind)
        yield


@contextmanager
def entered_network(inode: int) -> Iterator[bool]:
    """The calling thread is in the network namespace with this inode number, if a process here is in it, as long as
    the block lasts. Whether it is. OSError."""
    if os.stat("/proc/thread-self/ns/net").st_ino == inode:
        yield True
        return
    pid = next((pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _network_of(pid) == inode), 0)
    with entered(pid, frozenset({Kind.NET})) if pid else nullcontext():
        yield bool(pid)


@contextmanager
def at_home() -> Iterator[None]:
    """The calling thread is in the network namespace that it was started in, as long as the block lasts."""
    with network.entered(_ways_home[Kind.NET]) if Kind.NET in _ways_home else nullcontext():
        yield


def _network_of(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0  # it has ended, or is not ours to see


def own_network(root: int) -> Network | None:
    """The network namespace of a tree, if it is its own and :func:`entered`. NetworkNotMovable, OSError."""
    own = own_kinds(root)
    if Kind.NET not in own:
        return None
    users = Users.of(root) if Kind.USER in own else None
    owner = users if users is not None and users.network else None
    return dataclasses.replace(Network.of(_ways_home[Kind.NET]), owner=owner)


def silence_network(root: int) -> None:
    """If a tree has a network namespace of its own, in which we are: its links go down. NoSuchProcess, OSError."""
    if Kind.NET in own_kinds(root):
        network.silence()


def network_reasons() -> list[NetworkNotMovable]:
    """What speaks against it, inside of it. OSError."""
    return list(network.judge(_ways_home[Kind.NET]))


@contextmanager
def inside(pid: int, kind: Kind) -> Iterator[None]:
    """The calling thread is in this namespace of a process, as long as the block lasts. OSError; not for PID, mount and
    user namespaces."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    back = os.open(f"/proc/thread-self/ns/{kind}", flags)
    try:
        there = os.open(f"/proc/{pid}/ns/{kind}", flags)
        try:
            syscall(SYS.setns, there, kind.flag)
        finally:
            os.close(there)
        try:
            yield
        finally:
            syscall(SYS.setns, back, kind.flag)
    finally:
        os.close(back)


@dataclass(frozen=True, slots=True, kw_only=True)
class Uts:
    """What a UTS namespace has: the host's name, and its NIS domain."""

    host: bytes
    domain: bytes

    def __post_init__(self) -> None:
        if max(len(self.host), len(self.domain)) > _NAME_MAX or b"\0" in self.host + self.domain:
            raise ValueError("the name of a host or domain is too long, or holds a zero byte")

    @classmethod
    def of(cls, pid: int) -> Uts:
        """That of a process. OSError."""
        with inside(pid, Kind.UTS):
            host = os.fsencode(os.uname().nodename)
            with open("/proc/sys/kernel/domainname", "rb") as file:
                return cls(host=host, domain=file.read().rstrip(b"\n"))

    def enter(self, calls: CallTable) -> None:
        """Queue what makes such a namespace, and enters it."""
        calls.call(SYS.unshare, CloneFlag.NEWUTS, label="unshare the UTS namespace")
        calls.call(SYS.sethostname, calls.put(self.host + b"\0"), len(self.host), label="set the host's name")
        calls.call(SYS.setdomainname, calls.put(self.domain + b"\0"), len(self.domain), label="set the domain's name")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spaces:
    """The namespaces that are a tree's own.

    pids    a PID namespace: the tree's root is its first process
    uts     a UTS namespace; None: the host's
    ipc     an IPC namespace; None: the host's
    mounts  a mount namespace; None: the host's
    users   a user namespace, to which the others belong; None: the tool's
    cgroups where a cgroup namespace begins, by hierarchy; None: the tool's
    """

    pids: bool = False
    uts: Uts | None = None
    ipc: IpcSettings | None = None
    mounts: Mounts | None = None
    users: Users | None = None
    cgroups: tuple[Cgroup, ...] | None = None

    @classmethod
    def of(cls, roots: Sequence[int]) -> Spaces:
        """Those of trees that may move (verdicts() has said so). NoSuchProcess, OSError."""
        root = roots[0]
        own = own_kinds(root)
        cgroups = cgroup_roots(root) if Kind.CGROUP in own else None
        return cls(
            pids=Kind.PID in own,
            uts=Uts.of(root) if Kind.UTS in own else None,
            ipc=_settings(root) if Kind.IPC in own else None,
            mounts=mounts_of(root, unified(cgroups)) if Kind.MNT in own else None,
            users=Users.of(root) if Kind.USER in own else None,
            cgroups=cgroups,
        )

    @property
    def owner(self) -> tuple[int, int]:
        """User and group that may make files in what is mounted for the tree, by our numbers."""
        users = self.users
        return (os.geteuid(), os.getegid()) if users is None else (users.uids[0].outside, users.gids[0].outside)

    def user_space(self) -> UserSpace | None:
        """One like theirs: that which our network namespace is in, if theirs is. NamespaceNotMade."""
        if self.users is None:
            return None
        if not self.users.network:
            return UserSpace(self.users)
        own = nsfs.opened("thread-self", Kind.NET)
        try:
            return UserSpace(self.users, like=own)
        finally:
            os.close(own)

    def enter(self, stub: Stub, path: Callable[[str], str], warn: Callable[[str], None]) -> None:
        """Let a root that was just born enter new ones; in a PID namespace it was born. NamespaceNotMade.

        path  maps a path of the source to one here
        warn  told of what will differ
        """
        calls = CallTable()
        if self.cgroups is not None:
            # it begins where its maker is; the processes come into their own groups at the end
            task = TaskBuilder(pid=stub.pid, tid=stub.pid, warn=warn)
            Cgroups(groups=self.cgroups).rebuild(task)
            task.run_outside()
            calls.call(SYS.unshare, CloneFlag.NEWCGROUP, label="unshare the cgroup namespace")
        if self.uts is not None:
            self.uts.enter(calls)
        if self.ipc is not None:
            calls.call(SYS.unshare, CloneFlag.NEWIPC, label="unshare the IPC namespace")
        if self.mounts is not None:
            self.mounts.enter(calls, path)
        run_in(stub, calls)
        if self.ipc is not None:
            with inside(stub.pid, Kind.IPC):
                self.ipc.give()

    def follow(self, stub: Stub, first: Stub) -> None:
        """A stub that was born outside, and is in the user namespace, comes to where the first one is. Both are in our
        PID namespace. NamespaceNotMade."""
        kinds = {Kind.UTS: self.uts, Kind.IPC: self.ipc, Kind.CGROUP: self.cgroups, Kind.MNT: self.mounts}
        flags = sum(kind.flag for kind, made in kinds.items() if made is not None)
        if flags:
            calls = CallTable()
            fd = calls.call(SYS.pidfd_open, first.pid, 0, label="open the first process")
            calls.call(SYS.setns, fd, flags, label="enter the namespaces of the first process")
            calls.call(SYS.close, fd, label="close it")
            run_in(stub, calls)

    def join(self, pid: int, stack: ExitStack) -> None:
        """The calling thread is in that of a rebuilt process's namespaces which things are made in for it, until the
        stack is unwound. OSError."""
        if self.ipc is not None:
            stack.enter_context(inside(pid, Kind.IPC))


def cgroup_roots(root: int) -> tuple[Cgroup, ...] | None:
    """Where the cgroup namespace of a tree begins; None: that cannot be told, since the tree's root has left it.
    NoSuchProcess, OSError."""
    seen = read_cgroups(root)
    with inside(root, Kind.CGROUP):
        return namespace_roots(seen, read_cgroups(root))


def unified(cgroups: Sequence[Cgroup] | None) -> str:
    """The group of version 2 that a cgroup namespace begins at."""
    return next((one.path for one in cgroups or () if not one.hierarchy), "/")


def _settings(root: int) -> IpcSettings:
    with inside(root, Kind.IPC):
        return IpcSettings.read()


NO_SPACES: Final = Spaces()
