"""Socket options, ioctls and addresses. Source: include/uapi, asm-generic/socket.h, linux/in.h, in6.h, sockios.h."""

from __future__ import annotations

import _socket
import enum
import fcntl
import socket
import struct

from tcpstate.kernel import batch
from tcpstate.kernel.machine import SYS

__all__ = [
    "IP",
    "IPV6",
    "SO",
    "BufferLock",
    "Ioctl",
    "Level",
    "family_of",
    "ioctl_int",
    "pack_address",
    "unpack_address",
]

#: AF_UNSPEC in a full struct sockaddr: connect() with it dissolves a connection
UNSPECIFIED_ADDRESS = bytes(16)
#: what getsockname() may write (struct sockaddr_in6)
ADDRESS_SIZE = 28
#: IFNAMSIZ of linux/if.h
DEVICE_NAME_SIZE = 16


_FAMILY = _socket.socket.family.__get__


class Level(enum.IntEnum):
    """The level argument of getsockopt and setsockopt."""

    IP = 0
    SOCKET = 1
    TCP = 6
    IPV6 = 41


class SO(enum.IntEnum):
    """Options of level SOL_SOCKET (asm-generic/socket.h). The _OLD forms take the machine's native time structures."""

    DEBUG = 1
    REUSEADDR = 2
    TYPE = 3
    ERROR = 4
    DONTROUTE = 5
    BROADCAST = 6
    SNDBUF = 7
    RCVBUF = 8
    KEEPALIVE = 9
    OOBINLINE = 10
    NO_CHECK = 11
    PRIORITY = 12
    LINGER = 13
    REUSEPORT = 15
    PASSCRED = 16
    PEERCRED = 17
    RCVLOWAT = 18
    RCVTIMEO_OLD = 20
    SNDTIMEO_OLD = 21
    BINDTODEVICE = 25
    ATTACH_FILTER = 26  # as getsockopt: SO_GET_FILTER
    DETACH_FILTER = 27
    PEERNAME = 28  # the peer also of a socket that is not connected yet, or any more
    TIMESTAMP_OLD = 29
    ACCEPTCONN = 30
    SNDBUFFORCE = 32
    RCVBUFFORCE = 33
    TIMESTAMPNS_OLD = 35
    MARK = 36
    TIMESTAMPING_OLD = 37
    PROTOCOL = 38
    DOMAIN = 39
    RXQ_OVFL = 40
    WIFI_STATUS = 41
    PEEK_OFF = 42
    NOFCS = 43
    LOCK_FILTER = 44
    SELECT_ERR_QUEUE = 45
    BUSY_POLL = 46
    MAX_PACING_RATE = 47
    INCOMING_CPU = 49
    ATTACH_BPF = 50
    MEMINFO = 55
    COOKIE = 57
    PEERGROUPS = 59
    ZEROCOPY = 60
    TXTIME = 61
    BINDTOIFINDEX = 62
    TIMESTAMP_NEW = 63
    TIMESTAMPNS_NEW = 64
    TIMESTAMPING_NEW = 65
    RCVTIMEO_NEW = 66
    SNDTIMEO_NEW = 67
    PREFER_BUSY_POLL = 69
    BUSY_POLL_BUDGET = 70
    NETNS_COOKIE = 71  # since 5.14
    BUF_LOCK = 72  # since 5.14
    RESERVE_MEM = 73
    TXREHASH = 74
    RCVMARK = 75
    RCVPRIORITY = 82


class BufferLock(enum.IntFlag):
    """SO_BUF_LOCK: which buffers the application has sized itself, so that autotuning leaves them alone."""

    SEND = 1
    RECEIVE = 2


class IP(enum.IntEnum):
    """Options of level IPPROTO_IP (linux/in.h)."""

    TOS = 1
    TTL = 2
    HDRINCL = 3
    OPTIONS = 4
    RECVOPTS = 6
    RETOPTS = 7
    PKTINFO = 8
    MTU_DISCOVER = 10
    RECVERR = 11
    RECVTTL = 12
    RECVTOS = 13
    FREEBIND = 15
    PASSSEC = 18
    TRANSPARENT = 19
    RECVORIGDSTADDR = 20
    MINTTL = 21
    NODEFRAG = 22
    CHECKSUM = 23
    BIND_ADDRESS_NO_PORT = 24
    RECVERR_RFC4884 = 26
    MULTICAST_TTL = 33
    MULTICAST_LOOP = 34
    MULTICAST_ALL = 49
    UNICAST_IF = 50
    LOCAL_PORT_RANGE = 51


