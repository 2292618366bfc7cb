"""Pseudo terminals: both ends in the tree, sessions in them, and what waits to be read."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import termios
import time
import tty
from collections.abc import Iterator

from tests.system.state.case import Here, case

WINDOW = struct.pack("4H", 33, 111, 5, 6)


def now(fd: int) -> bytes:
    """What can be read at once."""
    os.set_blocking(fd, False)
    try:
        return os.read(fd, 1 << 16)
    except BlockingIOError:
        return b""


def shown(master: int, size: int) -> bytes:
    """What is written at the other end: the kernel passes the end of a line on by itself, so it may come later."""
    data = b""
    while len(data) < size:
        data += os.read(master, size - len(data))
    return data


@case("files/terminal-master", "files/terminal")
def modes_and_size(here: Here) -> Iterator[None]:
    master, slave = os.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, WINDOW)
    modes = termios.tcgetattr(slave)
    modes[3] &= ~termios.ECHO
    modes[6][termios.VINTR] = b"\x07"
    modes[4] = modes[5] = termios.B9600
    termios.tcsetattr(slave, termios.TCSANOW, modes)
    modes = termios.tcgetattr(slave)
    path, before = os.ttyname(slave), os.fstat(slave)
    yield
    assert os.ttyname(slave) == path
    assert termios.tcgetattr(slave) == termios.tcgetattr(master) == modes
    assert fcntl.ioctl(slave, termios.TIOCGWINSZ, bytes(8)) == WINDOW
    assert os.fstat(slave).st_rdev == before.st_rdev
    os.write(master, b"typed\n")
    assert os.read(slave, 99) == b"typed\n"
    os.write(slave, b"shown\n")
    assert shown(master, 7) == b"shown\r\n"


@case("files/terminal-master", "files/terminal")
def lines_that_wait_and_one_that_is_typed(here: Here) -> Iterator[None]:
    master, slave = os.openpty()
    os.write(master, b"first\nsecond\nhal")
    yield
    # each read gives a line, and the echo of all waits for the master
    assert os.read(slave, 99) == b"first\n"
    assert os.read(slave, 99) == b"second\n"
    assert now(slave) == b""
    os.write(master, b"\x7ff!\n")
    assert now(slave) == b"haf!\n"
    assert now(master).startswith(b"first\r\nsecond\r\nhal")


@case("files/terminal-master", "files/terminal")
def an_end_of_file_that_was_typed(here: Here) -> Iterator[None]:
    master, slave = os.openpty()
    os.write(master, b"whole\npart\x04\x04")
    yield
    assert os.read(slave, 99) == b"whole\n"
    assert os.read(slave, 99) == b"part"
    assert os.read(slave, 99) == b""


@case("files/terminal-master", "files/terminal")
def raw_bytes_both_ways(here: Here) -> Iterator[None]:
    master, slave = os.openpty()
    tty.setraw(slave)
    every = bytes(range(256)) * 8
    os.write(master, every)
    os.write(slave, every[::-1])
    yield
    assert now(slave) == every
    assert now(master) == every[::-1]


@case("files/terminal-master")
def slave_was_closed(here: Here) -> Iterator[None]:
    master, slave = os.openpty()
    os.write(slave, b"last words\n")
    os.close(slave)
    yield
    assert now(master) == b"last words\r\n"
    try:
        os.read(master, 9)
    except OSError as error:
        assert error.errno == 5
    else:
        raise AssertionError("the slave is open")


@case("files/terminal-master")
def locked_and_never_opened(here: Here) -> Iterator[None]:
    master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
    yield
    number = struct.unpack("i", fcntl.ioctl(master, 0x80045430, bytes(4)))[0]
    try:
        os.open(f"/dev/pts/{number}", os.O_RDWR | os.O_NOCTTY)
    except OSError as error:
        assert error.errno == 5
    else:
        raise AssertionError("it is not locked")
    assert now(master) == b""
    fcntl.ioctl(master, 0x40045431, struct.pack("i", 0))
    slave = os.open(f"/dev/pts/{number}", os.O_RDWR | os.O_NOCTTY)
    os.write(slave, b"x")
    assert now(master) == b"x"


@case("files/terminal-master", "files/terminal")
def packets_and_flags_of_descriptions(here: Here) -> Iterator[None]:
    master, slave = os.openpty()
    fcntl.ioctl(master, termios.TIOCPKT, struct.pack("i", 1))
    other = os.open(os.ttyname(slave), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    os.write(slave, b"in a packet")
    yield
    assert now(master) == b"\0in a packet"
    assert fcntl.fcntl(other, fcntl.F_GETFL) & (os.O_NONBLOCK | os.O_ACCMODE) == os.O_NONBLOCK | os.O_RDONLY
    assert not fcntl.fcntl(slave, fcntl.F_GETFL) & os.O_NONBLOCK
    os.write(master, b"to both\n")
    assert os.read(other, 99) == b"to both\n"


@case("files/terminal-master", "files/terminal")
def owner_and_mode_of_the_node(here: Here) -> Iterator[None]:
    master, slave = os.openpty()
    os.fchown(slave, 1234, 5)
    os.fchmod(slave, 0o622)
    yield
    found = os.stat(os.ttyname(slave))
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (1234, 5, 0o622)
    assert os.fstat(master).st_rdev == os.makedev(5, 2)


@case("files/terminal-master", "files/terminal")
def a_session_with_jobs(here: Here) -> Iterator[None]:
    """A shell-like session: a leader, a job in front, one behind; keys, signals and hang-ups reach whom they should."""
    pid, master = os.forkpty()
    if pid == 0:
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, lambda *_: (open(here.path("hup"), "w").close(), os._exit(0)))
        jobs = []
        for name in ("front", "behind"):
            job = os.fork()
            if job == 0:
                os.setpgid(0, 0)
                for number in (signal.SIGINT, signal.SIGWINCH, signal.SIGTTIN):
                    signal.signal(number, lambda n, _: open(here.path(f"{name}-{n}"), "w").close())
                if name == "front":
                    while os.tcgetpgrp(0) != os.getpid():
                        time.sleep(0.001)
                open(here.path(name), "w").close()
                while True:
                    time.sleep(0.01)
                    if os.path.exists(here.path("read")):
                        try:
                            data = os.read(0, 99)
                        except (OSError, InterruptedError):
                            data = b""
                        with open(here.path(f"{name}-read"), "wb") as file:
                            file.write(data)
                        time.sleep(60)
            jobs.append(job)
            os.setpgid(job, job)
        os.tcsetpgrp(0, jobs[0])
        open(here.path("leader"), "w").write(" ".join(map(str, jobs)))
        while True:
            time.sleep(0.01)

    def seen(name: str) -> None:
        end = time.monotonic() + 20
        while not os.path.exists(here.path(name)):
            assert time.monotonic() < end, name
            time.sleep(0.002)

    for name in ("leader", "front", "behind"):
        seen(name)
    path = here.path("leader")
    jobs = [int(word) for word in open(path).read().split()]
    while len(jobs) < 2:
        jobs = [int(word) for word in open(path).read().split()]
    fcntl.ioctl(master, termios.TIOCSWINSZ, WINDOW)
    seen(f"front-{int(signal.SIGWINCH)}")
    os.unlink(here.path(f"front-{int(signal.SIGWINCH)}"))
    yield
    assert struct.unpack("i", fcntl.ioctl(master, termios.TIOCGPGRP, bytes(4)))[0] == jobs[0]
    # /proc names the terminal and the group in front for each of the session
    for process in (pid, *jobs):
        fields = open(f"/proc/{process}/stat").read().rpartition(")")[2].split()
        assert int(fields[4]) == os.stat(f"/proc/{pid}/fd/0").st_rdev, fields
        assert int(fields[5]) == jobs[0]
    # nobody heard that the size was set again at the rebuild
    assert not os.path.exists(here.path(f"front-{int(signal.SIGWINCH)}"))
    os.write(master, b"\x03")
    seen(f"front-{int(signal.SIGINT)}")
    assert not os.path.exists(here.path(f"behind-{int(signal.SIGINT)}"))
    os.write(master, b"line\n")
    open(here.path("read"), "w").close()
    seen("front-read")
    seen(f"behind-{int(signal.SIGTTIN)}")
    os.close(master)
    seen("hup")


class Typist:
    """Types into a terminal, and reads what comes back until it is what was expected."""

    def __init__(self, master: int) -> None:
        self.master = master
        self.seen = b""

    def type(self, text: str, *expected: str) -> None:
        """``expected``: regular expressions that must come, in this order."""
        self.seen = b""
        os.write(self.master, text.encode())
        for pattern in expected:
            self._until(pattern.encode())

    def in_front(self, shell: int, *, job: bool) -> None:
        """Until a job of the shell has the terminal, or the shell itself: keys are for who is in front."""
        end = time.monotonic() + 30
        while (struct.unpack("i", fcntl.ioctl(self.master, termios.TIOCGPGRP, bytes(4)))[0] != shell) != job:
            assert time.monotonic() < end
            time.sleep(0.001)

    def _until(self, pattern: bytes) -> None:
        end = time.monotonic() + 30
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, (pattern, self.seen)
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 4096)
        self.seen = self.seen[found.end() :]


@case("files/terminal-master", "files/terminal", "state/registers")
def bash_with_jobs(here: Here) -> Iterator[None]:
    """The real one: variables, a job behind, one that was stopped, one in front that reads."""
    pid, master = os.forkpty()
    if pid == 0:
        os.chdir(here.folder)
        os.execve("/bin/bash", ["bash", "--norc", "--noediting", "-i"], {"PATH": "/usr/bin:/bin", "PS1": "ready> "})
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 91, 0, 0))
    shell = Typist(master)
    shell.type("", "ready> ")
    shell.type("kept='a b'; f() { echo \"got $1\"; }\n", "ready> ")
    shell.type("sleep 1000 &\n", r"\[1\] \d+", "ready> ")
    shell.type("cat > typed\n", "\r\n")
    shell.in_front(pid, job=True)
    shell.type("first\n", "first")
    while not os.path.exists(here.path("typed")) or os.path.getsize(here.path("typed")) < 6:
        time.sleep(0.001)  # the key that stops it would throw away what it has not read
    shell.type("\x1a", "Stopped", "ready> ")
    shell.type("tr a-z A-Z\n", "\r\n")
    shell.type("before\n", "before\r\n", "BEFORE\r\n")
    yield
    # the one in front goes on reading; what it has read of is in its buffer
    shell.type("after\n", "after\r\n", "AFTER\r\n")
    shell.type("\x04", "ready> ")
    shell.type('f "$kept"\n', "got a b\r\n", "ready> ")
    shell.type("jobs\n", r"\[1\]-\s+Running\s+sleep 1000 &\r\n", r"\[2\]\+\s+Stopped\s+cat > typed\r\n", "ready> ")
    shell.type("fg\n", "cat > typed\r\n")
    shell.in_front(pid, job=True)
    shell.type("second\n", "second")
    shell.type("\x04", "ready> ")
    shell.type("cat typed; stty size\n", "first\r\nsecond\r\n33 91\r\n", "ready> ")
    shell.type("kill %1; wait %1; echo $?\n", "143\r\n", "ready> ")
    shell.type("sleep 500\n", "\r\n")
    shell.in_front(pid, job=True)
    shell.type("\x03", "ready> ")
    shell.type("echo $?\n", "130\r\n", "ready> ")
    os.write(master, b"exit 7\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
