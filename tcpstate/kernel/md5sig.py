"""TCP MD5 signatures: keys as the kernel gives them out and takes them.

Source: include/uapi/linux/tcp.h (struct tcp_md5sig, struct tcp_diag_md5sig), net/ipv4/tcp_diag.c.
"""

from __future__ import annotations

import enum
import socket
import struct
from typing import Final

__all__ = ["DIAG_SIZE", "KEY_MAX", "OPTION_KIND", "Md5Flag", "pack", "unpack_all"]

#: TCP_MD5SIG_MAXKEYLEN
KEY_MAX: Final = 80
#: kind of the TCP option (RFC 2385)
OPTION_KIND: Final = 19
_DIAG: Final = struct.Struct("=BBH16s80s")
DIAG_SIZE: Final = _DIAG.size
_REQUEST: Final = struct.Struct("=128sBBHi80s")


class Md5Flag(enum.IntFlag):
    """tcpm_flags, of TCP_MD5SIG_EXT."""

    PREFIX = 1


def unpack_all(data: bytes) -> list[tuple[int, str, int, bytes]]:
    """(family, address, prefix length, key) of each key in attribute INET_DIAG_MD5SIG."""
    found = []
    for family, prefix, length, raw, key in _DIAG.iter_unpack(data[: len(data) // DIAG_SIZE * DIAG_SIZE]):
        address = socket.inet_ntop(family, raw if family == socket.AF_INET6 else raw[:4])
        found.append((family, address, prefix, key[:length]))
    return found


def pack(sockaddr: bytes, prefix: int, key: bytes) -> bytes:
    """struct tcp_md5sig. sockaddr: struct sockaddr_in or sockaddr_in6 of the peer, or of a prefix of peers."""
    return _REQUEST.pack(sockaddr, Md5Flag.PREFIX, prefix, len(key), 0, key)
