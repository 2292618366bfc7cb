"""A busy server: it listens, and accepts nothing until it gets SIGUSR1. Then it accepts all, and answers each message.

python -m tests.workloads.late_server PORT ADDRESS...

A message is four bytes of length and as many bytes; the answer is its SHA-256.
"""

from __future__ import annotations

import hashlib
import selectors
import signal
import socket
import struct
import sys

__all__ = ["LENGTH", "answer", "message"]

LENGTH = struct.Struct("!I")


def message(data: bytes) -> bytes:
    """What a client sends."""
    return LENGTH.pack(len(data)) + data


def answer(data: bytes) -> bytes:
    """What it gets."""
    return hashlib.sha256(data).digest()


def main() -> None:
    """Serve until killed."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    listeners = []
    for address in sys.argv[2:]:
        listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, int(sys.argv[1])))
        listener.listen(512)
        listeners.append(listener)
    signal.sigwait({signal.SIGUSR1})
    buffers: dict[socket.socket, bytearray] = {}
    with selectors.DefaultSelector() as selector:
        for listener in listeners:
            selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock in listeners:
                    accepted, _ = sock.accept()
                    buffers[accepted] = bytearray()
                    selector.register(accepted, selectors.EVENT_READ)
                    continue
                data = sock.recv(1 << 20)
                if not data:
                    selector.unregister(sock)
                    del buffers[sock]
                    sock.close()
                    continue
                buffer = buffers[sock]
                buffer += data
                while len(buffer) >= LENGTH.size:
                    end = LENGTH.size + LENGTH.unpack_from(buffer)[0]
                    if len(buffer) < end:
                        break
                    sock.sendall(answer(bytes(buffer[LENGTH.size : end])))
                    del buffer[:end]


if __name__ == "__main__":
    main()
