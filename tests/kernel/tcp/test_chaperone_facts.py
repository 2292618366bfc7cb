"""What the chaperone assumes of Linux: whose a socket is, what its capabilities open, and why it never hands out a
socket in repair mode."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tcpstate.chaperone import privilege
from tcpstate.chaperone.holding import _dissolve
from tcpstate.chaperone.identity import Peer, _descriptors, cookie_of, nameless
from tcpstate.chaperone.policy import PRIVILEGED_OPTIONS
from tcpstate.kernel import batch, diag
from tcpstate.kernel.capability import Cap
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import SO, UNSPECIFIED_ADDRESS, Level, pidfd_getfd
from tcpstate.kernel.tcp import TCP, Repair, TcpInfo, TcpState
from tcpstate.options import TABLE, Format, Where

USER = 65534
_FORK = multiprocessing.get_context("fork")


def with_capabilities(what: Callable[..., Any], keep: frozenset[Cap] | None, *arguments: Any) -> Any:
    """The result of a call in a process that has these capabilities and is an ordinary user otherwise (None: in one
    that is root still); an exception is the result, too."""
    here, there = _FORK.Pipe()

    def run() -> None:
        try:
            if keep is not None:
                privilege.drop(keep, "daemon")
            there.send(what(*arguments))
        except Exception as error:  # for the test to judge
            there.send(error)

    process = _FORK.Process(target=run)
    process.start()
    try:
        return here.recv()
    finally:
        process.join()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    with client, server:
        yield client, server


def test_a_socket_belongs_to_who_made_it_and_can_be_given_away(pair: tuple[socket.socket, socket.socket]) -> None:
    client, _ = pair
    port = client.getsockname()[1]
    assert os.fstat(client.fileno()).st_uid == 0
    os.fchown(client.fileno(), USER, -1)
    assert os.fstat(client.fileno()).st_uid == USER
    assert [s.uid for s in diag.dump(local_port=port)] == [USER]


def test_giving_a_socket_away_takes_cap_chown() -> None:
    def give() -> int:
        with socket.socket() as sock:
            os.fchown(sock.fileno(), USER, -1)
            return os.fstat(sock.fileno()).st_uid

    assert with_capabilities(give, frozenset({Cap.CHOWN})) == USER
    assert with_capabilities(give, privilege.NEEDED - {Cap.CHOWN}).errno == errno.EPERM


def test_ptrace_rights_open_fdinfo_and_descriptors_but_not_fd() -> None:
    """Of a process of another user; by fdinfo its sockets are found without CAP_DAC_READ_SEARCH."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.setgroups([])
        os.setresuid(USER, USER, USER)
        # changing the user has made it undumpable, which is what another user's programs usually are not
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
        sock = socket.socket()
        os.write(write, struct.pack("=QQ", sock.fileno(), os.fstat(sock.fileno()).st_ino))
        signal.pause()
    try:
        number, inode = struct.unpack("=QQ", os.read(read, 16))

        def look() -> Any:
            with pytest.raises(PermissionError):
                os.listdir(f"/proc/{child}/fd")
            return list(_descriptors(inode, USER, child))[:1], pidfd_getfd(os.pidfd_open(child), number) > 0

        assert with_capabilities(look, frozenset({Cap.SYS_PTRACE})) == ([(child, number)], True)
        assert with_capabilities(look, privilege.NEEDED - {Cap.SYS_PTRACE}).code == "TM-0102"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(write)
        os.close(read)


def connect_nowhere(sock: socket.socket) -> None:
    nowhere = ctypes.create_string_buffer(UNSPECIFIED_ADDRESS)
    batch.syscall(SYS.connect, sock.fileno(), ctypes.addressof(nowhere), len(UNSPECIFIED_ADDRESS))


def state(sock: socket.socket) -> TcpState:
    return TcpState(TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, 280)).state)


