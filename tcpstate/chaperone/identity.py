"""Whose connection it is: the user at the other end of the socket, and the owner of a TCP socket.

A socket belongs to the user as whom its process made or accepted it: the kernel keeps the uid in the socket's
inode, and shows it by fstat(2) and sock_diag (net/socket.c sock_alloc, ``sk_uid``).  What a privileged process makes
and hands down stays its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator

from tcpstate.chaperone.policy import ROOT
from tcpstate.connid import ConnId
from tcpstate.errors import NoSuchConnection, NotPermitted, NotYours, UnsupportedSocket
from tcpstate.kernel import diag
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import TcpState
from tcpstate.locate import take
from tcpstate.rows import describe
from tcpstate.slotted import dataclass

__all__ = ["Holder", "Peer", "conn_id_of", "cookie_of", "found", "nameless", "others_at", "passed", "peer_of"]

_UCRED = struct.Struct("=iII")  # struct ucred, include/linux/socket.h
_COOKIE = struct.Struct("=Q")
#: descriptors that are looked at for one connection: others wait meanwhile
_LOOKED_MAX = 50_000
#: what stands in /proc/PID/uid_map where every user has a number
_ALL_USERS = ["0", "0", "4294967295"]
#: states of /proc/PID/status in which a process makes no system call
_STOPPED = frozenset("Tt")


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end, as it was when it connected."""

    pid: int
    uid: int
    gid: int

    def may_use(self, uid: int) -> bool:
        """Whether sockets of that user are its own."""
        return self.uid in (uid, ROOT)


