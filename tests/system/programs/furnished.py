"""A server that uses what a container has: furnished.py ADDRESS PORT.

It has files open and mapped on file systems of the container's own (/dev/shm, /tmp, /var/log on the root), a deleted
one, a fifo, local sockets, watches (WATCHED), and a shell of a kind on a pseudo terminal, its controlling terminal.
Each line that comes is answered by a line of JSON: what it has found of all that, and a count.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pty
import socket
import struct
import sys
import time

IN_MODIFY, IN_NONBLOCK = 2, 0o4000
WATCHED = os.environ.get("WATCHED", "/tmp/watched").split()
libc = ctypes.CDLL(None, use_errno=True)


def terminal() -> tuple[int, int]:
    """(master, pid) of a child that answers each line with what it sees of its terminal."""
    pid, master = pty.fork()
    if pid == 0:
        while True:
            line = sys.stdin.readline()
            with open("/dev/tty") as own:
                same = os.ttyname(own.fileno()) in ("/dev/tty", os.ttyname(0))
            print(line.strip()[::-1], os.ttyname(0), os.tcgetpgrp(0) == os.getpgid(0), same, flush=True)
    return master, pid


class Furnished:
    def __init__(self) -> None:
        self.count = 0
        self.mapped_fd = os.open("/dev/shm/mapped", os.O_RDWR | os.O_CREAT, 0o640)
        os.ftruncate(self.mapped_fd, 1 << 20)
        self.mapped = mmap.mmap(self.mapped_fd, 1 << 20)
        os.close(os.dup(self.mapped_fd))
        self.log = os.open("/var/log/server.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.mkdir("/tmp/below", 0o700)
        self.notes = open("/tmp/below/notes", "w+")  # noqa: SIM115 - open as long as we are
        self.deleted = open("/tmp/below/deleted", "w+")  # noqa: SIM115
        os.unlink("/tmp/below/deleted")
        os.chdir("/tmp/below")
        os.mkfifo("/tmp/fifo")
        self.fifo = os.open("/tmp/fifo", os.O_RDWR | os.O_NONBLOCK)
        self.listeners = []
        for path in ("/tmp/socket", "/run/socket"):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            listener.listen(5)
            self.listeners.append((path, listener))
        self.watch = libc.inotify_init1(IN_NONBLOCK)
        for path in WATCHED:
            open(path, "w").close()
            if libc.inotify_add_watch(self.watch, path.encode(), IN_MODIFY) < 0:
                raise OSError(ctypes.get_errno(), path)
        self.ghost = open("/var/log/ghost", "w+")  # noqa: SIM115
        os.unlink("/var/log/ghost")
        self.null = os.open("/dev/null", os.O_WRONLY)
        self.memory = open("/proc/meminfo")  # noqa: SIM115
        self.master, self.child = terminal()
        self.typed()

    def typed(self) -> str:
        """One line of a dialogue over the terminal."""
        os.write(self.master, b"line\n")
        seen = b""
        while seen.count(b"\n") < 2:
            seen += os.read(self.master, 1000)
        return seen.decode()

    def watched(self) -> list[int]:
        """The watches that a change of the files they are on wakes."""
        for path in WATCHED:
            with open(path, "a") as file:
                file.write("x")
        data = os.read(self.watch, 4096)
        return sorted(struct.unpack_from("i", data, at)[0] for at in range(0, len(data), 16))

    def connected(self) -> list[bytes]:
        found = []
        for path, listener in self.listeners:
            with socket.socket(socket.AF_UNIX) as one:
                one.connect(path)
                other, _ = listener.accept()
                with other:
                    one.sendall(path.encode())
                    found.append(other.recv(100).decode())
        return found

    def look(self) -> dict[str, object]:
        """All of it, used once more."""
        text = f"{self.count}\n".encode()
        self.mapped[:4] = struct.pack("i", self.count)
        os.write(self.log, text)
        self.notes.write(text.decode())
        self.notes.flush()
        os.pwrite(self.deleted.fileno(), text, 0)
        os.write(self.fifo, text)
        os.write(self.null, text)
        self.memory.seek(0)
        with open("/dev/shm/mapped", "rb") as file, open("/var/log/server.log") as log, open("notes") as notes:
            told = {
                "mapped": struct.unpack("i", file.read(4))[0] - self.count,
                "log": log.read().split() == [str(one) for one in range(1, self.count + 1)],
                "notes": notes.read().split() == [str(one) for one in range(1, self.count + 1)],
            }
        with open("/proc/self/mountinfo") as file:
            mounts = [line.split(" - ") for line in file]
        return told | {
            "deleted": os.pread(self.deleted.fileno(), 100, 0) == text,
            "fifo": os.read(self.fifo, 100) == text,
            "connected": self.connected(),
            "watched": self.watched(),
            "typed": self.typed(),
            "memory": self.memory.readline().split()[0],
            "cwd": os.getcwd(),
            "links": links("self"),
            "child": links(str(self.child)),
            "inode": os.fstat(self.mapped_fd).st_ino == os.stat("/dev/shm/mapped").st_ino,
            "maps": sorted({line.split(maxsplit=5)[5] for line in open("/proc/self/maps") if "/" in line}),
            "mode": [oct(os.stat(path).st_mode) for path in ("/dev/shm/mapped", "/tmp", "/tmp/below", "/dev/null")],
            "mounts": [" ".join([*one.split()[3:], two.strip()]) for one, two in mounts if "cgroup" not in two],
            "shared": sorted(os.listdir("/dev/shm")),
            "temporary": sorted(os.listdir("/tmp")),
        }


def links(pid: str) -> dict[str, str]:
    """What the descriptors of a process lead to, by their paths; its program and directories."""
    names = [f"fd/{fd}" for fd in sorted(os.listdir(f"/proc/{pid}/fd"), key=int)]
    found = {}
    for name in [*names, "exe", "cwd", "root"]:
        try:
            link = os.readlink(f"/proc/{pid}/{name}")
        except FileNotFoundError:
            continue  # the one that the directory is read by
        if link.startswith("/") and not link.startswith(f"/proc/{os.getpid()}"):
            found[name] = link
    return found


def main(address: str, port: int) -> None:
    one = Furnished()
    with socket.create_server((address, port)) as listener:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as lines:
            for _ in lines:
                one.count += 1
                told = {"count": one.count, "clock": time.monotonic(), **one.look()}
                connection.sendall(json.dumps(told).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
