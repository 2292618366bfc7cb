"""What the kernel does with pseudo terminals, netlink and packet sockets, as checkpoint/files assumes."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import termios
from collections.abc import Iterator

import pytest

from checkpoint.files.terminal import Terminal, Termios, TtyCall, number_of, open_pair, open_slave, word


@pytest.fixture
def pair() -> Iterator[tuple[int, int]]:
    master, slave = os.openpty()
    yield master, slave
    for fd in (master, slave):
        os.close(fd)


def test_both_ends_tell_the_number(pair: tuple[int, int]) -> None:
    master, slave = pair
    assert number_of(master) == number_of(slave) == int(os.ttyname(slave).rpartition("/")[2])
    assert number_of(os.open("/dev/null", os.O_RDONLY)) is None


def test_the_master_tells_the_modes_of_the_slave(pair: tuple[int, int]) -> None:
    master, slave = pair
    modes = termios.tcgetattr(slave)
    modes[3] &= ~termios.ECHO
    termios.tcsetattr(slave, termios.TCSANOW, modes)
    assert Termios.of(master) == Termios.of(slave)


def test_the_lowest_free_number_is_given() -> None:
    first = open_pair(0, lambda _: None)
    number = number_of(first)
    assert number is not None
    second = open_pair(number + 3, lambda text: pytest.fail(text))
    assert number_of(second) == number + 3
    for fd in (first, second):
        os.close(fd)


def test_a_slave_that_was_closed_hangs_the_master_up_until_it_is_opened() -> None:
    master = open_pair(0, lambda _: None)
    poll = select.poll()
    poll.register(master, 0)
    assert poll.poll(0) == []
    slave = open_slave(master, os.O_RDWR)
    os.close(slave)
    assert poll.poll(0) == [(master, select.POLLHUP)]
    slave = open_slave(master, os.O_RDWR)
    assert poll.poll(0) == []
    os.close(slave)
    os.close(master)


def test_open_slave_does_not_leave_close_on_exec_in_the_description(pair: tuple[int, int]) -> None:
    slave = open_slave(pair[0], os.O_RDWR)
    other = os.dup(slave)
    os.set_inheritable(other, True)
    with open(f"/proc/self/fdinfo/{other}") as lines:
        flags = next(int(line.split()[1], 8) for line in lines if line.startswith("flags:"))
    assert not flags & os.O_CLOEXEC
    for fd in (slave, other):
        os.close(fd)


def test_what_waits_can_be_taken_and_put_back(pair: tuple[int, int]) -> None:
    master, slave = pair
    os.write(master, b"one\ntwo\n\x04thr")
    os.write(slave, b"shown")
    ours = open_slave(master, os.O_RDWR | os.O_NONBLOCK)
    modes = Termios.of(master)
    first = Terminal.take(master, ours)
    assert (first.lines, first.rest) == ((b"one\n", b"two\n", b""), b"thr")
    assert Terminal.take(master, ours) == first
    assert Termios.of(master) == modes
    os.close(ours)


def terminal_of_this_process() -> int:
    with open("/proc/self/stat") as file:
        return int(file.read().rpartition(")")[2].split()[4])


def test_children_inherit_the_controlling_terminal_and_nobody_else_gets_it() -> None:
    go_on, going = os.pipe()
    pid, master = os.forkpty()
    if pid == 0:
        os.write(1, b"up")
        child = os.fork()
        if child == 0:
            # a session's member has it by birth; another session's leader has not
            mine = terminal_of_this_process()
            os.setsid()
            os._exit(0 if mine and not terminal_of_this_process() else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.read(go_on, 1)
        os._exit(status)
    assert os.read(master, 9) == b"up"
    assert word(master, TtyCall.TIOCGSID) == pid
    os.write(going, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for fd in (master, go_on, going):
        os.close(fd)


def test_proc_tells_unread_bytes_and_dumps_of_netlink_sockets() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.bind((0, 0))
        inode = os.fstat(sock.fileno()).st_ino

        def row() -> list[str]:
            with open("/proc/self/net/netlink") as lines:
                return next(words for line in lines if (words := line.split())[-1] == str(inode))

        assert (row()[4], row()[6]) == ("0", "0")
        sock.send(struct.pack("<IHHIIB15x", 32, 18, 0x301, 1, 0, 0))
        assert int(row()[4]) > 0


def test_packet_diag_tells_memberships() -> None:
    from checkpoint.files.packet import Listening, _asked

    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        index = socket.if_nametoindex("lo")
        sock.setsockopt(263, 1, struct.pack("<iHH8x", index, 1, 0))

        class View:
            stat = os.fstat(sock.fileno())
            object = "the socket"

        assert _asked(View()) == (Listening(device="lo", type=1, address=b"", count=1),)  # type: ignore[arg-type]


def test_a_lease_is_taken_by_who_asks_and_the_owner_may_be_set_afterwards(tmp_path: object) -> None:
    path = os.path.join(str(tmp_path), "file")
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    owner = struct.unpack("ii", fcntl.fcntl(fd, 16, bytes(8)))
    assert owner == (1, os.getpid())
    fcntl.fcntl(fd, 15, struct.pack("ii", 1, os.getppid()))
    assert struct.unpack("ii", fcntl.fcntl(fd, 16, bytes(8))) == (1, os.getppid())
    os.close(fd)
