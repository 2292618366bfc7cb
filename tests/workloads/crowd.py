"""Thousands of connections of one client program, for the time of one move: ``crowd ADDRESS PORT COUNT SEED``.

A third says nothing meanwhile, a third sends while the server stands still, a third has answers of 12 KB that it does
not read, more than its window takes.  It reads one word a line and answers ``ok`` to each::

    backlog   the third third asks and does not read
    send      the second third sends
    check     all is read and compared, and everybody asks once more
"""

from __future__ import annotations

import random
import resource
import socket
import sys

from tests.workloads.many import PATIENCE, connected

SMALL, LARGE = 100, 12_000  # bytes
WINDOW = 2304  # bytes: SO_RCVBUF of the third third


def text(seed: int, number: int, size: int) -> bytes:
    return random.Random(seed * 1_000_003 + number).randbytes(size)


def heard(sock: socket.socket, expected: bytes) -> None:
    sock.settimeout(PATIENCE)
    assert sock.recv(len(expected), socket.MSG_WAITALL) == expected, sock.getsockname()


def opened(address: str, port: int, count: int) -> list[socket.socket]:
    socks = []
    for number in range(count):
        sock = connected((address, port))
        if number % 3 == 2:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WINDOW)
        socks.append(sock)
    return socks


def main() -> None:
    """Until its input ends."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    address, port, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    socks = opened(address, port, count)
    for number, sock in enumerate(socks):
        sock.sendall(text(seed, number, SMALL))
    for number, sock in enumerate(socks):
        heard(sock, text(seed, number, SMALL))
    print("ok", flush=True)
    for word in map(str.strip, sys.stdin):
        if word == "backlog":
            for number in range(2, count, 3):
                socks[number].sendall(text(seed, -number, LARGE))
        elif word == "send":
            for number in range(1, count, 3):
                socks[number].sendall(text(seed, -number, SMALL))
        elif word == "check":
            for number in range(1, count, 3):
                heard(socks[number], text(seed, -number, SMALL))
            for number in range(2, count, 3):
                heard(socks[number], text(seed, -number, LARGE))
            for number, sock in enumerate(socks):
                sock.sendall(text(seed, number, SMALL))
            for number, sock in enumerate(socks):
                heard(sock, text(seed, number, SMALL))
        print("ok", flush=True)


if __name__ == "__main__":
    main()
