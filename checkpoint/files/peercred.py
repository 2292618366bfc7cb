"""Who is at the other end of a local socket (SO_PEERCRED, SO_PEERGROUPS), and how a rebuilt one shows the same.

The kernel notes the process and the credentials of whoever calls socketpair, listen or connect.  So the call is made in
the new process that has that number, with the user and groups of then for the time being: it is born with the tool's,
and gets its own only later.  Where no process of the tree has the number (a daemon that started the program and is
gone, a process outside), the call is made in one that has the socket: user and groups are right, the number is its own.

Source: net/unix/af_unix.c (init_peercred, copy_peercred), net/core/sock.c (SO_PEERCRED, SO_PEERGROUPS).
"""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, Protocol, Self

from checkpoint import procfs
from checkpoint.errors import FileRebuildFailed, NoSuchProcess
from checkpoint.files.abi import pidfd_getfd
from tcpstate.kernel.calls import CallError, CallTable, Data, Result
from tcpstate.kernel.capability import capset_data, capset_header
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import SO, Level
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.namespaces.users import Users

__all__ = ["Actors", "PeerCredentials"]

_UCRED: Final = struct.Struct("=iII")  # struct ucred
_GROUP: Final = struct.Struct("=I")
_GROUPS_MAX: Final = 65536
_NOBODY: Final = 0xFFFFFFFF
_SAME: Final = 0xFFFFFFFF
_AF_UNIX_PATH: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCredentials:
    """What a socket shows of whoever is at its other end.

    pid     0: of a process that has no number here
    groups  the supplementary ones
    """

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ids = (self.uid, self.gid, *self.groups)
        if self.pid < 0 or any(not 0 <= one < _NOBODY for one in ids) or len(self.groups) > _GROUPS_MAX:
            raise ValueError("credentials of a peer out of range")

    def renumbered(self, number: Callable[[int], int]) -> PeerCredentials:
        """With the process as another PID namespace numbers it; 0: it has no number there."""
        return dataclasses.replace(self, pid=number(self.pid))

    @classmethod
    def of(cls, sock: socket.socket) -> Self | None:
        """What ``sock`` shows; None: nothing, since it is not connected."""
        pid, uid, gid = _UCRED.unpack(sock.getsockopt(Level.SOCKET, SO.PEERCRED, _UCRED.size))
        if uid == _NOBODY or gid == _NOBODY:
            return None
        return cls(pid=pid, uid=uid, gid=gid, groups=_groups(sock))

    @classmethod
    def of_process(cls, pid: int) -> Self | None:
        """What a socket that this process connects now would show; None: it has just ended."""
        try:
            status = procfs.read_status(pid)
        except NoSuchProcess:
            return None
        groups = tuple(map(int, status["Groups"].split()))
        return cls(pid=pid, uid=int(status["Uid"].split()[1]), gid=int(status["Gid"].split()[1]), groups=groups)


def _groups(sock: socket.socket) -> tuple[int, ...]:
    try:
        data = sock.getsockopt(Level.SOCKET, SO.PEERGROUPS, 64 * _GROUP.size)
    except OSError as error:
        if error.errno != errno.ERANGE:
            return ()  # ENODATA: none are noted; an older kernel does not know the question
        data = sock.getsockopt(Level.SOCKET, SO.PEERGROUPS, _GROUPS_MAX * _GROUP.size)
    return tuple(one for (one,) in _GROUP.iter_unpack(data))


class Stub(Protocol):
    """What is needed of a new process (``spawn.Stub`` has it)."""

    @property
    def pid(self) -> int: ...

    tool_pidfd: int
    users: Users | None

    @property
    def pidfd(self) -> int: ...
    def run(self, table: CallTable) -> None: ...


