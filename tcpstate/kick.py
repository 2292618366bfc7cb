"""Deferred timers of a resumed connection: what could not leave goes out at once.

While a connection is frozen its timers run, its packets go nowhere, and the timeout doubles each time: after a minute
the next try may be another minute away.  Doubling is for congestion, and there was none.

What was written into the silence counts as never sent (the kernel knows that it found no route); pushing it, as
TCP_NODELAY does, sends it.  For what was sent before, RFC 6069 has the very case of a route that was gone and is back:
an ICMP "unreachable" for a segment on its way takes one doubling back, and what is due by the shorter timeout is sent
at once.  So the resume tells the connection that its peer had been unreachable, once for each doubling; the messages
are injected here and leave no host.

Source: net/ipv4/tcp.c __tcp_sock_set_nodelay; net/ipv4/tcp_ipv4.c tcp_ld_RTO_revert, tcp_v4_err; net/ipv6/tcp_ipv6.c
tcp_v6_err; RFC 6069.
"""

from __future__ import annotations

import logging
import socket
import struct
from typing import Final

from tcpstate.connid import ConnId
from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.bpf import tcpsock
from tcpstate.kernel.sockets import IP, IPV6, Ioctl, Level, ioctl_int
from tcpstate.kernel.tcp import INFO_SIZE, TCP
from tcpstate.kernel.tcpinfo import unpack_fields
from tcpstate.segment import Flag, Segment, build, checksum

__all__ = ["doublings", "kick", "unreachable"]

log = logging.getLogger(__name__)

_V4_HEADER: Final = 20
#: of the packet that could not be delivered an ICMP message quotes the IP header and 8 bytes (RFC 792)
_QUOTED: Final = 8
_ICMP_UNREACHABLE: Final = 3
_ICMP_HOST: Final = 1
_ICMPV6_UNREACHABLE: Final = 1
_ICMPV6_NO_ROUTE: Final = 0
_HOPS: Final = 255


def kick(sock: socket.socket, conn_id: ConnId, oldest: int | None = None) -> None:
    """Let what waits in the send queue of a connection leave, which lives again and whose address is local. OSError.

    oldest  the sequence number of its oldest byte on the way, where it was read; None: BPF tells
    """
    if ioctl_int(sock.fileno(), Ioctl.SIOCOUTQNSD) and not sock.getsockopt(Level.TCP, TCP.CORK):
        delay_off = sock.getsockopt(Level.TCP, TCP.NODELAY)
        sock.setsockopt(Level.TCP, TCP.NODELAY, 1)
        sock.setsockopt(Level.TCP, TCP.NODELAY, delay_off)
    _take_back(sock, conn_id, oldest)


def doublings(sock: socket.socket) -> int:
    """How often the retransmission timeout has doubled."""
    info = unpack_fields(sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE))
    return info.get("backoff", 0) if info.get("retransmits") else 0


def _take_back(sock: socket.socket, conn_id: ConnId, oldest: int | None) -> int:
    """Take back the doublings of the retransmission timeout; how many messages that took.

    Nothing is done if the owner wants to hear of such messages itself (IP_RECVERR): then it waits for its timeout.  An
    ACK that has come since ``oldest`` was read has taken them all back.
    """
    count = doublings(sock)
    level, option = (Level.IPV6, IPV6.RECVERR) if conn_id.v6 else (Level.IP, IP.RECVERR)
    if not count or sock.getsockopt(level, option):
        return 0
    if oldest is None:
        try:
            told = tcpsock.read({"snd_una"}, wanted=conn_id.__eq__)
        except KernelFeatureMissing as error:
            log.debug("%s waits for its timeout: %s", conn_id, error)
            return 0
        if conn_id not in told:
            return 0
        oldest = told[conn_id].values["snd_una"]
    message = unreachable(conn_id, oldest)
    family = socket.AF_INET6 if conn_id.v6 else socket.AF_INET
    local, _, scope = conn_id.local.partition("%")
    to = (local, 0, 0, socket.if_nametoindex(scope) if scope else 0) if conn_id.v6 else (local, 0)
    with socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as out:
        for _ in range(count):
            out.sendto(message, to)
    return count


def unreachable(conn_id: ConnId, seq: int) -> bytes:
    """The IP packet that says that the segment with this sequence number could not be delivered."""
    local, peer = (address.partition("%")[0] for address in (conn_id.local, conn_id.peer))
    sent = build(
        Segment(
            source=local, source_port=conn_id.local_port, destination=peer, destination_port=conn_id.peer_port,
            seq=seq, ack=0, flags=int(Flag.ACK), window=0,
        )
    )  # fmt: skip
    if conn_id.v6:
        body = struct.pack("!BBHI", _ICMPV6_UNREACHABLE, _ICMPV6_NO_ROUTE, 0, 0) + sent
        ends = socket.inet_pton(socket.AF_INET6, peer) + socket.inet_pton(socket.AF_INET6, local)
        pseudo = ends + struct.pack("!II", len(body), socket.IPPROTO_ICMPV6)
        body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
        return struct.pack("!IHBB", 6 << 28, len(body), socket.IPPROTO_ICMPV6, _HOPS) + ends + body
    body = struct.pack("!BBHI", _ICMP_UNREACHABLE, _ICMP_HOST, 0, 0) + sent[: _V4_HEADER + _QUOTED]
    body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    ends = socket.inet_pton(socket.AF_INET, peer) + socket.inet_pton(socket.AF_INET, local)
    head = struct.pack("!BBHHHBBH", 0x45, 0, _V4_HEADER + len(body), 0, 0, _HOPS, socket.IPPROTO_ICMP, 0)
    return head[:10] + struct.pack("!H", checksum(head + ends)) + ends + body
