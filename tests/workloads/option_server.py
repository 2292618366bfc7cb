"""Does to its connections what they ask for: answers, options, descriptors; and tells how they are.

python -m tests.workloads.option_server [--exclusive] [--signed] PORT ADDRESS...

``--exclusive``: its listeners are without SO_REUSEADDR.  ``--signed``: they have a TCP MD5 key for :data:`PARTNER`, who
never comes; others need no signature.  Requests are lines, answered by a line each::

    echo TEXT           the text
    nodelay|keepalive|oobinline|rcvlowat|linger|priority N    the option, set; the value that it has now
    watch N             whether the epoll instance looks for urgent data as well
    nonblocking N       O_NONBLOCK of the connection's description
    again               a second descriptor of the connection; how many it has
    close               the connection ends, and its other descriptors
    state               all of the above as they are: name=value, in that order
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys

from tcpstate.md5keys import SigningKey, give_keys

#: key and peer of ``--signed``, by family
PARTNER = {
    socket.AF_INET: SigningKey(address="10.99.9.9", prefix=32, secret=b"of the partner"),
    socket.AF_INET6: SigningKey(address="fd99::9", prefix=128, secret=b"of the partner"),
}
OPTIONS = {
    "nodelay": (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    "keepalive": (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    "oobinline": (socket.SOL_SOCKET, socket.SO_OOBINLINE),
    "rcvlowat": (socket.SOL_SOCKET, socket.SO_RCVLOWAT),
    "priority": (socket.SOL_SOCKET, socket.SO_PRIORITY),
}


class Peer:
    """One connection."""

    def __init__(self, sock: socket.socket, epoll: select.epoll) -> None:
        self.sock = sock
        self.epoll = epoll
        self.more: list[int] = []
        self.read = b""

    def answer(self, line: str) -> str:
        verb, _, value = line.partition(" ")
        if verb == "echo":
            return value
        if verb in OPTIONS:
            self.sock.setsockopt(*OPTIONS[verb], int(value))
        elif verb == "linger":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, int(value)))
        elif verb == "nonblocking":
            os.set_blocking(self.sock.fileno(), value == "0")
        elif verb == "watch":
            self.epoll.modify(self.sock, select.EPOLLIN | (select.EPOLLPRI if value == "1" else 0))
        elif verb == "again":
            self.more.append(os.dup(self.sock.fileno()))
        return self.state()

    def state(self) -> str:
        found = {name: self.sock.getsockopt(*place) for name, place in OPTIONS.items()}
        found["linger"] = struct.unpack("ii", self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))[1]
        found["nonblocking"] = int(not os.get_blocking(self.sock.fileno()))
        inodes = {os.fstat(fd).st_ino for fd in (self.sock.fileno(), *self.more)}
        found["descriptors"] = 1 + len(self.more) if len(inodes) == 1 else -1
        found["watch"] = self._watched()
        return " ".join(f"{name}={value}" for name, value in found.items())

    def _watched(self) -> int:
        """As the kernel tells; -1 if there is not exactly one entry."""
        with open(f"/proc/self/fdinfo/{self.epoll.fileno()}", encoding="ascii") as lines:
            mine = [line.split() for line in lines if line.startswith("tfd:")]
        events = [int(parts[3], 16) for parts in mine if int(parts[1]) == self.sock.fileno()]
        return int(bool(events[0] & select.EPOLLPRI)) if len(events) == 1 else -1

    def close(self) -> None:
        for fd in self.more:
            os.close(fd)
        self.sock.close()


def main() -> None:
    exclusive, signed = "--exclusive" in sys.argv, "--signed" in sys.argv
    port, *addresses = [word for word in sys.argv[1:] if not word.startswith("--")]
    epoll = select.epoll()
    listeners = {}
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, not exclusive)
        if signed:
            give_keys(listener, [PARTNER[listener.family]], "listener")
        listener.bind((address, int(port)))
        listener.listen(128)
        listeners[listener.fileno()] = listener
        epoll.register(listener, select.EPOLLIN)
    peers: dict[int, Peer] = {}
    while True:
        for fd, _ in epoll.poll():
            if fd in listeners:
                sock, _ = listeners[fd].accept()
                peers[sock.fileno()] = Peer(sock, epoll)
                epoll.register(sock, select.EPOLLIN)
                continue
            peer = peers[fd]
            data = b""
            with contextlib.suppress(BlockingIOError, ConnectionResetError):
                data = peer.sock.recv(1 << 16, socket.MSG_DONTWAIT) or b"close\n"
            peer.read += data
            *lines, peer.read = peer.read.split(b"\n")
            for line in lines or ([b"close"] if not data else []):
                if line == b"close":
                    epoll.unregister(fd)
                    peers.pop(fd).close()
                    break
                peer.sock.send(peer.answer(line.decode()).encode() + b"\n")


if __name__ == "__main__":
    main()
