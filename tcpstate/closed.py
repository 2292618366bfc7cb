"""Connections that have ended while their owner still holds the socket.

What is left of one is what its owner can still get from it: unread data, and the error that the next call reports.
Sequence numbers, windows and queues can be read in repair mode as those of a living one; the peer's address too, though
not by getpeername().

The error itself cannot be asked for: SO_ERROR, and every call that fails with it, takes it away, and nothing can put it
back on a socket that has ended.  poll() tells that there is one, and BPF which; without BPF it is inferred from how far
the connection had come.  At the target the kernel is made to set it, by what sets it in life::

    ECONNRESET    the rebuilt connection gets a RST of its peer
    EPIPE         the peer's FIN first, then the RST
    ECONNREFUSED  connect() to a port of this host where nobody listens
    none          both FINs, as sent and received long ago: the socket has ended, what is unread can be read, and
                  TIME_WAIT answers for it should the peer repeat its FIN

All of it in repair mode and with the freeze's mark: no peer hears of it.

Source: net/ipv4/tcp_input.c tcp_reset, tcp_fin; net/ipv4/tcp.c tcp_done, tcp_poll; net/core/sock.c sk_getsockopt.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import sys
from typing import Final

from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.sockets import SO, Level
from tcpstate.record import ConnectionRecord

__all__ = ["ESTABLISHED_ERRORS", "error_to_set", "nearest", "peer_name", "pending_error"]

log = logging.getLogger(__name__)

#: errors that can be set on a connection that was established; anything else becomes the first
ESTABLISHED_ERRORS: Final = ("ECONNRESET", "EPIPE")
_REFUSED: Final = "ECONNREFUSED"
_NAME_SIZES: Final = {socket.AF_INET: 16, socket.AF_INET6: 28}  # struct sockaddr_in, sockaddr_in6


def peer_name(sock: socket.socket) -> bytes:
    """struct sockaddr of the peer, also of a socket that is not connected yet or any more; b"" if it never was."""
    try:
        return sock.getsockopt(Level.SOCKET, SO.PEERNAME, _NAME_SIZES[socket.AddressFamily(sock.family)])
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return b""
        raise


def pending_error(sock: socket.socket, *, established: bool) -> tuple[str, bool]:
    """The name of the error that an ended socket will report, "" for none, and whether that is known, not inferred. It
    stays pending.

    established  whether the connection had been
    """
    poll = select.poll()
    poll.register(sock, 0)  # POLLERR is always told
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return "", True
    # few sockets need it
    from tcpstate.kernel.bpf.sockerror import pending_errors

    cookie = int.from_bytes(sock.getsockopt(Level.SOCKET, SO.COOKIE, 8), sys.byteorder)
    try:
        name = errno.errorcode.get(pending_errors().get(cookie, 0), "")
    except (KernelFeatureMissing, OSError) as error:
        log.debug("which error is pending is inferred: %s", error)
        name = ""
    return (name, True) if name else (_settable(established)[0], False)


def _settable(established: bool) -> tuple[str, ...]:
    return ESTABLISHED_ERRORS if established else (_REFUSED,)


def nearest(error: str, *, established: bool) -> str:
    """The error that a rebuilt socket can be given for this one; "" for none."""
    possible = _settable(established)
    return error if not error or error in possible else possible[0]


def error_to_set(record: ConnectionRecord) -> str:
    """The error that a rebuilt socket gets; where that is not the recorded one, it is logged as a warning."""
    found = nearest(record.error, established=not record.unopened)
    if found != record.error:
        log.warning("%s ended with %s; its owner will see %s", record.conn_id, record.error, found)
    return found
