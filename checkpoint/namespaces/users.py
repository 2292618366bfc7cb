"""A user namespace: whom the IDs in it mean outside, and how the processes of a rebuilt tree come into one like it.

All of our records have the IDs of the tool's namespace, since /proc shows them so; only the calls that a process makes
inside need its own (:meth:`Users.user`).  What is told of the namespace: the two maps, whether setgroups(2) is allowed,
its owner, and the supplementary groups with which its first process came in, which need not be in the map.

The rebuilt one is made and held by a *keeper*: a process of ours that has a copy of our memory, our very descriptors,
and all capabilities in the namespace.  Stubs enter it by a pidfd of the keeper, which they have in the place of the
tool's: from inside they may take no descriptors of the tool any more (security/commoncap.c, cap_ptrace_access_check),
but the keeper's they may.  It ends before the processes run, or with us.

Source: user_namespaces(7); kernel/user_namespace.c (create_user_ns, map_write, userns_install), kernel/groups.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import os
import resource
import signal
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, Self

from checkpoint import procfs
from checkpoint.errors import (
    IdOutsideOfMap,
    NamespaceNotMade,
    NestedNamespace,
    NoSuchProcess,
    OwnedFromOutside,
    SharedInUserNamespace,
)
from checkpoint.kernel import nsfs
from checkpoint.kernel.clone import CloneArgs, CloneFlag
from checkpoint.kernel.kcmp import KcmpType, Known
from checkpoint.namespaces.entering import run_in
from tcpstate.errors import TcpmigError
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.prctl import Pr, Securebit
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.spawn import Stub

__all__ = ["Extent", "UserSpace", "Users", "judge"]

#: UID_GID_MAP_MAX_EXTENTS, include/linux/user_namespace.h
_MOST_EXTENTS: Final = 340
#: one more than the highest ID: (uid_t) -1 is none
_IDS: Final = (1 << 32) - 1
_MOST_GROUPS: Final = 65536
_UNCHANGED: Final = (1 << 64) - 1
_DENY: Final = "deny"
#: RLIM_NLIMITS
_LIMITS: Final = 16
#: limits that stand in the way of building
_IN_THE_WAY: Final = (
    resource.RLIMIT_MEMLOCK,
    resource.RLIMIT_MSGQUEUE,
    resource.RLIMIT_SIGPENDING,
    resource.RLIMIT_NPROC,
)


@dataclass(frozen=True, slots=True)
class Extent:
    """``count`` IDs from ``inside`` on mean those from ``outside`` on, which are the tool's."""

    inside: int
    outside: int
    count: int

    def __post_init__(self) -> None:
        if min(self.inside, self.outside) < 0 or self.count < 1 or max(self.inside, self.outside) + self.count > _IDS:
            raise ValueError("IDs of a user namespace out of range")


def _disjoint(extents: Sequence[Extent]) -> bool:
    for starts in ([(e.inside, e.count) for e in extents], [(e.outside, e.count) for e in extents]):
        starts.sort()
        if any(start + count > after for (start, count), (after, _) in itertools.pairwise(starts)):
            return False
    return True


def _inside(extents: Sequence[Extent], outside: int) -> int | None:
    for extent in extents:
        if 0 <= outside - extent.outside < extent.count:
            return extent.inside + outside - extent.outside
    return None


def _parse(text: str) -> tuple[Extent, ...]:
    """A uid_map or gid_map, as the tool reads it."""
    return tuple(Extent(*map(int, line.split())) for line in text.splitlines())