class IPV6(enum.IntEnum):
    """Options of level IPPROTO_IPV6 (linux/in6.h)."""

    RECVPKTINFO_2292 = 2
    RECVHOPOPTS_2292 = 3
    RECVDSTOPTS_2292 = 4
    RECVRTHDR_2292 = 5
    RECVHOPLIMIT_2292 = 8
    FLOWINFO = 11
    UNICAST_HOPS = 16
    MULTICAST_HOPS = 18
    MULTICAST_LOOP = 19
    MTU_DISCOVER = 23
    RECVERR = 25
    V6ONLY = 26
    MULTICAST_ALL = 29
    ROUTER_ALERT_ISOLATE = 30
    RECVERR_RFC4884 = 31
    FLOWINFO_SEND = 33
    RECVPKTINFO = 49
    PKTINFO = 50
    RECVHOPLIMIT = 51
    HOPLIMIT = 52
    RECVHOPOPTS = 53
    HOPOPTS = 54
    RTHDRDSTOPTS = 55
    RECVRTHDR = 56
    RTHDR = 57
    RECVDSTOPTS = 58
    DSTOPTS = 59
    RECVPATHMTU = 60
    DONTFRAG = 62
    RECVTCLASS = 66
    TCLASS = 67
    AUTOFLOWLABEL = 70
    ADDR_PREFERENCES = 72
    MINHOPCOUNT = 73
    RECVORIGDSTADDR = 74
    TRANSPARENT = 75
    UNICAST_IF = 76
    RECVFRAGSIZE = 77
    FREEBIND = 78


class Ioctl(enum.IntEnum):
    """Requests of sockets (asm-generic/ioctls.h, linux/sockios.h). Results are ints."""

    SIOCINQ = 0x541B
    SIOCOUTQ = 0x5411
    SIOCOUTQNSD = 0x894B
    SIOCATMARK = 0x8905


def ioctl_int(fd: int, request: Ioctl) -> int:
    """The int that an ioctl of a socket writes."""
    value: int = struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))[0]
    return value


def family_of(sock: socket.socket) -> int:
    """``sock.family`` as a bare number: the property of :class:`socket.socket` makes an enum of it, 1 us each time."""
    found: int = _FAMILY(sock)
    return found


def is_v6(address: str) -> bool:
    """Whether the text is an IPv6 address."""
    return ":" in address


def pack_address(address: str, port: int, *, family: int, flow_info: int = 0, scope: int = 0) -> bytes:
    """struct sockaddr_in or sockaddr_in6. An IPv4 address of a family AF_INET6 socket is written v4-mapped."""
    if family == socket.AF_INET:
        return (
            struct.pack("=H", family) + struct.pack("!H", port) + socket.inet_pton(socket.AF_INET, address) + bytes(8)
        )
    if not is_v6(address):
        address = f"::ffff:{address}"
    packed = socket.inet_pton(socket.AF_INET6, address)
    return struct.pack("=H", family) + struct.pack("!HI", port, flow_info) + packed + struct.pack("=I", scope)


def unpack_address(data: bytes) -> tuple[str, int, int, int]:
    """(address, port, flow info, scope) of a struct sockaddr_in or sockaddr_in6; a v4-mapped address in IPv4 form."""
    family = struct.unpack_from("=H", data)[0]
    (port,) = struct.unpack_from("!H", data, 2)
    if family == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, data[4:8]), port, 0, 0
    if family != socket.AF_INET6:
        raise ValueError(f"address family {family} is not an internet family")
    (flow_info,) = struct.unpack_from("!I", data, 4)
    (scope,) = struct.unpack_from("=I", data, 24)
    raw = data[8:24]
    return unmapped(raw), port, flow_info, scope


#: ::ffff:0:0/96, the prefix of v4-mapped addresses (RFC 4291 2.5.5.2)
MAPPED_PREFIX = bytes(10) + b"\xff\xff"


def unmapped(raw: bytes) -> str:
    """Text of a 16-byte address; a v4-mapped one in IPv4 form."""
    if raw[:12] == MAPPED_PREFIX:
        return socket.inet_ntop(socket.AF_INET, raw[12:])
    return socket.inet_ntop(socket.AF_INET6, raw)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """Our own descriptor for the open file that is ``fd`` in the process of ``pidfd`` (since 5.6)."""
    return batch.syscall(SYS.pidfd_getfd, pidfd, fd, 0)
