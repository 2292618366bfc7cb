"""What the states without a living connection rely on, each on its own."""

import contextlib
import errno
import select
import socket
import struct

import pytest

from tcpstate.closed import pending_error
from tcpstate.kernel.bpf import DROP_ALL, attach
from tcpstate.kernel.sockets import SO, Ioctl, Level, ioctl_int
from tcpstate.kernel.tcp import INFO_SIZE, TCP, Repair, RepairQueue, TcpInfo, TcpState
from tests.tscnet import Watcher, net, wait_until

FAMILIES = [socket.AF_INET, socket.AF_INET6]
NAME_SIZE = {socket.AF_INET: 16, socket.AF_INET6: 28}


@pytest.fixture(scope="module")
def hosts():
    with net() as made:
        yield made


def state(sock):
    return TcpState(TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE)).state)


def queue_seq(sock, queue):
    sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, queue)
    (value,) = struct.unpack("I", sock.getsockopt(Level.TCP, TCP.QUEUE_SEQ, 4))
    sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    return value


@contextlib.contextmanager
def connecting(hosts, family):
    """A socket of a that connects to a listener of c which hears nothing."""
    with hosts.c.socket(family, socket.SOCK_STREAM) as listener, hosts.a.socket(family, socket.SOCK_STREAM) as sock:
        listener.bind((hosts.c.own(family), 0))
        listener.listen()
        attach(listener, DROP_ALL)
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.connect(listener.getsockname()[:2])
        yield sock, listener


@pytest.mark.parametrize("family", FAMILIES)
def test_a_connecting_socket_can_be_read_in_repair(hosts, family):
    with connecting(hosts, family) as (sock, _):
        assert state(sock) is TcpState.SYN_SENT
        sock.setsockopt(Level.TCP, TCP.REPAIR, Repair.ON)
        assert queue_seq(sock, RepairQueue.RECEIVE) == 0
        assert queue_seq(sock, RepairQueue.SEND) != 0
        # the SYN is in neither count
        assert ioctl_int(sock.fileno(), Ioctl.SIOCOUTQ) == ioctl_int(sock.fileno(), Ioctl.SIOCINQ) == 0
        sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.SEND)
        assert sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""


@pytest.mark.parametrize("family", FAMILIES)
def test_so_peername_tells_the_peer_that_getpeername_does_not(hosts, family):
    with connecting(hosts, family) as (sock, listener):
        with pytest.raises(OSError, match="not connected"):
            sock.getpeername()
        raw = sock.getsockopt(Level.SOCKET, SO.PEERNAME, NAME_SIZE[family])
        assert int.from_bytes(raw[2:4], "big") == listener.getsockname()[1]
    with hosts.a.socket(family, socket.SOCK_STREAM) as fresh, pytest.raises(OSError, match="not connected"):
        fresh.getsockopt(Level.SOCKET, SO.PEERNAME, NAME_SIZE[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_connect_takes_the_sequence_number_that_repair_has_set(hosts, family):
    with (
        Watcher(hosts.c, keep=lambda s: s.flags == 2) as seen,
        hosts.a.socket(family, socket.SOCK_STREAM) as sock,
        connecting(hosts, family) as (_, listener),
    ):
        wait_until(lambda: seen.seen)
        sock.setblocking(False)
        sock.setsockopt(Level.TCP, TCP.REPAIR, Repair.ON)
        sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.SEND)
        sock.setsockopt(Level.TCP, TCP.QUEUE_SEQ, struct.pack("I", 77777))
        sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
        sock.bind((hosts.a.own(family), 0))
        sock.setsockopt(Level.TCP, TCP.REPAIR, Repair.OFF_NO_PROBE)
        with contextlib.suppress(BlockingIOError):
            sock.connect(listener.getsockname()[:2])
        port = sock.getsockname()[1]
        wait_until(lambda: any(s.source_port == port and s.seq == 77777 for _, s in seen.seen))


@pytest.mark.parametrize("family", FAMILIES)
def test_connect_begins_another_clock_which_repair_can_set_back(hosts, family):
    with connecting(hosts, family) as (sock, _):
        sock.setsockopt(Level.TCP, TCP.REPAIR, Repair.ON)
        sock.setsockopt(Level.TCP, TCP.TIMESTAMP, struct.pack("I", 5_000_000))
        (now,) = struct.unpack("I", sock.getsockopt(Level.TCP, TCP.TIMESTAMP, 4))
        assert 0 <= now - 5_000_000 < 1_000_000
        sock.setsockopt(Level.TCP, TCP.REPAIR, Repair.OFF_NO_PROBE)
        assert state(sock) is TcpState.SYN_SENT


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reset_socket_keeps_its_unread_data_and_its_numbers(hosts, family):
    with connecting(hosts, family) as (sock, listener):
        listener.setsockopt(Level.SOCKET, SO.DETACH_FILTER, 0)
        peer, _ = listener.accept()
        peer.sendall(b"unread")
        wait_until(lambda: ioctl_int(sock.fileno(), Ioctl.SIOCINQ) == 6)
        peer.setsockopt(Level.SOCKET, SO.LINGER, struct.pack("ii", 1, 0))
        peer.close()
        wait_until(lambda: state(sock) is TcpState.CLOSE)
        sock.setsockopt(Level.TCP, TCP.REPAIR, Repair.ON)
        assert queue_seq(sock, RepairQueue.RECEIVE) != 0
        assert ioctl_int(sock.fileno(), Ioctl.SIOCINQ) == 6
        sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.RECEIVE)
        assert sock.recv(99, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"unread"
        sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
        sock.setsockopt(Level.TCP, TCP.REPAIR, Repair.OFF_NO_PROBE)
        # none of it has taken the error away, nor does looking
        assert pending_error(sock, established=True) == ("ECONNRESET", True)
        poll = select.poll()
        poll.register(sock, 0)
        assert poll.poll(0)[0][1] & select.POLLERR
        assert sock.getsockopt(Level.SOCKET, SO.ERROR) == errno.ECONNRESET
        assert not poll.poll(0)[0][1] & select.POLLERR


def test_connect_to_a_bound_port_that_does_not_listen_leaves_the_error_pending(hosts):
    with hosts.a.socket() as deaf, hosts.a.socket() as sock:
        deaf.bind((hosts.a.own(socket.AF_INET), 0))
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.connect(deaf.getsockname())
        assert state(sock) is TcpState.CLOSE
        assert sock.getsockopt(Level.SOCKET, SO.ERROR) == errno.ECONNREFUSED


def test_an_error_without_a_name_of_ours_is_seen_as_it_is(hosts):
    with connecting(hosts, socket.AF_INET) as (sock, _):
        sock.setsockopt(Level.TCP, TCP.SYNCNT, 1)
        sock.setsockopt(Level.TCP, TCP.USER_TIMEOUT, 1)
        wait_until(lambda: state(sock) is TcpState.CLOSE, 20)
        assert pending_error(sock, established=False) == ("ETIMEDOUT", True)
        assert sock.getsockopt(Level.SOCKET, SO.ERROR) == errno.ETIMEDOUT
        assert pending_error(sock, established=False) == ("", True)