@dataclass(frozen=True, slots=True, kw_only=True)
class Users:
    """A user namespace directly below the tool's.

    uids, gids  the maps
    setgroups   whether processes inside may choose their supplementary groups
    owner       user ID outside of who made it: that user's processes have all capabilities in it
    groups      supplementary groups of the tree's root, outside; some may not be in the map
    network     whether the tree's network namespace belongs to it
    """

    uids: tuple[Extent, ...]
    gids: tuple[Extent, ...]
    setgroups: bool
    owner: int
    groups: tuple[int, ...] = ()
    network: bool = False

    def __post_init__(self) -> None:
        for extents in (self.uids, self.gids):
            if not 1 <= len(extents) <= _MOST_EXTENTS or not _disjoint(extents):
                raise ValueError("a map of IDs is empty or too long, or has one twice")
        if len(self.groups) > _MOST_GROUPS or any(not 0 <= one < _IDS for one in (self.owner, *self.groups)):
            raise ValueError("a user or group ID out of range, or too many")

    @classmethod
    def of(cls, root: int) -> Self:
        """That of a tree. NoSuchProcess, OSError; IdOutsideOfMap: it cannot be made again."""
        try:
            users = cls.read(root)
        except ValueError:
            raise IdOutsideOfMap("no IDs are mapped into its user namespace", object=f"pid {root}") from None
        for error in _strangers(root, users):
            raise error
        return users

    @classmethod
    def read(cls, pid: int) -> Self:
        """That of a process. NoSuchProcess, OSError, ValueError: nothing is mapped."""
        status = procfs.read_status(pid)
        space = nsfs.opened(pid, "user")
        try:
            owner = nsfs.owner_uid(space)
        finally:
            os.close(space)
        return cls(
            uids=_parse(_read(pid, "uid_map")),
            gids=_parse(_read(pid, "gid_map")),
            setgroups=_read(pid, "setgroups").strip() != _DENY,
            owner=owner,
            groups=tuple(map(int, status["Groups"].split())),
            network=_owner_of(pid, "net") == _number(pid),
        )

    def user(self, outside: int) -> int | None:
        """What a user ID of ours is inside; None: nothing."""
        return _inside(self.uids, outside)

    def group(self, outside: int) -> int | None:
        """What a group ID of ours is inside; None: nothing."""
        return _inside(self.gids, outside)

    def lacks(self, users: Iterable[int], group_ids: Iterable[int], groups: Sequence[int]) -> str:
        """Why a thread with these IDs cannot be made inside; empty if it can."""
        for what, ids, inside in (("user", users, self.user), ("group", group_ids, self.group)):
            for one in ids:
                if inside(one) is None:
                    return f"its {what} ID {one} is not in the map of its user namespace"
        if sorted(groups) == sorted(self.groups):
            return ""  # it was born with them
        if not self.setgroups:
            return "it has other supplementary groups than the first process, where setgroups is denied"
        for one in groups:
            if self.group(one) is None:
                return f"its supplementary group {one} is not in the map of its user namespace"
        return ""


def _read(pid: int, name: str) -> str:
    with open(f"/proc/{pid}/{name}", encoding="ascii") as file:
        return file.read()


def _number(pid: int) -> int:
    return os.stat(f"/proc/{pid}/ns/user").st_ino


def _owner_of(pid: int, kind: str) -> int:
    """The number of the user namespace that a namespace of a process belongs to; 0: one that is not ours to see."""
    space = nsfs.opened(pid, kind)
    try:
        owner = nsfs.owning(space)
    except PermissionError:
        return 0
    finally:
        os.close(space)
    try:
        return os.fstat(owner).st_ino
    finally:
        os.close(owner)


# -- judging


def judge(root: int, kinds: Iterable[str], members: Sequence[int]) -> Iterator[TcpmigError]:
    """What speaks against a tree in a user namespace of its own. NoSuchProcess, OSError.

    kinds    of the other namespaces that are the tree's own, as in /proc/PID/ns
    members  its processes
    """
    name = f"pid {root}"
    space = nsfs.opened(root, "user")
    try:
        above = nsfs.parent(space)
        ours = os.fstat(above).st_ino == os.stat("/proc/thread-self/ns/user").st_ino
        os.close(above)
    except PermissionError:
        ours = False
    finally:
        os.close(space)
    if not ours:
        yield NestedNamespace("its user namespace is not directly below tcpmig's", object=name)
        return
    kinds = tuple(kinds)
    for kind in kinds:
        owner = _owner_of(root, kind)
        if owner != _number(root) and not (kind == "net" and owner == os.stat("/proc/thread-self/ns/user").st_ino):
            yield OwnedFromOutside(f"its {kind} namespace does not belong to its user namespace", object=name)
    try:
        yield from _strangers(root, Users.read(root))
    except ValueError:
        yield IdOutsideOfMap("no IDs are mapped into its user namespace", object=name)
        return
    if "pid" not in kinds:
        yield from _sharing(members)


def _strangers(root: int, users: Users) -> Iterator[IdOutsideOfMap]:
    for pid in procfs.tree(root):
        with contextlib.suppress(NoSuchProcess):
            for tid in procfs.threads(pid):
                status = procfs.read_status(pid, tid)
                ids = [[int(one) for one in status[line].split()] for line in ("Uid", "Gid", "Groups")]
                lacking = "" if status["State"].startswith("Z") else users.lacks(*ids)
                if lacking:
                    yield IdOutsideOfMap(lacking, object=f"pid {pid}" if tid == pid else f"pid {pid} thread {tid}")


def _sharing(members: Sequence[int]) -> Iterator[SharedInUserNamespace]:
    """Each process enters by itself there, and one that shares its directories may not."""
    known = Known(KcmpType.FS)
    for pid in members:
        with contextlib.suppress(ProcessLookupError):
            if procfs.lives(pid) and (first := known.first(pid)) != pid:
                yield SharedInUserNamespace(f"it shares its directories with pid {first}", object=f"pid {pid}")


# -- making


