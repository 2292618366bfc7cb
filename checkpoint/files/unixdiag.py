"""What the kernel tells of AF_UNIX sockets through sock_diag, and no getsockopt: peer, queue lengths, shutdown,
backlog.

Source: include/uapi/linux/unix_diag.h, net/unix/diag.c. A dump covers the network namespace of the calling thread.
"""

from __future__ import annotations

import enum
import socket
import stat
import struct
from typing import TYPE_CHECKING, Final

from checkpoint.errors import FileCaptureFailed
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.base import FdView

__all__ = ["SocketState", "UnixSocket", "parse_dump", "peer_outside", "unix_sockets"]

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLM_F_REQUEST_DUMP: Final = 0x301
_HEADER: Final = struct.Struct("<IHHII")  # struct nlmsghdr
_REQUEST: Final = struct.Struct("<BBHIIIII")  # struct unix_diag_req
_MESSAGE: Final = struct.Struct("<BBBBIII")  # struct unix_diag_msg
_ATTRIBUTE: Final = struct.Struct("<HH")
_ANY_COOKIE: Final = 0xFFFFFFFF


class _Show(enum.IntFlag):
    NAME = 0x1
    VFS = 0x2
    PEER = 0x4
    ICONS = 0x8
    RQLEN = 0x10


class _Attribute(enum.IntEnum):
    NAME = 0
    VFS = 1
    PEER = 2
    ICONS = 3
    RQLEN = 4
    SHUTDOWN = 6


class SocketState(enum.IntEnum):
    """States of sockets as sock_diag names them (net/tcp_states.h)."""

    ESTABLISHED = 1
    SYN_SENT = 2
    CLOSE = 7
    LISTEN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixSocket:
    """One AF_UNIX socket of the network namespace.

    peer      inode of the socket at the other end; 0: none (any more), or it is not accepted yet; None: not connected
    vfs       (inode, device) of the name in the file system, if it was bound to a path
    icons     inodes of the sockets that wait in a listener's backlog; 0 where that one is gone
    rqueue    listener: connections waiting; else bytes to read
    wqueue    listener: the backlog that listen() was given
    shutdown  1 (no more reading) and 2 (no more writing), added
    """

    inode: int
    type: int
    state: int
    name: bytes = b""
    peer: int | None = None
    vfs: tuple[int, int] | None = None
    icons: tuple[int, ...] = ()
    rqueue: int = 0
    wqueue: int = 0
    shutdown: int = 0


def unix_sockets() -> dict[int, UnixSocket]:
    """All AF_UNIX sockets of this network namespace that a descriptor leads to, by inode."""
    show = _Show.NAME | _Show.VFS | _Show.PEER | _Show.ICONS | _Show.RQLEN
    request = _REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, show, _ANY_COOKIE, _ANY_COOKIE)
    found: dict[int, UnixSocket] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as link:
        header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0)
        link.send(header + request)
        done = False
        while not done:
            done, some = parse_dump(link.recv(1 << 18))
            found.update((entry.inode, entry) for entry in some if entry.inode)
    return found


def parse_dump(data: bytes) -> tuple[bool, list[UnixSocket]]:
    """(whether the dump is over, the sockets in this part of it)."""
    found: list[UnixSocket] = []
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, message, *_ = _HEADER.unpack_from(data, offset)
        if message == _NLMSG_DONE:
            return True, found
        if message == _NLMSG_ERROR or length < _HEADER.size + _MESSAGE.size or offset + length > len(data):
            raise FileCaptureFailed("sock_diag does not list AF_UNIX sockets (CONFIG_UNIX_DIAG)", object="netlink")
        found.append(_parse(data[offset + _HEADER.size : offset + length]))
        offset += length + -length % 4
    return False, found


def _parse(data: bytes) -> UnixSocket:
    _, kind, state, _, inode, _, _ = _MESSAGE.unpack_from(data)
    attributes: dict[int, bytes] = {}
    at = _MESSAGE.size
    while at + _ATTRIBUTE.size <= len(data):
        length, number = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        attributes[number] = data[at + _ATTRIBUTE.size : at + length]
        at += length + -length % 4
    peer = attributes.get(_Attribute.PEER)
    vfs = attributes.get(_Attribute.VFS)
    icons = attributes.get(_Attribute.ICONS, b"")
    queues = struct.unpack("<II", attributes.get(_Attribute.RQLEN, bytes(8)))
    return UnixSocket(
        inode=inode,
        type=kind,
        state=state,
        name=attributes.get(_Attribute.NAME, b""),
        peer=None if peer is None else struct.unpack("<I", peer)[0],
        vfs=None if vfs is None else struct.unpack("<II", vfs),
        icons=struct.unpack(f"<{len(icons) // 4}I", icons),
        rqueue=queues[0],
        wqueue=queues[1],
        shutdown=attributes.get(_Attribute.SHUTDOWN, b"\0")[0],
    )


def peer_outside(view: FdView) -> bool:
    """Whether the socket is a connected AF_UNIX socket whose other end is not in the tree."""
    if not stat.S_ISSOCK(view.stat.st_mode) or view.dup < 0 or view.socket.family != socket.AF_UNIX:
        return False
    state = view.table.unix_sockets.get(view.stat.st_ino)
    return state is not None and bool(state.peer) and view.table.index_of_socket(state.peer or 0) is None
