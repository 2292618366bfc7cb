"""Sends back what it gets, in many processes with one listener: ``prefork_server WORKERS MOST PORT ADDRESS``.

A master that only waits for its children, and begins another one for each that ends; each worker takes connections
until it has MOST of them.
"""

from __future__ import annotations

import os
import select
import socket
import sys


def work(listener: socket.socket, most: int) -> None:
    """One worker, for ever."""
    epoll = select.epoll()
    peers: dict[int, socket.socket] = {}
    epoll.register(listener, select.EPOLLIN | select.EPOLLEXCLUSIVE)
    listens = True
    while True:
        for fd, _ in epoll.poll():
            if fd == listener.fileno():
                try:
                    peer, _ = listener.accept()
                except BlockingIOError:
                    continue  # another worker was faster
                peers[peer.fileno()] = peer
                epoll.register(peer, select.EPOLLIN)
            elif data := peers[fd].recv(1 << 16):
                peers[fd].sendall(data)
            else:
                epoll.unregister(fd)
                peers.pop(fd).close()
        if (len(peers) < most) is not listens:
            listens = not listens
            if listens:
                epoll.register(listener, select.EPOLLIN | select.EPOLLEXCLUSIVE)
            else:
                epoll.unregister(listener)


def main() -> None:
    """Until it is killed."""
    workers, most, port, address = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    listener = socket.create_server((address, port), backlog=1024)
    listener.setblocking(False)
    count = 0
    while True:
        if count == workers:
            os.wait()
            count -= 1
        if not os.fork():
            work(listener, most)
        count += 1


if __name__ == "__main__":
    main()
