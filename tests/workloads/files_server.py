"""Does at random to open files what programs do to them, and knows of each what it has to be.

python -m tests.workloads.files_server PORT ADDRESS FOLDER FILES

It opens so many files in the folder, which is its own, and serves one connection at a time. Requests are lines,
answered by one::

    act SEED    a few things done to its files
    check       "right", or the first file that is not what it was after the last thing that was done to it
    wait        "here": nothing is done

Names change only while a migration has begun to copy.

What a file is: path, position, flags, close-on-exec, inode, which other descriptors lead to the same description (a
child process has some of them), and whether it is locked.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import random
import socket
import sys
from typing import NamedTuple

from checkpoint.files.abi import Kcmp, kcmp

DELETED = "(deleted)"
ACTS = (
    "write", "read", "seek", "truncate", "rename", "unlink", "reopen", "flags", "cloexec", "dup", "close", "open",
    "open", "lock", "give", "over", "twice"
)  # fmt: skip


class Known(NamedTuple):
    """What a descriptor is; a file without a name may be of another inode after a move."""

    path: str
    pos: int
    flags: int
    cloexec: bool
    inode: int


class Files:
    """The files, and what was done to them."""

    def __init__(self, folder: str, count: int) -> None:
        self.folder = folder
        self.most = 2 * count
        self.names = 0
        self.known: dict[int, Known] = {}
        #: descriptors that are one description
        self.twins: dict[int, int] = {}
        #: what the child has, by our number
        self.given: dict[int, int] = {}
        self.locked: set[int] = set()
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.child = os.fork()
        if not self.child:
            self.ours.close()
            keep(theirs)
            os._exit(0)
        theirs.close()
        for _ in range(count):
            self.open(random.Random(len(self.known)))

    def open(self, chance: random.Random) -> None:
        kind = chance.random()
        if kind < 0.1:
            path, flags = chance.choice(["/dev/null", "/dev/zero"]), os.O_RDWR
        elif kind < 0.2:
            path, flags = self.folder, os.O_RDONLY | os.O_DIRECTORY
        else:
            self.names += 1
            path = f"{self.folder}/{self.names}"
            flags = chance.choice([os.O_RDWR, os.O_RDWR | os.O_APPEND, os.O_WRONLY, os.O_RDONLY]) | os.O_CREAT
        fd = os.open(path, flags, 0o600)
        os.set_inheritable(fd, chance.random() < 0.5)
        self.note(fd)

    def note(self, fd: int) -> None:
        """From now on it is as it is now; so is what is the same description."""
        for one in (fd, *(b for a, b in self.twins.items() if a == fd), *(a for a, b in self.twins.items() if b == fd)):
            self.known[one] = look(one)

    def act(self, chance: random.Random) -> None:
        fd = chance.choice(list(self.known))
        what = chance.choice(ACTS)
        if what in ("rename", "unlink", "over") and not followed():
            return
        if len(self.known) > self.most:
            what = "close"
        regular = self.known[fd].path.startswith((self.folder + "/", DELETED))
        access = self.known[fd].flags & os.O_ACCMODE
        if what == "write" and access != os.O_RDONLY:
            os.write(fd, bytes(chance.randrange(1, 100)))
        elif what == "read" and access != os.O_WRONLY and regular:
            os.read(fd, 7)
        elif what == "seek" and regular:
            os.lseek(fd, chance.randrange(1000), os.SEEK_SET)
        elif what == "truncate" and access != os.O_RDONLY and regular:
            os.ftruncate(fd, chance.randrange(500))
        elif what == "rename" and regular and self.known[fd].path != DELETED:
            self.names += 1
            os.rename(self.known[fd].path, f"{self.folder}/{self.names}")
            self.renoted()
        elif what == "unlink" and regular and self.known[fd].path != DELETED:
            os.unlink(self.known[fd].path)
            self.renoted()
        elif what == "reopen" and self.known[fd].path != DELETED:
            # probably at the same address
            path, flags, pos = self.known[fd].path, self.known[fd].flags, self.known[fd].pos
            self.close(fd)
            again = os.open(path, flags)
            if regular:
                os.lseek(again, pos, os.SEEK_SET)
            if again != fd:
                os.dup2(again, fd, inheritable=False)
                os.close(again)
            self.note(fd)
        elif what == "flags" and regular:
            fcntl.fcntl(fd, fcntl.F_SETFL, self.known[fd].flags ^ os.O_APPEND)
        elif what == "cloexec":
            os.set_inheritable(fd, not os.get_inheritable(fd))
        elif what == "dup" and fd not in self.twins and fd not in self.twins.values():
            twin = os.dup(fd)
            self.twins[twin] = fd
        elif what == "close":
            self.close(fd)
            return
        elif what == "open":
            self.open(chance)
        elif what == "lock" and regular and fd not in self.locked:
            with contextlib.suppress(BlockingIOError):  # another description of the file has it
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.locked.add(fd)
        elif what == "give" and fd not in self.given:
            socket.send_fds(self.ours, [b"give"], [fd])
            self.given[fd] = int(self.ours.recv(100))
        elif what == "over" and regular:
            # another file of that name
            path = self.known[fd].path
            self.names += 1
            os.close(os.open(f"{self.folder}/{self.names}", os.O_CREAT | os.O_WRONLY, 0o600))
            if path != DELETED:
                os.rename(f"{self.folder}/{self.names}", path)
                self.renoted()
        elif what == "twice" and self.known[fd].path != DELETED:
            again = os.open(self.known[fd].path, self.known[fd].flags)
            self.note(again)
        self.note(fd)

    def renoted(self) -> None:
        """Paths have changed: others may be of the same file."""
        for fd in self.known:
            self.known[fd] = look(fd)

    def close(self, fd: int) -> None:
        if fd in self.given:
            self.ours.send(b"close %d" % self.given.pop(fd))
            self.ours.recv(100)
        os.close(fd)
        del self.known[fd]
        self.locked.discard(fd)
        self.twins = {a: b for a, b in self.twins.items() if fd not in (a, b)}

    def check(self) -> str:
        for fd, known in self.known.items():
            now = look(fd)
            if now != known:
                return f"fd {fd} was {known}, is {now}"
        me = os.getpid()
        of_one = {fd: self.twins.get(fd, fd) for fd in self.known}
        by_inode: dict[int, list[int]] = {}
        for fd in self.known:
            by_inode.setdefault(os.fstat(fd).st_ino, []).append(fd)
        for fds in by_inode.values():
            for one in fds:
                for other in fds:
                    same = kcmp(me, me, Kcmp.FILE, one, other) == 0
                    if same != (of_one[one] == of_one[other]):
                        return f"fd {one} and {other}: one description: {same}"
        for fd, theirs in self.given.items():
            if kcmp(me, self.child, Kcmp.FILE, fd, theirs) != 0:
                return f"fd {fd} is not what the child has as {theirs}"
        for fd in self.locked:
            if self.known[fd].path == DELETED:
                continue
            other = os.open(self.known[fd].path, os.O_RDONLY)
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return f"fd {fd} is not locked"
            except BlockingIOError:
                pass  # as it should be
            finally:
                os.close(other)
        return "right"


def followed() -> bool:
    """Whether somebody tracks what we write: a round of pre-copy was made. Whoever looked for our files before that
    would refuse one that is not there any more."""
    with open("/proc/self/smaps", encoding="ascii") as maps:
        return " uw" in maps.read()


def look(fd: int) -> Known:
    path, inode = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_ino
    if path.endswith(DELETED):
        # its bytes travel, and are another file there
        path, inode = DELETED, 0
    pos = os.lseek(fd, 0, os.SEEK_CUR) if not path.startswith("/dev/") else 0
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    return Known(path, pos, flags, not os.get_inheritable(fd), inode)


def keep(sock: socket.socket) -> None:
    """The child: it has what it is given."""
    while True:
        message, ancillary, _, _ = sock.recvmsg(100, 100)
        if not message:
            return
        if message == b"give":
            (fd,) = array.array("i", ancillary[0][2])
            sock.send(b"%d" % fd)
        else:
            os.close(int(message.split()[1]))
            sock.send(b"done")


def main() -> None:
    port, address, folder, count = sys.argv[1:]
    files = Files(folder, int(count))
    with socket.create_server((address, int(port))) as listener:
        while True:
            peer, _ = listener.accept()
            serve(files, peer)


def serve(files: Files, peer: socket.socket) -> None:
    with peer, peer.makefile("rw", encoding="ascii") as lines:
        for line in lines:
            verb, _, value = line.strip().partition(" ")
            if verb == "act":
                chance = random.Random(int(value))
                for _ in range(chance.randrange(1, 5)):
                    if len(files.known) > 10:
                        files.act(chance)
                    else:
                        files.open(chance)
            answer = files.check() if verb == "check" else "here"
            lines.write(answer + "\n")
            lines.flush()


if __name__ == "__main__":
    main()
