"""What the machine does at best, measured in the same run: a copy, a plain write and read, a plain line.  GB/s."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import threading
import time
from pathlib import Path

from tests.hosts import Host

__all__ = ["line_rate", "memcpy_rate", "new_memory_rate", "read_rate", "write_rate"]

_BLOCK = 1 << 20


def memcpy_rate(size: int) -> float:
    """One copy of so many bytes, out of memory that is there into memory that is there."""
    source, target = ctypes.create_string_buffer(size), ctypes.create_string_buffer(size)
    ctypes.memset(source, 1, size)
    ctypes.memmove(target, source, size)
    began = time.perf_counter()
    ctypes.memmove(target, source, size)
    return size / (time.perf_counter() - began) / 1e9


def new_memory_rate(size: int) -> float:
    """Bytes written into memory that is not there yet, 1 MiB at a time: what no copy into a new process can beat. On a
    virtual machine its host may have to find it first."""
    block = bytes(range(256)) * (_BLOCK // 256)
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        began = time.perf_counter()
        for at in range(0, size, _BLOCK):
            memory[at : at + _BLOCK] = block
        return size / (time.perf_counter() - began) / 1e9


def write_rate(path: Path, size: int) -> float:
    """write(2) of 1 MiB each and fsync(2), as an image is written."""
    block = os.urandom(_BLOCK)
    began = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(size // _BLOCK):
            file.write(block)
        os.fsync(file.fileno())
    return size / (time.perf_counter() - began) / 1e9


def read_rate(path: Path) -> float:
    """read(2) of 1 MiB each of what was just written, so out of the page cache, as a restore does."""
    block, size = bytearray(_BLOCK), 0
    began = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            size += count
    return size / (time.perf_counter() - began) / 1e9


def line_rate(source: Host, target: Host, size: int, *, address: str) -> float:
    """send(2) of 1 MiB each to a process-like thread on another host, that reads them."""
    with target.netns_entered():
        listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]

    def drain() -> None:
        with listener, listener.accept()[0] as sock:
            into = bytearray(_BLOCK)
            while sock.recv_into(into):
                pass
            sock.sendall(b".")

    thread = threading.Thread(target=drain)
    thread.start()
    with source.netns_entered():
        sock = socket.create_connection((address, port))
    block = bytes(_BLOCK)
    began = time.perf_counter()
    with sock:
        for _ in range(size // _BLOCK):
            sock.sendall(block)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)
    took = time.perf_counter() - began
    thread.join()
    return size / took / 1e9
