"""Tables of descriptors and directories that processes and threads share (CLONE_FILES, CLONE_FS)."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import struct
from collections.abc import Callable, Iterator

from tests.system.state.calls import call, threaded
from tests.system.state.case import Here, case

FS, FILES = 0x200, 0x400
CLONE, UNSHARE = 56, 272


def cloned(flags: int, body: Callable[[], object]) -> int:
    """PID of a process that shares this with us, does that and ends."""
    pid = call(CLONE, flags | int(signal.SIGCHLD), 0, 0, 0, 0)
    if pid == 0:
        try:
            body()
        finally:
            os._exit(1)
    return pid


class Obeying:
    """A process that does what its socket tells it: a line of Python each, whose value comes back as text."""

    def __init__(self, flags: int, first: Callable[[], object] = lambda: None) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def obey() -> None:
            first()
            theirs.send(b"ready")
            while line := theirs.recv(1000):
                theirs.send(str(eval(line)).encode())

        self.pid = cloned(flags, obey)
        # with a common table the other end is ours as well
        self._theirs = theirs
        self._socket = ours
        assert self._socket.recv(100) == b"ready"

    def tell(self, line: str) -> str:
        self._socket.send(line.encode())
        return self._socket.recv(1000).decode()


def same_file(path: str, fd: int) -> bool:
    return os.path.samestat(os.stat(path), os.fstat(fd))


@case("aspect/sharing")
def a_table_of_descriptors(here: Here) -> Iterator[None]:
    other = Obeying(FILES)
    path = here.path("new")
    yield
    number = int(other.tell(f"os.open({path!r}, os.O_CREAT | os.O_RDWR)"))
    assert same_file(path, number)
    os.close(number)
    assert other.tell(f"os.path.exists('/proc/self/fd/{number}')") == "False"
    # its directories are its own
    os.chdir(here.folder)
    assert other.tell("os.getcwd()") != str(here.folder)


@case("aspect/sharing")
def directories(here: Here) -> Iterator[None]:
    os.makedirs(here.path("one/two"))
    os.chdir(here.path("one"))
    other = Obeying(FS)
    os.umask(0o27)
    yield
    assert os.getcwd() == here.path("one")
    assert other.tell("os.umask(0o31)") == str(0o27)
    assert os.umask(0o31) == 0o31
    other.tell("os.chdir('two')")
    assert os.getcwd() == here.path("one/two")
    number = int(other.tell("os.dup(0)"))
    assert not os.path.exists(f"/proc/self/fd/{number}")


@case("aspect/sharing")
def a_root_directory_in_common(here: Here) -> Iterator[None]:
    """Whoever is given it first must not bar the way of the other."""
    os.makedirs(here.path("jail/cell"))
    other = Obeying(FS)
    os.chroot(here.path("jail"))
    os.chdir("/cell")
    yield
    assert os.getcwd() == "/cell"
    assert other.tell("os.getcwd(), os.listdir('/')") == "('/cell', ['cell'])"
    other.tell("os.chdir('/')")
    assert os.getcwd() == "/"


@case("aspect/sharing")
def both_by_three_generations(here: Here) -> Iterator[None]:
    numbers = here.path("numbers")

    kept = []

    def parent() -> None:
        kept.append(Obeying(FS | FILES))
        with open(numbers, "w") as file:
            file.write(f"{kept[0]._socket.fileno()}")

    kept.append(Obeying(FS | FILES, parent))
    yield
    with open(numbers) as file:
        grandchild = socket.socket(fileno=os.dup(int(file.read())))
    grandchild.send(f"os.chdir({str(here.folder)!r})".encode())
    grandchild.recv(100)
    assert os.getcwd() == str(here.folder)
    grandchild.send(b"os.dup(1)")
    assert same_file("/proc/self/fd/1", int(grandchild.recv(100)))


@case("aspect/sharing")
def siblings_whose_parent_has_parted(here: Here) -> Iterator[None]:
    first, second = Obeying(FS | FILES), Obeying(FS | FILES)
    call(UNSHARE, FS | FILES)
    yield
    number = int(first.tell("os.dup(0)"))
    assert second.tell(f"os.path.exists('/proc/self/fd/{number}')") == "True"
    assert not os.path.exists(f"/proc/self/fd/{number}")
    first.tell(f"os.chdir({str(here.folder)!r})")
    assert second.tell("os.getcwd()") == str(here.folder)
    assert os.getcwd() != str(here.folder)


@case("aspect/sharing")
def a_grandchild_past_its_parent(here: Here) -> Iterator[None]:
    """The process between the two has parted: it was born with what it now lacks."""
    told = here.path("told")

    def parent() -> None:
        # before it parts, so that the socket is in the common table
        grandchild = Obeying(FILES)
        with open(told, "w") as file:
            file.write(f"{grandchild._socket.fileno()}")
        call(UNSHARE, FILES)

    between = Obeying(FILES, parent)
    yield
    with open(told) as file:
        grandchild = socket.socket(fileno=os.dup(int(file.read())))
    grandchild.send(b"os.dup(0)")
    number = int(grandchild.recv(100))
    assert same_file("/proc/self/fd/0", number)
    assert between.tell(f"os.path.exists('/proc/self/fd/{number}')") == "False"


#: a lock shows by whom it was taken, of those who have it
TAKER = r"/descriptors/\d+: .*POSIX  ADVISORY  WRITE"


@case("aspect/epoll-entries", "aspect/record-locks", differs=(TAKER,))
def what_a_common_table_has(here: Here) -> Iterator[None]:
    """Entries of epoll instances, and record locks, belong to the table."""
    path = here.path("locked")
    other = Obeying(FILES)
    reading, writing = os.pipe()
    epoll = select.epoll()
    number = epoll.fileno()
    other.tell(f"select.epoll.fromfd(os.dup({number})).register({reading}, 1)")
    other.tell(f"fcntl.lockf(os.open({path!r}, os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)")
    yield
    os.write(writing, b"x")
    assert epoll.poll(0) == [(reading, select.EPOLLIN)]
    pid = os.fork()
    if pid == 0:
        try:
            with open(path, "r+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os._exit(7)
        os._exit(8)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    with open(path, "r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@case("aspect/sharing", "files/terminal-master")
def a_terminal_of_who_shares_a_table(here: Here) -> Iterator[None]:
    """It leads the session; its descriptors are ours."""
    master, slave = os.openpty()

    def lead() -> None:
        os.setsid()
        fcntl.ioctl(slave, 0x540E, 0)  # TIOCSCTTY

    other = Obeying(FILES, lead)
    yield
    (front,) = struct.unpack("<i", fcntl.ioctl(master, 0x540F, bytes(4)))  # TIOCGPGRP
    assert front == other.pid
    assert other.tell(f"os.tcgetpgrp({slave})") == str(other.pid)
    assert same_file(f"/proc/{other.pid}/fd/{master}", master)


@case("state/directories-of-a-thread")
def threads_that_share_directories_of_a_thread(here: Here) -> Iterator[None]:
    os.makedirs(here.path("apart/in"))
    born: list[threaded] = []

    def look(umask: int) -> Callable[[object], None]:
        def compare(_: object) -> None:
            assert os.getcwd() == here.path("apart/in")
            assert os.umask(0o17) == umask

        return compare

    def set_up() -> None:
        call(UNSHARE, FS)
        os.chdir(here.path("apart"))
        os.umask(0o13)
        # threads share with the one that bears them
        born.extend(threaded(lambda: None, look(umask)) for umask in (0o13, 0o17))

    apart = threaded(set_up, lambda _: os.chdir("in"))
    yield
    for one in (apart, *born):
        one.verify()
    assert os.getcwd() != here.path("apart/in")