class Actors:
    """The new processes, who make calls on local sockets in their own names.

    stubs   by the PIDs of the source; without any all is done by us
    """

    def __init__(self, stubs: Mapping[int, Stub]) -> None:
        self._stubs = stubs

    def socketpair(self, type: int, who: PeerCredentials | None, holder: int) -> tuple[socket.socket, socket.socket]:
        """A pair whose ends both show ``who``. OSError, FileRebuildFailed.

        holder  a process that has one of the sockets
        """
        stub = self._stub(who, holder)
        if stub is None or who is None:
            return socket.socketpair(socket.AF_UNIX, type)
        calls = CallTable()
        numbers = calls.room(8)

        def act() -> None:
            calls.call(SYS.socketpair, socket.AF_UNIX, type | socket.SOCK_CLOEXEC, 0, numbers, label="socketpair")

        self._as(stub, who, calls, act)
        fds = numbers.u32(), numbers.u32(4)
        first, second = (socket.socket(fileno=pidfd_getfd(stub.pidfd, fd)) for fd in fds)
        calls = CallTable()
        for fd in fds:
            calls.call(SYS.close, fd, label="close an end of a pair")
        stub.run(calls)
        return first, second

    def listen(self, sock: socket.socket, backlog: int, who: PeerCredentials | None, holder: int) -> None:
        """sock.listen(), so that who connects is shown ``who``. OSError, FileRebuildFailed."""
        stub = self._stub(who, holder)
        if stub is None or who is None:
            sock.listen(backlog)
            return
        calls = CallTable()
        fd = self._given(stub, calls, sock.fileno())
        self._as(stub, who, calls, lambda: calls.call(SYS.listen, fd, backlog, label="listen"), fd)

    def connect(
        self, sock: socket.socket, address: bytes, folder: int, who: PeerCredentials | None, holder: int
    ) -> None:
        """sock.connect(), so that the other end is shown ``who``. OSError, FileRebuildFailed.

        folder  of ours, of the directory that a relative path starts from; -1: there is none
        """
        stub = self._stub(who, holder)
        if stub is None or who is None:
            sock.connect(address if folder < 0 else os.fsencode(f"/proc/self/fd/{folder}/") + address)
            return
        calls = CallTable()
        fd = self._given(stub, calls, sock.fileno())
        name = struct.pack("=H", socket.AF_UNIX) + address
        name += b"" if address.startswith(b"\0") else b"\0"
        there = calls.put(name)
        extra: tuple[Result, ...] = ()
        if folder >= 0:
            # its own directory it gets later
            at = self._given(stub, calls, folder)
            calls.call(SYS.fchdir, at, label="enter the directory of a local socket")
            extra = (at,)
        self._as(stub, who, calls, lambda: calls.call(SYS.connect, fd, there, len(name), label="connect"), fd, *extra)

    def _stub(self, who: PeerCredentials | None, holder: int) -> Stub | None:
        # without the right to become somebody else, everybody is who the tool is
        if who is None or os.geteuid() != 0:
            return None
        return self._stubs.get(who.pid) or self._stubs.get(holder)

    @staticmethod
    def _given(stub: Stub, calls: CallTable, fd: int) -> Result:
        """The number, in the stub, of a descriptor of ours."""
        return calls.call(SYS.pidfd_getfd, stub.tool_pidfd, fd, 0, label="take a local socket")

    @staticmethod
    def _as(stub: Stub, who: PeerCredentials, calls: CallTable, act: Callable[[], object], *close: Result) -> None:
        """Run ``calls`` with what ``act`` adds, which is done by ``who``; then close these."""
        before = procfs.read_status(stub.pid)
        old = tuple(map(int, before["Groups"].split()))
        permitted, inheritable = int(before["CapPrm"], 16), int(before["CapInh"], 16)
        _become(stub, calls, old, who.groups, who.gid, who.uid)
        # whoever is not root loses what makes capabilities effective; the way to a socket may need them
        data = calls.put(capset_data(effective=permitted, permitted=permitted, inheritable=inheritable))
        header = calls.put(capset_header())
        calls.call(SYS.capset, header, data, label="keep the capabilities")
        act()
        _become(stub, calls, who.groups, old, int(before["Gid"].split()[1]), int(before["Uid"].split()[1]))
        for fd in close:
            calls.call(SYS.close, fd, label="close a local socket")
        try:
            stub.run(calls)
        except CallError as error:
            name = f"pid {stub.pid}"
            raise FileRebuildFailed(f"{error.label}: {os.strerror(error.errno or 0)}", object=name) from error


def _become(stub: Stub, calls: CallTable, now: tuple[int, ...], groups: tuple[int, ...], gid: int, uid: int) -> None:
    """The effective user and groups; the real ones stay, and lead back. In a user namespace who is nobody there cannot
    be become: the stub stays who it is.

    now  the supplementary groups that it has before
    """
    users = stub.users
    if users is not None:
        known = [users.group(one) for one in groups]
        inside = tuple(one for one in known if one is not None)
        may = users.setgroups and len(inside) == len(known) and sorted(groups) != sorted(now)
        gid, uid = (_SAME if one is None else one for one in (users.group(gid), users.user(uid)))
    else:
        inside, may = groups, True
    array: Data = calls.put(b"".join(map(_GROUP.pack, inside)))
    if may:
        calls.call(SYS.setgroups, len(inside), array, label="setgroups for a local socket")
    calls.call(SYS.setresgid, _SAME, gid, _SAME, label="setresgid for a local socket")
    calls.call(SYS.setresuid, _SAME, uid, _SAME, label="setresuid for a local socket")
