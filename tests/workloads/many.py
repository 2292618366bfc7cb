"""Many plain connections of one program: opened, asked, heard."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence

__all__ = ["PATIENCE", "ask", "connected", "hear", "opened"]

#: seconds until an answer must have come, on a busy machine
PATIENCE = 200.0


def opened(ends: contextlib.ExitStack, address: tuple[str, int], count: int) -> list[socket.socket]:
    """So many, from the calling thread's network namespace, as soon as somebody listens there; ``ends`` closes them."""
    return [ends.enter_context(connected(address)) for _ in range(count)]


def connected(address: tuple[str, int]) -> socket.socket:
    """A connection, as soon as somebody listens there."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return socket.create_connection(address, timeout=PATIENCE)
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def ask(clients: Sequence[socket.socket], text: bytes) -> None:
    """Each sends it, and gets it back."""
    for client in clients:
        client.send(text)
    hear(clients, text)


def hear(clients: Sequence[socket.socket], text: bytes) -> None:
    """Each gets exactly this."""
    for client in clients:
        client.settimeout(PATIENCE)
        assert client.recv(len(text), socket.MSG_WAITALL) == text
