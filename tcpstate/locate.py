"""From a conn-ID to the socket: which connections there are, who owns them, and a descriptor of our own for one.

Reads sock_diag of the calling thread's network namespace, and /proc/PID/fd of what processes this PID namespace shows.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Collection, Iterable, Iterator, Sequence

from tcpstate.connid import ConnId
from tcpstate.errors import NoSuchConnection, NotPermitted, UnsupportedSocket
from tcpstate.kernel import diag
from tcpstate.kernel.sockets import Level, pidfd_getfd
from tcpstate.kernel.tcp import INFO_SIZE, TCP, TcpInfo, TcpState
from tcpstate.silence import MARK
from tcpstate.slotted import dataclass

__all__ = [
    "Backlog",
    "Located",
    "Owner",
    "connections",
    "find",
    "listener_backlog",
    "listening_ports",
    "look_up",
    "orphans",
    "owners_of",
    "take",
    "take_all",
    "unaccepted",
]


@dataclass(frozen=True, slots=True, order=True)
class Owner:
    """A process and its descriptor of the socket."""

    pid: int
    fd: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """One connection of this network namespace.

    conn_id       its name
    family        AF_INET or AF_INET6 of its socket
    state         its state
    inode         inode number of the socket's file; 0: nobody has it open (half-open, in an accept queue, TIME_WAIT)
    owners        who has it open, as far as this PID namespace shows
    uid           user whose socket it is (0 of what is no full socket: half-open, TIME_WAIT)
    receive_queue unread bytes
    send_queue    bytes not acknowledged by the peer
    frozen        it carries the mark of a freeze (:mod:`tcpstate.freeze`); False without CAP_NET_ADMIN
    info          struct tcp_info, where it was asked for
    """

    conn_id: ConnId
    family: int
    state: TcpState
    inode: int
    owners: tuple[Owner, ...]
    receive_queue: int
    send_queue: int
    frozen: bool = False
    info: TcpInfo | None = None
    uid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """What a listening socket has not yet handed out.

    accepted   complete connections in its accept queue
    half_open  requests whose handshake is not complete
    """

    accepted: int
    half_open: int

    @property
    def empty(self) -> bool:
        """Whether nothing waits."""
        return not self.accepted and not self.half_open


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def owners_of(inodes: Collection[int] | None = None, pids: Iterable[int] | None = None) -> dict[int, list[Owner]]:
    """Who has these sockets open (all if None), by inode. Processes that end meanwhile or are hidden do not show.

    NotPermitted if a process that was named (``pids``) may not be looked into.
    """
    named = pids is not None
    found: dict[int, list[Owner]] = {}
    for pid in _pids() if pids is None else pids:
        directory = f"/proc/{pid}/fd"
        try:
            names = os.listdir(directory)
        except (FileNotFoundError, ProcessLookupError):
            continue
        except PermissionError:
            if named:
                raise NotPermitted("its descriptors may not be listed", object=f"pid {pid}") from None
            continue
        for name in names:
            try:
                target = os.readlink(f"{directory}/{name}")
            except OSError:
                # closed meanwhile
                continue
            if target.startswith("socket:["):
                inode = int(target[8:-1])
                if inodes is None or inode in inodes:
                    found.setdefault(inode, []).append(Owner(pid, int(name)))
    return found


def _located(sock: diag.DiagSocket, owners: dict[int, list[Owner]]) -> Located:
    return Located(
        conn_id=sock.conn_id,
        family=sock.family,
        state=sock.state,
        inode=sock.inode,
        owners=tuple(sorted(owners.get(sock.inode, ()))) if sock.inode else (),
        receive_queue=sock.rqueue,
        send_queue=sock.wqueue,
        frozen=sock.mark == MARK,
        info=sock.info,
        uid=sock.uid,
    )


def connections(pids: Iterable[int] | None = None, *, info: bool = False) -> list[Located]:
    """The TCP connections of this network namespace; with ``pids`` only those that one of these processes has open.

    info: with their TCP_INFO.

    Listeners are not among them.  A closed socket (reset by the peer, not yet closed by its owner) is in no table of
    the kernel and is not found here.
    """
    everyone = diag.ALL_STATES & ~(1 << TcpState.LISTEN)
    if pids is None:
        found = list(diag.dump(everyone, info=info))
        owners = owners_of({sock.inode for sock in found})
    else:
        owners = owners_of(pids=list(pids))
        found = [sock for sock in diag.dump(everyone, info=info) if sock.inode and sock.inode in owners]
    return [_located(sock, owners) for sock in found]


def listening_ports(pids: Iterable[int]) -> set[int]:
    """The ports of the TCP listeners that one of these processes has open."""
    owners = owners_of(pids=list(pids))
    return {sock.local_port for sock in diag.dump(1 << TcpState.LISTEN) if sock.inode in owners}


def orphans(states: Collection[TcpState]) -> list[Located]:
    """The connections in one of these states that nobody has open: closed by their owners, with segments under way."""
    mask = sum(1 << state for state in states)
    return [_located(sock, {}) for sock in diag.dump(mask) if not sock.inode]


def find(conn_id: ConnId) -> Located:
    """The connection with this conn-ID, and its owners; NoSuchConnection if there is none."""
    sock = look_up(conn_id)
    if sock is None:
        raise NoSuchConnection("there is no such connection", object=str(conn_id))
    return _located(sock, owners_of({sock.inode}) if sock.inode else {})


def look_up(conn_id: ConnId) -> diag.DiagSocket | None:
    """The connection with this conn-ID as sock_diag tells it; None if there is none. Its owners are not looked for."""
    sock = diag.get(conn_id)
    if sock is None or sock.state is TcpState.LISTEN or sock.conn_id != conn_id:
        # the exact look-up misses sockets that are bound to an interface
        wanted = [s for s in diag.dump(local_port=conn_id.local_port) if s.state is not TcpState.LISTEN]
        sock = next((s for s in wanted if _same(s.conn_id, conn_id)), None)
    return sock


def _same(found: ConnId, wanted: ConnId) -> bool:
    """Equal but for the scope of link-local addresses, which sock_diag tells as an interface index."""

    def bare(conn_id: ConnId) -> tuple[str, int, str, int]:
        local, peer = (a.partition("%")[0] for a in (conn_id.local, conn_id.peer))
        return local, conn_id.local_port, peer, conn_id.peer_port

    return bare(found) == bare(wanted)


def take(pid: int, fd: int) -> socket.socket:
    """Our own descriptor for the socket that is ``fd`` in process ``pid``: the same open file, not a copy.

    NoSuchConnection: no such process or descriptor; NotPermitted: the kernel forbids it; UnsupportedSocket: not TCP.
    """
    return take_all([Owner(pid, fd)])[0]


def take_all(owners: Sequence[Owner]) -> list[socket.socket]:
    """:func:`take` for many: all of them, or none and the first failure."""
    taken: list[socket.socket] = []
    pidfds: dict[int, int] = {}
    try:
        for owner in owners:
            taken.append(_take(owner, pidfds))
    except BaseException:
        for sock in taken:
            sock.close()
        raise
    finally:
        for pidfd in pidfds.values():
            os.close(pidfd)
    return taken


def _take(owner: Owner, pidfds: dict[int, int]) -> socket.socket:
    what = f"pid {owner.pid} fd {owner.fd}"
    try:
        if owner.pid not in pidfds:
            pidfds[owner.pid] = os.pidfd_open(owner.pid)
        fd = pidfd_getfd(pidfds[owner.pid], owner.fd)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EBADF, errno.EINVAL):
            raise NoSuchConnection(f"there is no such descriptor: {error.strerror}", object=what) from None
        if error.errno == errno.EPERM:
            raise NotPermitted("its descriptors may not be taken (ptrace access is needed)", object=what) from None
        raise
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        os.close(fd)
        raise UnsupportedSocket(f"this is not a socket: {error.strerror}", object=what) from None
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.proto != socket.IPPROTO_TCP:
        sock.close()
        raise UnsupportedSocket("this is not a TCP socket", object=what)
    return sock


def accept_queues(listeners: Sequence[socket.socket]) -> list[int]:
    """How many complete connections wait in the accept queue of each listening socket: cheap, without a dump of all
    sockets. UnsupportedSocket for one that does not listen."""
    lengths = []
    for listener in listeners:
        info = TcpInfo.unpack(listener.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE))
        if info.state != TcpState.LISTEN:
            raise UnsupportedSocket("this is not a listening socket", object=f"fd {listener.fileno()}")
        lengths.append(info.unacked)
    return lengths


def listener_backlog(listeners: Sequence[socket.socket]) -> list[Backlog]:
    """How many connections wait in or before the accept queue of each listening socket.

    Half-open requests are counted by port and address; where listeners share both (SO_REUSEPORT) each counts them all.
    """
    half_open = list(diag.dump(1 << TcpState.SYN_RECV | 1 << TcpState.NEW_SYN_RECV))
    found = []
    for listener, waiting in zip(listeners, accept_queues(listeners), strict=True):
        half = [one for one in half_open if _hears(listener, one.conn_id)]
        found.append(Backlog(accepted=waiting, half_open=len(half)))
    return found


def unaccepted(listeners: Sequence[socket.socket]) -> list[ConnId]:
    """The connections that wait in or before the accept queues of these listening sockets, and of others that share
    port and address with them."""
    # a connection that its owner has closed is in another state
    waiting = (TcpState.ESTABLISHED, TcpState.CLOSE_WAIT, TcpState.SYN_RECV, TcpState.NEW_SYN_RECV)
    states = sum(1 << state for state in waiting)
    ports = {listener.getsockname()[1] for listener in listeners}
    nobodys = [one.conn_id for port in ports for one in diag.dump(states, local_port=port) if not one.inode]
    return [conn for conn in nobodys if any(_hears(listener, conn) for listener in listeners)]


def _hears(listener: socket.socket, conn: ConnId) -> bool:
    address, port = listener.getsockname()[:2]
    bare = address.partition("%")[0].removeprefix("::ffff:")
    return conn.local_port == port and bare in ("0.0.0.0", "::", conn.local.partition("%")[0])