class UserSpace:
    """A user namespace that is here, and its keeper. Close it.

    pid    of the keeper
    pidfd  of it
    """

    def __init__(self, users: Users, *, network: bool = False, like: int = -1) -> None:
        """Make it. ``network``: the keeper gets a network namespace, too, that belongs to it; ``like``: it is the one
        that this descriptor of another namespace belongs to. NamespaceNotMade."""
        self.users = users
        owner = -1
        try:
            if like >= 0:
                owner = nsfs.owning(like)
            self.pid = _keeper(users.owner, owner, network=network)
        except OSError as error:
            raise NamespaceNotMade(f"a user namespace: {error.strerror}", object="user namespace") from error
        finally:
            if owner >= 0:
                os.close(owner)
        self.pidfd = os.pidfd_open(self.pid)
        try:
            if like < 0:
                self._map()
            elif (_parse(_read(self.pid, "uid_map")), _parse(_read(self.pid, "gid_map"))) != (users.uids, users.gids):
                raise NamespaceNotMade("its network namespace is in another one now", object="user namespace")
        except BaseException:
            self.close()
            raise

    def _map(self) -> None:
        texts = [] if self.users.setgroups else [("setgroups", _DENY)]
        for name, extents in (("uid_map", self.users.uids), ("gid_map", self.users.gids)):
            texts.append((name, "".join(f"{one.inside} {one.outside} {one.count}\n" for one in extents)))
        for name, text in texts:
            try:
                # in one write: a second one is refused
                with open(f"/proc/{self.pid}/{name}", "wb", buffering=0) as file:
                    file.write(text.encode())
            except OSError as error:
                raise NamespaceNotMade(f"its {name}: {error.strerror}", object="user namespace") from error

    def enter(self, stub: Stub) -> None:
        """A stub that has the keeper's pidfd comes in, with the supplementary groups that it cannot choose inside.
        NamespaceNotMade."""
        _raise_limits(stub.pid)
        groups = self.users.groups
        calls = CallTable()
        array = calls.put(struct.pack(f"<{len(groups)}I", *groups))
        calls.call(SYS.setgroups, len(groups), array, label="set the supplementary groups")
        calls.call(SYS.setns, stub.tool_pidfd, CloneFlag.NEWUSER, label="enter the user namespace")
        # becoming another user inside must not cost the capabilities: that the credentials do at the end
        calls.call(SYS.prctl, Pr.SET_SECUREBITS, Securebit.NO_SETUID_FIXUP, label="keep the capabilities")
        run_in(stub, calls)
        stub.chooses_numbers, stub.users = False, self.users

    def close(self) -> None:
        """The keeper ends; the namespace does so with the last process in it. May be repeated."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self.pidfd)
            self.pidfd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _raise_limits(pid: int) -> None:
    """From inside limits can only be lowered: so they are as high as they may be before."""
    with open("/proc/sys/fs/nr_open", encoding="ascii") as file:
        descriptors = int(file.read())
    for number in range(_LIMITS):
        soft, hard = resource.prlimit(pid, number)
        highest = descriptors if number == resource.RLIMIT_NOFILE else resource.RLIM_INFINITY
        # without CAP_SYS_RESOURCE no process that we make can have more
        with contextlib.suppress(PermissionError):
            resource.prlimit(pid, number, (soft, highest))
            hard = highest
        if number in _IN_THE_WAY:
            resource.prlimit(pid, number, (hard, hard))


def _keeper(owner: int, space: int, *, network: bool) -> int:
    """A child of ours, stopped, with our descriptors, in the user namespace ``space`` (-1: a new one of ``owner``).
    OSError."""
    args = CloneArgs(CloneFlag.FILES | CloneFlag.CLEAR_SIGHAND, signal.SIGCHLD).pack()
    data = ctypes.create_string_buffer(args, len(args))
    collects = gc.isenabled()
    gc.disable()  # in the child what is collected would close descriptors of ours
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    tool = os.getpid()
    try:
        number = syscall(SYS.clone3, ctypes.addressof(data), len(args))
        if not number:
            _keep(tool, owner, space, network=network)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if collects:
            gc.enable()
    _, status = os.waitpid(number, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        code = os.waitstatus_to_exitcode(status)
        raise OSError(code, os.strerror(code) if code > 0 else "the process that makes it was killed")
    return number


def _keep(tool: int, owner: int, space: int, *, network: bool) -> None:
    """In the child: make or enter it, and stop there."""
    failed = 0
    try:
        if space >= 0:
            syscall(SYS.setns, space, CloneFlag.NEWUSER)
        else:
            # its capabilities outlast the change of the ID that the namespace's owner is taken from
            syscall(SYS.prctl, Pr.SET_SECUREBITS, Securebit.NO_SETUID_FIXUP)
            syscall(SYS.setresuid, _UNCHANGED, owner, _UNCHANGED)
            syscall(SYS.unshare, CloneFlag.NEWUSER)
        if network:
            syscall(SYS.unshare, CloneFlag.NEWNET)
        syscall(SYS.prctl, Pr.SET_DUMPABLE, 1)  # a change of credentials may have taken it, and the descriptors with it
        syscall(SYS.prctl, Pr.SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == tool:
            os.kill(os.getpid(), signal.SIGSTOP)
    except OSError as error:
        failed = error.errno or 0
    finally:
        os._exit(failed)