def peer_of(sock: socket.socket) -> Peer:
    """By SO_PEERCRED of a connected unix socket; the kernel translates the numbers into our namespaces."""
    return Peer(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def nameless(uid: int) -> bool:
    """Whether the number stands for users that this user namespace has no number for: all of them look alike."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        if file.read().split() == _ALL_USERS:
            return False
    with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
        return uid == int(file.read())


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Our own descriptor of a connection's socket, and the process that has it open.

    uid      whose socket it is
    pid      a process that has it open
    stopped  whether that process makes no system call now
    """

    sock: socket.socket
    conn_id: ConnId
    uid: int
    pid: int
    stopped: bool


def cookie_of(sock: socket.socket) -> int:
    """SO_COOKIE: no other socket since boot has it."""
    (cookie,) = _COOKIE.unpack(sock.getsockopt(Level.SOCKET, SO.COOKIE, _COOKIE.size))
    return int(cookie)


def _netns_cookie(sock: socket.socket) -> bytes:
    return sock.getsockopt(Level.SOCKET, SO.NETNS_COOKIE, _COOKIE.size)


def conn_id_of(sock: socket.socket) -> ConnId | None:
    """The connection that the socket is now; None if it is none."""
    try:
        local, peer = sock.getsockname(), sock.getpeername()
        return ConnId.tcp(local[0], local[1], peer[0], peer[1])
    except (OSError, ValueError):
        return None


def passed(descriptor: int, peer: Peer) -> Holder:
    """The connection whose socket the client has passed; the descriptor is taken over, or closed.

    UnsupportedSocket: no connected TCP socket of this network namespace; NotYours.
    """
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError as error:
        os.close(descriptor)
        raise UnsupportedSocket(f"what was passed is no socket: {error.strerror}") from None
    try:
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.proto != socket.IPPROTO_TCP:
            raise UnsupportedSocket("what was passed is not a TCP socket")
        with socket.socket(sock.family, socket.SOCK_STREAM) as own:
            if _netns_cookie(sock) != _netns_cookie(own):
                raise UnsupportedSocket("the socket is of another network namespace", object=describe(sock))
        uid = os.fstat(sock.fileno()).st_uid
        if not peer.may_use(uid):
            raise NotYours(f"the socket is of uid {uid}, the client is uid {peer.uid}", object=describe(sock))
        conn_id = conn_id_of(sock)
        if conn_id is None:
            raise UnsupportedSocket("the socket is not connected")
        # the client answers for it: it waits for us
        return Holder(sock=sock, conn_id=conn_id, uid=uid, pid=peer.pid, stopped=True)
    except BaseException:
        sock.close()
        raise


def found(conn_id: ConnId, peer: Peer) -> Holder:
    """The connection by its conn-ID, in whichever process of its owner has it open.

    NoSuchConnection: there is none, or no process of its owner has it; NotYours; NotPermitted.
    """
    entry = _entry(conn_id)
    name = str(conn_id)
    if not peer.may_use(entry.uid):
        raise NotYours(f"the connection is of uid {entry.uid}, the client is uid {peer.uid}", object=name)
    for pid, number in _descriptors(entry.inode, entry.uid, peer.pid):
        with contextlib.suppress(NoSuchConnection, UnsupportedSocket):
            sock = take(pid, number)
            # another file may have had the inode's number, and the process may have closed it since
            now = conn_id_of(sock)
            if now is not None and _bare(now) == _bare(entry.conn_id) and os.fstat(sock.fileno()).st_ino == entry.inode:
                stopped = pid == peer.pid or _state(pid) in _STOPPED
                return Holder(sock=sock, conn_id=now, uid=entry.uid, pid=pid, stopped=stopped)
            sock.close()
    raise NoSuchConnection("no process of its owner has this connection open", object=name)


def _entry(conn_id: ConnId) -> diag.DiagSocket:
    entry = diag.get(conn_id)
    if entry is None or _bare(entry.conn_id) != _bare(conn_id):
        # the exact look-up misses sockets that are bound to an interface
        of_port = diag.dump(local_port=conn_id.local_port)
        entry = next((each for each in of_port if _bare(each.conn_id) == _bare(conn_id)), None)
    if entry is None or entry.state is TcpState.LISTEN or not entry.inode:
        raise NoSuchConnection("there is no such connection, or nobody has it open", object=str(conn_id))
    return entry


def _bare(conn_id: ConnId) -> tuple[str, int, str, int]:
    """Without the scope of link-local addresses, which sock_diag does not name."""
    local, peer = (address.partition("%")[0] for address in (conn_id.local, conn_id.peer))
    return local, conn_id.local_port, peer, conn_id.peer_port


def _descriptors(inode: int, uid: int, first: int) -> Iterator[tuple[int, int]]:
    """Where processes of the user have a file with this inode number open; ``first`` is looked into first.

    /proc/PID/fd would take CAP_DAC_READ_SEARCH; fdinfo is open to CAP_SYS_PTRACE (fs/proc/fd.c, since 5.14).
    """
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    refused, looked = "", 0
    for pid in sorted(pids, key=lambda pid: pid != first):
        try:
            # not the user's, or not dumpable: then the user could not look into it either
            if os.stat(f"/proc/{pid}").st_uid != uid:
                continue
            numbers = os.listdir(f"/proc/{pid}/fdinfo")
        except (FileNotFoundError, ProcessLookupError):
            continue
        except PermissionError as error:
            refused = f"pid {pid}: {error.strerror}"
            continue
        looked += len(numbers)
        if looked > _LOOKED_MAX:
            raise NotPermitted("the user has too many descriptors open to look for it; pass the socket instead")
        yield from ((pid, int(number)) for number in numbers if _inode(pid, number) == inode)
    if refused:
        raise NotPermitted("descriptors of a process may not be listed; pass the socket instead", object=refused)


def _inode(pid: int, number: str) -> int:
    try:
        with open(f"/proc/{pid}/fdinfo/{number}", "rb") as file:
            for line in file:
                if line.startswith(b"ino:"):
                    return int(line[4:])
    except (FileNotFoundError, ProcessLookupError):
        # closed meanwhile
        return 0
    return 0


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("State:"):
                    return line.split()[1]
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return ""


def others_at(port: int, uid: int) -> bool:
    """Whether another user has a socket bound to this local port. What is no full socket any more (half-open, in
    TIME_WAIT) has no owner, and does not count."""
    transient = 1 << TcpState.TIME_WAIT | 1 << TcpState.NEW_SYN_RECV
    states = diag.ALL_STATES & ~transient | 1 << TcpState.LISTEN
    return any(sock.inode and sock.uid != uid for sock in diag.dump(states, local_port=port))