def make_another(sock: socket.socket) -> tuple[Any, ...]:
    """What a user can make of a socket in repair mode: a connection of any numbers to anyone; a listener on another's
    port."""
    connect_nowhere(sock)
    sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, 2)
    sock.setsockopt(Level.TCP, TCP.QUEUE_SEQ, struct.pack("I", 12345))
    sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, 0)
    sock.bind(("127.0.0.1", 0))
    sock.connect(("127.0.0.9", 9))
    forged = state(sock)
    connect_nowhere(sock)
    with socket.create_server(("127.0.0.1", 0)) as other:
        sock.bind(other.getsockname())
        sock.listen()
        return forged, state(sock)


def test_a_socket_in_repair_mode_makes_anything_of_itself_without_a_capability(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    client, server = pair
    server.setsockopt(Level.TCP, TCP.REPAIR, Repair.ON)
    client.setsockopt(Level.TCP, TCP.REPAIR, Repair.ON)
    assert with_capabilities(make_another, frozenset(), client) == (TcpState.ESTABLISHED, TcpState.LISTEN)
    # and a listener does not leave repair mode any more
    with pytest.raises(PermissionError):
        client.setsockopt(Level.TCP, TCP.REPAIR, Repair.OFF_NO_PROBE)
    _dissolve(client)
    assert state(client) is TcpState.CLOSE
    assert client.getsockopt(Level.TCP, TCP.REPAIR) == 0
    assert not client.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def test_the_mark_and_repair_mode_are_not_the_users_to_change(pair: tuple[socket.socket, socket.socket]) -> None:
    client, _ = pair
    client.setsockopt(Level.SOCKET, SO.MARK, 7)

    def change(level: int, option: int) -> int:
        client.setsockopt(level, option, 0)
        return 0

    for level, option in ((Level.SOCKET, SO.MARK), (Level.TCP, TCP.REPAIR)):
        assert with_capabilities(change, frozenset(), level, option).errno == errno.EPERM


def test_a_cookie_outlives_what_a_socket_becomes(pair: tuple[socket.socket, socket.socket]) -> None:
    client, _ = pair
    before = cookie_of(client)
    connect_nowhere(client)
    assert cookie_of(client) == before


def test_the_other_end_of_a_unix_socket_is_named_by_the_kernel() -> None:
    from tcpstate.chaperone.identity import peer_of

    one, other = socket.socketpair()
    with one, other:
        assert peer_of(one) == Peer(os.getpid(), os.getuid(), os.getgid())


def test_users_without_a_number_are_known_by_the_map() -> None:
    assert not nameless(65534), "in the first user namespace nobody is one user"

    def inside() -> tuple[bool, bool, int]:
        mine = os.getuid()
        # CLONE_NEWUSER; only root has a number there
        assert ctypes.CDLL(None).unshare(0x10000000) == 0
        with open("/proc/self/uid_map", "w") as file:
            file.write(f"0 {mine} 1")
        with socket.socket() as sock:
            return nameless(65534), nameless(0), os.fstat(sock.fileno()).st_uid

    assert with_capabilities(inside, None) == (True, False, 0)


def _refused(family: int) -> set[str]:
    """Options of the table of which a user may not set a value that differs from a fresh socket's."""
    found = set()
    for option in TABLE:
        if not option.where & (Where.IPV6 if family == socket.AF_INET6 else Where.IPV4):
            continue
        with socket.socket(family) as sock:
            values = [bytes(8)] if option.format is Format.BYTES else []
            if not values:
                try:
                    usual = sock.getsockopt(option.level, option.number, option.size)
                except OSError:
                    continue
                values = [bytes([value]) + bytes(len(usual) - 1) for value in (0, 1, 2, 7, 64)]
            for value in values:
                try:
                    sock.setsockopt(option.level, option.number, value)
                except OSError as error:
                    if error.errno in (errno.EPERM, errno.EACCES):
                        found.add(option.keyword)
    return found


def test_options_that_take_a_capability_are_known() -> None:
    for family in (socket.AF_INET, socket.AF_INET6):
        refused = with_capabilities(_refused, frozenset(), family)
        # priorities up to 6 are everyone's
        assert refused - {"so.priority"} <= PRIVILEGED_OPTIONS
        assert {"so.mark", "so.debug", "so.priority"} <= refused
