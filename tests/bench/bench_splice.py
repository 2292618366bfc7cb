"""Memory of a process to a line and to a file: read and sent, or spliced: ``python -m tests.bench.bench_splice [MiB]``.

What is read is hashed, as each piece of an image is.  What is spliced the process has to give itself (vmsplice), so it
stands still for an injected call meanwhile; nobody sees the bytes.  GB/s; docs/design/precopy.md says what follows.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from checkpoint.image.frames import DATA_MAX, aligned_buffer
from checkpoint.kernel import process_vm
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS
from tests.bench.bench_memory import CHILD, timed

#: bytes of a pipe, and of one turn of vmsplice and splice
_PIPE = 1 << 20
_DRAIN = """
import socket, sys
into, sock = bytearray(1 << 20), socket.socket(fileno=int(sys.argv[1]))
sock.sendall(b".")
while sock.recv_into(into):
    pass
"""


@contextmanager
def line() -> Iterator[int]:
    """A TCP connection over loopback that another process drains."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        there, _ = listener.accept()
    with sock, there:
        fd = there.fileno()
        drain = subprocess.Popen([sys.executable, "-c", _DRAIN, str(fd)], pass_fds=[fd])
        there.close()
        sock.recv(1)  # it has begun
        yield sock.fileno()
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)  # it has read all, and closed
        drain.wait()


@contextmanager
def file(folder: Path) -> Iterator[int]:
    """A file in memory."""
    fd = os.open(folder / "image", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def read_and_write(pid: int, start: int, size: int, out: int, look: Callable[[memoryview], object]) -> None:
    """1 MiB after the other out of another process, looked at, and written."""
    room = aligned_buffer(DATA_MAX)
    here = ctypes.addressof(ctypes.c_char.from_buffer(room))
    for at in range(start, start + size, DATA_MAX):
        process_vm.readv(pid, here, [(at, DATA_MAX)])
        look(room)
        left = room
        while left:
            left = left[os.write(out, left) :]


def splice_own(start: int, size: int, out: int) -> None:
    """The same memory, of the process that does it, by reference: what an injected call would do."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE)
    for at in range(start, start + size, _PIPE):
        given = 0
        while given < _PIPE:
            piece = (ctypes.c_uint64 * 2)(at + given, _PIPE - given)
            count = syscall(SYS.vmsplice, writing, ctypes.addressof(piece), 1, 0)
            given += count
            while count:
                count -= os.splice(reading, out, count)
    os.close(reading)
    os.close(writing)


def measure(size: int, huge: bool, folder: Path) -> None:
    """One kind of pages."""
    pages = "huge pages" if huge else "4 KiB pages"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(size), str(int(huge))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        full, _ = map(int, child.stdout.readline().split())
        ways: dict[str, Callable[[int], None]] = {
            "read, written": lambda out: read_and_write(child.pid, full, size, out, len),
            "read, hashed, written": lambda out: read_and_write(child.pid, full, size, out, xxhash.xxh3_64_intdigest),
        }
        for where, opened in (("line", line), ("tmpfs", lambda: file(folder))):
            for name, way in ways.items():
                with opened() as out:
                    began = time.perf_counter()
                    way(out)
                    timed(f"{where}, {pages}: {name}", size, began)
    finally:
        child.communicate()
    own = ctypes.create_string_buffer(size + _PIPE)
    libc = ctypes.CDLL(None, use_errno=True)
    start = -(-ctypes.addressof(own) // _PIPE) * _PIPE
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), 14 if huge else 15)
    ctypes.memset(start, 1, size)
    for where, opened in (("line", line), ("tmpfs", lambda: file(folder))):
        with opened() as out:
            began = time.perf_counter()
            splice_own(start, size, out)
            timed(f"{where}, {pages}: vmsplice, splice", size, began)


def main() -> None:
    """The table."""
    size = (int(sys.argv[1]) if len(sys.argv) > 1 else 512) << 20
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        for huge in (False, True):
            measure(size, huge, Path(name))


if __name__ == "__main__":
    main()
