"""A server whose child writes shared memory all the time and knows, in private memory, what must be in it.

``python shared_server.py PORT ADDRESS SEED MEGABYTES``.  Anonymous shared memory and a memfd of MEGABYTES each.  A page
says its number and its version, all over; the child has the versions in memory of its own, so a page that is older or
newer than the process is found.  The memfd also gets holes, and a file position's worth of bytes by pwrite(2), which no
mark of a mapping sees.  A byte from a client: the child checks every page and answers ``ok STEPS``, or what is wrong.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import select
import socket
import struct
import sys

PAGE = 4096
STEPS = 8  # between two looks at what was asked
_libc = ctypes.CDLL(None, use_errno=True)


def page_of(number: int, version: int) -> bytes:
    return struct.pack("<QQ", number, version) * (PAGE // 16) if version else bytes(PAGE)


class Region:
    """A mapping, and what must be in it."""

    def __init__(self, size: int, fd: int) -> None:
        self.fd = fd
        self.map = mmap.mmap(fd, size)
        self.versions = [0] * (size // PAGE)

    def write(self, chance: random.Random, step: int) -> None:
        # most pages are written seldom, as in programs
        hot = len(self.versions) // 16
        number = (step // 4096 * hot + chance.randrange(hot)) % len(self.versions)
        what = chance.random()
        if what < 0.1 and self.fd >= 0:
            # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
            _libc.fallocate(self.fd, 3, ctypes.c_long(number * PAGE), ctypes.c_long(PAGE))
            self.versions[number] = 0
            return
        self.versions[number] = step
        if what < 0.3 and self.fd >= 0:
            os.pwrite(self.fd, page_of(number, step), number * PAGE)
        else:
            self.map[number * PAGE : (number + 1) * PAGE] = page_of(number, step)

    def wrong(self) -> str:
        for number, version in enumerate(self.versions):
            found = self.map[number * PAGE : (number + 1) * PAGE]
            if found != page_of(number, version):
                return f"page {number} is of {found[:16].hex()}, not of version {version}"
        return ""


def child(ask: socket.socket, seed: int, regions: list[Region]) -> None:
    chance, step = random.Random(seed), 0
    while True:
        for _ in range(STEPS):
            step += 1
            chance.choice(regions).write(chance, step)
        # a little rest: it must be possible to catch up with it
        if select.select([ask], [], [], 0.002)[0]:
            if not ask.recv(1):
                return
            problems = [problem for region in regions if (problem := region.wrong())]
            ask.sendall(f"{'; '.join(problems) or 'ok'} {step}\n".encode())


def main() -> None:
    port, address, seed, megabytes = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    size = megabytes << 20
    memfd = os.memfd_create("shared", os.MFD_CLOEXEC)
    os.ftruncate(memfd, size)
    regions = [Region(size, -1), Region(size, memfd)]
    chance = random.Random(~seed)
    for region in regions:
        for number in range(len(region.versions)):
            # some stay holes
            if chance.random() < 0.9:
                region.versions[number] = 1
                region.map[number * PAGE : (number + 1) * PAGE] = page_of(number, 1)
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        child(theirs, seed, regions)
        os._exit(0)
    theirs.close()
    listener = socket.create_server((address, port))
    while True:
        peer, _ = listener.accept()
        while peer.recv(1):
            ours.sendall(b"?")
            answer = b""
            while not answer.endswith(b"\n"):
                answer += ours.recv(1000)
            peer.sendall(answer)


if __name__ == "__main__":
    main()
