"""sock_diag for TCP: which sockets there are. Source: include/uapi/linux/inet_diag.h, net/ipv4/inet_diag.c.

Window scales are not taken from here: TCP_INFO has them.
"""

from __future__ import annotations

import enum
import errno
import socket
import struct
from collections.abc import Iterator

from tcpstate.connid import ConnId
from tcpstate.kernel import md5sig, netlink
from tcpstate.kernel.sockets import is_v6, unmapped
from tcpstate.kernel.tcp import TcpInfo, TcpState
from tcpstate.slotted import dataclass

__all__ = ["ALL_STATES", "DiagSocket", "dump", "get", "md5_keys"]

_SOCK_DIAG_BY_FAMILY = 20
_REQUEST = struct.Struct("=BBBxI")  # struct inet_diag_req_v2 before its id
_ID = struct.Struct("!HH16s16s")  # struct inet_diag_sockid, ports and addresses
_ID_REST = struct.Struct("=I8s")  # interface, cookie
_NO_COOKIE = b"\xff" * 8
_HEAD = struct.Struct("=BBBB")
_TAIL = struct.Struct("=IIIII")  # expires, rqueue, wqueue, uid, inode
_ID_AT = _HEAD.size
_TAIL_AT = _ID_AT + _ID.size + _ID_REST.size
_MESSAGE_SIZE = _TAIL_AT + _TAIL.size
ALL_STATES = 0xFFF


class Extension(enum.IntEnum):
    """Attributes of an answer (INET_DIAG_*)."""

    INFO = 2
    MARK = 15
    MD5SIG = 18
    ULP_INFO = 19


_MD5_NUMBER = struct.pack("=H", Extension.MD5SIG)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagSocket:
    """One socket as sock_diag tells it.

    family          AF_INET or AF_INET6 of the socket
    state           its state; half-open requests show as SYN_RECV
    local, peer     addresses (v4-mapped ones in IPv4 form) and ports
    interface       index of the interface it is bound to, or 0
    inode           of the socket's file; 0: no process has it open (half-open, in an accept queue, TIME_WAIT)
    uid             whose socket it is (0 of what is no full socket: half-open, TIME_WAIT)
    rqueue, wqueue  unread and unacknowledged bytes; of a listener: accept queue length and limit
    mark            SO_MARK (None without CAP_NET_ADMIN)
    md5             whether it has MD5 keys; told with ``info`` only, and to who has CAP_NET_ADMIN
    info            struct tcp_info, if it was asked for and the socket is a full one
    """

    family: int
    state: TcpState
    local: str
    local_port: int
    peer: str
    peer_port: int
    interface: int
    inode: int
    uid: int
    rqueue: int
    wqueue: int
    mark: int | None
    md5: bool
    info: TcpInfo | None = None

    @property
    def conn_id(self) -> ConnId:
        """Its conn-ID (meaningless for a listener)."""
        return ConnId.tcp(self.local, self.local_port, self.peer, self.peer_port)


def _parse(body: bytes) -> DiagSocket | None:
    if len(body) < _MESSAGE_SIZE:
        return None
    family, state, _, _ = _HEAD.unpack_from(body)
    local_port, peer_port, local, peer = _ID.unpack_from(body, _ID_AT)
    interface, _ = _ID_REST.unpack_from(body, _ID_AT + _ID.size)
    _, rqueue, wqueue, uid, inode = _TAIL.unpack_from(body, _TAIL_AT)
    extra = dict(netlink.attributes(body, _MESSAGE_SIZE))
    if state == TcpState.NEW_SYN_RECV:
        state = TcpState.SYN_RECV
    mark = extra.get(Extension.MARK)
    info = extra.get(Extension.INFO)
    return DiagSocket(
        family=family,
        state=TcpState(state),
        local=_address(family, local),
        local_port=local_port,
        peer=_address(family, peer),
        peer_port=peer_port,
        interface=interface,
        inode=inode,
        uid=uid,
        rqueue=rqueue,
        wqueue=wqueue,
        mark=None if mark is None else struct.unpack("=I", mark)[0],
        md5=bool(extra.get(Extension.MD5SIG)),
        info=None if info is None else TcpInfo.unpack(info),
    )


def _address(family: int, raw: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET, raw[:4]) if family == socket.AF_INET else unmapped(raw)


def _request(family: int, states: int, sockid: bytes, *, info: bool = False) -> bytes:
    # to who has CAP_NET_ADMIN MARK comes unasked, and MD5SIG with INFO
    extensions = 1 << (Extension.INFO - 1) if info else 0
    return _REQUEST.pack(family, socket.IPPROTO_TCP, extensions, states) + sockid


def _sockid(local_port: int = 0, peer_port: int = 0, local: bytes = b"", peer: bytes = b"") -> bytes:
    return _ID.pack(local_port, peer_port, local.ljust(16, b"\0"), peer.ljust(16, b"\0")) + _ID_REST.pack(0, _NO_COOKIE)


def dump(states: int = ALL_STATES, *, local_port: int = 0, info: bool = False) -> Iterator[DiagSocket]:
    """All TCP sockets of this network namespace.

    states: bit 1 << TcpState; local_port: only those of this port; info: with their TCP_INFO.
    """
    with netlink.Netlink(netlink.Protocol.SOCK_DIAG) as channel:
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                for body in channel.dump(
                    _SOCK_DIAG_BY_FAMILY, _request(family, states, _sockid(local_port), info=info)
                ):
                    found = _parse(body)
                    # the kernel's dump of a family also shows v6 sockets that speak IPv4 only in the AF_INET6 pass
                    if found is not None and found.family == family:
                        yield found
            except OSError as error:
                # ENOENT: the kernel has no IPv6
                if error.errno not in (errno.ENOENT, errno.EAFNOSUPPORT):
                    raise


def md5_keys(states: int = ALL_STATES) -> dict[int, list[tuple[int, str, int, bytes]]]:
    """The MD5 keys of this network namespace's sockets, by inode: (family, address, prefix length, key).

    Of those that connect, are connected or listen, in these states (as in :func:`dump`); none without CAP_NET_ADMIN.
    OSError.
    """
    found: dict[int, list[tuple[int, str, int, bytes]]] = {}
    states &= ~(1 << TcpState.TIME_WAIT | 1 << TcpState.NEW_SYN_RECV)
    with netlink.Netlink(netlink.Protocol.SOCK_DIAG) as channel:
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                bodies = channel.dump(_SOCK_DIAG_BY_FAMILY, _request(family, states, _sockid(), info=True))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EAFNOSUPPORT):
                    raise
                continue
            for body in bodies:
                # nearly all sockets have none: looking for the attribute's number is quick
                if _MD5_NUMBER in body:
                    keys = dict(netlink.attributes(body, _MESSAGE_SIZE)).get(Extension.MD5SIG)
                    if keys:
                        found[_TAIL.unpack_from(body, _TAIL_AT)[4]] = md5sig.unpack_all(keys)
    return found


def get(conn_id: ConnId) -> DiagSocket | None:
    """The one socket with this conn-ID, not bound to an interface; None if there is none."""
    family = socket.AF_INET6 if is_v6(conn_id.local) else socket.AF_INET
    raw = [socket.inet_pton(family, a.partition("%")[0]) for a in (conn_id.local, conn_id.peer)]
    request = _request(family, ALL_STATES, _sockid(conn_id.local_port, conn_id.peer_port, *raw))
    with netlink.Netlink(netlink.Protocol.SOCK_DIAG) as channel:
        try:
            body = channel.get(_SOCK_DIAG_BY_FAMILY, request)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
    return _parse(body)
