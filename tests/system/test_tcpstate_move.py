"""Connections moved between two hosts, with their address, under full-speed random streams both ways."""

import contextlib
import mmap
import os
import random
import select
import signal
import socket
import struct
import time

import pytest

from tcpstate.capture import Capture, replay
from tcpstate.discard import discard_connections
from tcpstate.export import export_connections
from tcpstate.freeze import Blackhole, quiet, thaw
from tcpstate.kernel.route import is_local
from tcpstate.kernel.sockets import Ioctl, ioctl_int
from tcpstate.locate import take
from tcpstate.rebuild import compare, rebuild_connections, release_connections
from tests.tscnet import SERVICE, Watcher, net, pair, wait_until

pytestmark = pytest.mark.alone

PERIOD = 1 << 20
TO_CLIENT = random.Random(1).randbytes(PERIOD) * 2
TO_SERVER = random.Random(2).randbytes(PERIOD) * 2
REPORT = struct.Struct("QQd200s")


class Stream:
    """A process that sends one endless stream over a socket and checks every byte of the other."""

    def __init__(self, sock, out, expected, sent=0, received=0):
        self.shared = mmap.mmap(-1, REPORT.size)
        self.fd = sock.fileno()
        self.pid = os.fork()
        if not self.pid:
            try:
                self._run(sock, out, expected, sent, received)
            finally:
                os._exit(1)

    def _run(self, sock, out, expected, sent, received):
        sock.setblocking(False)
        chance = random.Random(received)
        gap, last, error = 0.0, time.monotonic(), b""
        while not error:
            readable, writable, _ = select.select([sock], [sock], [], 1)
            try:
                if readable:
                    data = sock.recv(chance.randrange(1, 200_000))
                    at = received % PERIOD
                    if not data:
                        error = b"the stream ended"
                    elif data != expected[at : at + len(data)]:
                        error = b"corrupt at %d" % received
                    received += len(data)
                    now = time.monotonic()
                    gap, last = max(gap, now - last), now
                if writable and chance.random() < 0.7:
                    at = sent % PERIOD
                    with contextlib.suppress(BlockingIOError):
                        sent += sock.send(out[at : at + chance.randrange(1, 60_000)])
            except OSError as failure:
                error = repr(failure).encode()
            self.shared[:] = REPORT.pack(sent, received, gap, error)

    @property
    def received(self):
        return REPORT.unpack(self.shared[:])[1]

    @property
    def largest_gap(self):
        return REPORT.unpack(self.shared[:])[2]

    @property
    def error(self):
        return REPORT.unpack(self.shared[:])[3].rstrip(b"\0").decode()

    def stop(self):
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class Service:
    """The moving end: its process, its place in both streams, its host."""

    def __init__(self, sock, host):
        with host:
            # both queues are empty yet: these are the numbers where the streams begin
            states = quiet([sock])
            (record,) = export_connections([sock], states)
            thaw([sock], states)
        self.first = record.write_seq, record.copied_seq
        self.total = [0, 0]
        self.host = host
        self.process = Stream(sock, TO_CLIENT, TO_SERVER)
        sock.close()

    def move(self, target, family):
        """Move the connection and the service address; returns the record."""
        source = self.host
        sock = take(self.process.pid, self.process.fd)
        with target:
            there = Capture(ports={7000})
            there.start()
        with source, Capture(ports={7000}) as here:
            self.process.stop()
            states = quiet([sock])
            (record,) = records = export_connections([sock], states)
            exported = time.monotonic()
            with target:
                (made,) = socks = rebuild_connections(records, elapsed=time.monotonic() - exported)
                (again,) = export_connections(socks, states)
                assert compare(record, again) == []
            source.remove(family)
            target.add(family)
            arrived = here.segments()
            with target:
                wait_until(lambda: is_local(SERVICE[family]))
                release_connections(socks, records)
                replay(arrived + there.segments(), records)
                old = self.process
                for i, number in enumerate((record.write_seq, record.copied_seq)):
                    self.total[i] += (number - self.first[i] - self.total[i]) & 0xFFFFFFFF
                self.process = Stream(made, TO_CLIENT, TO_SERVER, *self.total)
            made.close()
            there.close()
            discard_connections([sock])
            old.kill()
        self.host = target
        return record


def run(family, moves, *, mapped=False, loss=False):
    with net() as hosts:
        hosts.a.add(family)
        if loss:
            for hook, side in (("input", "sport"), ("output", "dport")):
                hosts.c.sh("nft add table inet x")
                hosts.c.sh(f"nft add chain inet x {hook} '{{ type filter hook {hook} priority 0; }}'")
                hosts.c.sh(f"nft add rule inet x {hook} tcp {side} 7000 numgen random mod 100 \\< 2 drop")
        for host in (hosts.a, hosts.b):
            with host:
                Blackhole().ensure()
        kinds = {"unacked": 0, "unsent": 0, "unread": 0}
        with Watcher(hosts.c, keep=lambda s: s.flags & 4) as watcher, contextlib.ExitStack() as stack:
            served, client = pair(hosts.a, hosts.c, family, mapped=mapped)
            service = Service(served, hosts.a)
            stack.callback(lambda: service.process.kill())
            theirs = Stream(client, TO_SERVER, TO_CLIENT)
            stack.callback(theirs.kill)
            chance = random.Random(family + moves)
            spent = []
            for number in range(moves):
                time.sleep(chance.uniform(0.01, 0.06))
                # now and then the client does not read until there is something that cannot be sent
                with full(service, theirs) if number % 16 == 8 else contextlib.nullcontext():
                    begun = time.monotonic()
                    record = service.move(hosts.b if service.host is hosts.a else hosts.a, family)
                    spent.append(time.monotonic() - begun)
                kinds["unacked"] += record.sent > 0
                kinds["unsent"] += len(record.send_queue) > record.sent
                kinds["unread"] += bool(record.receive_queue)
                # else the next move may come before the process has run at all
                at = service.total[1], theirs.received
                wait_until(lambda at=at: service.process.received > at[0] and theirs.received > at[1], 10)
                assert (service.process.error, theirs.error) == ("", "")
            time.sleep(0.1)
            assert (service.process.error, theirs.error) == ("", "")
            resets = watcher.resets()
        assert resets == []
        print(
            f"{moves} moves of {sorted(spent)[len(spent) // 2] * 1e3:.0f} ms: {service.total[0] >> 10} KiB out, "
            f"{service.total[1] >> 10} KiB in, {kinds}, largest gap at the client {theirs.largest_gap * 1e3:.1f} ms"
        )
        return kinds


@contextlib.contextmanager
def full(service, theirs):
    """The client rests, and what the service writes waits for room."""
    theirs.stop()
    try:
        with take(service.process.pid, service.process.fd) as sock:
            wait_until(lambda: ioctl_int(sock.fileno(), Ioctl.SIOCOUTQNSD) > 0)
        yield
    finally:
        os.kill(theirs.pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("family", "mapped"), [(socket.AF_INET, False), (socket.AF_INET6, False), (socket.AF_INET, True)]
)
def test_streams_survive_forty_moves(family, mapped):
    kinds = run(family, 40, mapped=mapped)
    assert min(kinds.values()) > 0, f"the moves did not meet every kind of queue: {kinds}"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_streams_survive_moves_with_two_percent_loss(family):
    run(family, 10, loss=True)
