"""A server that tells how it sees itself: contained.py ADDRESS PORT [NAME [DOMAIN]].

It has a thread, and a child with which it talks over a pair of sockets, a pidfd of it, and its own number in a lock, an
owner of signals, and in SO_PEERCRED.  Each line that comes is answered by a line of JSON: what the two see now, and a
count.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import tempfile
import threading
import time

F_SETOWN_EX, F_GETOWN_EX = 15, 16


def owner(fd: int, value: bytes | None = None) -> tuple[int, int]:
    if value is None:
        return struct.unpack("ii", fcntl.fcntl(fd, F_GETOWN_EX, struct.pack("ii", 0, 0)))
    fcntl.fcntl(fd, F_SETOWN_EX, value)
    return (0, 0)


def domain() -> str:
    name = ctypes.create_string_buffer(65)
    ctypes.CDLL(None).getdomainname(name, 65)
    return name.value.decode()


def myself() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "group": os.getpgid(0),
        "session": os.getsid(0),
        "host": os.uname().nodename,
        "domain": domain(),
        "directory": os.getcwd(),
        "root": sorted(os.listdir("/")),
        "identity": identity(),
        "cgroup": cgroups(),
        "self": os.readlink("/proc/self"),
        "mounts": mounts(),
        "objects": system_v(),
    }


def identity() -> dict[str, object]:
    """Who we are, what we may do, and what our user namespace is."""
    with open("/proc/thread-self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    found: dict[str, object] = {name: lines[name].split() for name in lines if name[:3] in ("Uid", "Gid", "Cap")}
    found["Groups"] = sorted(lines["Groups"].split())
    for name in ("uid_map", "gid_map", "setgroups"):
        with open(f"/proc/self/{name}") as file:
            found[name] = file.read().split()
    found["ours"] = [kind for kind in ("cgroup", "ipc", "mnt", "net", "pid", "uts") if belongs(kind)]
    return found


def cgroups() -> list[str]:
    """Our control groups, as we see them."""
    with open("/proc/self/cgroup") as file:
        return [line.split(":", 1)[1] for line in file]


def belongs(kind: str) -> bool:
    """Whether a namespace of ours belongs to our user namespace."""
    with open(f"/proc/self/ns/{kind}") as file:
        try:
            owner = fcntl.ioctl(file, 0xB701)
        except PermissionError:
            return False
    try:
        return os.fstat(owner).st_ino == os.stat("/proc/self/ns/user").st_ino
    finally:
        os.close(owner)


class Thread(threading.Thread):
    """One that tells who it is when it is asked."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.asked, self.answered = threading.Event(), threading.Event()
        self.told: dict[str, object] = {}

    def run(self) -> None:
        while self.asked.wait():
            self.asked.clear()
            self.told = {"number": ctypes.CDLL(None).gettid(), "identity": identity()}
            self.answered.set()

    def ask(self) -> dict[str, object]:
        self.answered.clear()
        self.asked.set()
        self.answered.wait()
        return self.told


def become_another() -> None:
    """Of a user namespace with many IDs, some others."""
    if os.environ.get("OTHERS"):
        os.setgroups([5, 6])
        os.setresgid(3, 3, 4)
        os.setresuid(7, 7, 8)


def mounts() -> list[str]:
    """What is mounted, with what options, without numbers; of control groups all is shown from one's own."""
    with open("/proc/self/mountinfo") as file:
        lines = [line.split(" - ") for line in file]
    return [" ".join([*left.split()[3:6], right.split()[0]]) for left, right in lines if "cgroup" not in right]


def system_v() -> list[list[str]]:
    """IDs, keys, sizes and users of System V objects, as ipcs shows them, and the settings of their namespace."""
    found = []
    for name in ("shm", "sem", "msg"):
        with open(f"/proc/sysvipc/{name}") as file:
            found += [line.split()[:4] for line in file]
    with open("/proc/sys/kernel/msgmax") as file:
        return [*found, [file.read()]]


def make_system_v() -> None:
    """A segment that we attach, a set of semaphores and a queue with a message, which nobody uses from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    segment = libc.shmget(1234, 8192, 0o1600)
    address = libc.shmat(segment, None, 0)
    ctypes.memmove(address, b"segment", 7)
    if os.fork() == 0:  # the last user is somebody who is no more
        libc.semget(1235, 3, 0o1600)
        queue = libc.msgget(1236, 0o1600)
        libc.msgsnd(queue, struct.pack("l7s", 5, b"message"), 7, 0)
        os._exit(0)
    os.wait()
    with open("/proc/sys/kernel/msgmax", "w") as file:
        file.write("9000")


def child(line: socket.socket) -> None:
    become_another()
    while line.recv(1):
        line.sendall(json.dumps(myself()).encode() + b"\n")
    os._exit(0)


def main(address: str, port: int) -> None:
    ours, theirs = socket.socketpair()
    number = os.fork()
    if number == 0:
        ours.close()
        child(theirs)
    watched = os.pidfd_open(number)
    asked, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    owner(asked.fileno(), struct.pack("ii", 1, number))
    locked = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as we are
    fcntl.lockf(locked, fcntl.LOCK_EX)
    dead = os.fork()
    if dead == 0:
        os._exit(9)
    os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    listener = socket.create_server((address, port))
    waiting = select.epoll()
    waiting.register(listener, select.EPOLLIN)
    connections: dict[int, socket.socket] = {}
    thread = Thread()
    thread.start()
    lines = ours.makefile("rb")
    count = 0
    while True:
        for fd, _ in waiting.poll():
            if fd == listener.fileno():
                new, _ = listener.accept()
                connections[new.fileno()] = new
                waiting.register(new, select.EPOLLIN)
                continue
            data = connections[fd].recv(1)
            if not data:
                waiting.unregister(fd)
                connections.pop(fd).close()
                continue
            if data != b"\n":
                continue
            count += 1
            ours.sendall(b"?")
            told = {
                "count": count,
                "me": myself(),
                "child": json.loads(lines.readline()),
                "number": number,
                "thread": thread.ask(),
                "owner": owner(asked.fileno()),
                "peer": struct.unpack("iII", ours.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)),
                "alive": not select.select([watched], [], [], 0)[0],
                "signalled": _signal(watched),
                "zombie": os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT | os.WNOHANG).si_status,
                "clock": time.monotonic(),
            }
            connections[fd].sendall(json.dumps(told).encode() + b"\n")


def _signal(pidfd: int) -> bool:
    signal.pidfd_send_signal(pidfd, 0)
    return True


if __name__ == "__main__":
    if os.environ.get("SYSTEM_V"):
        make_system_v()
    if len(sys.argv) > 3:
        socket.sethostname(sys.argv[3])
    if len(sys.argv) > 4:
        ctypes.CDLL(None).setdomainname(sys.argv[4].encode(), len(sys.argv[4]))
    main(sys.argv[1], int(sys.argv[2]))
