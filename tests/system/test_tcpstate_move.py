"""Connections moved between two hosts, with their address, under full-speed random streams both ways."""

import contextlib
import random
import select
import socket
import threading
import time

import pytest

from tcpstate.capture import Capture, replay
from tcpstate.discard import discard_connections
from tcpstate.export import export_connections
from tcpstate.freeze import Blackhole, quiet
from tcpstate.kernel.route import is_local
from tcpstate.rebuild import compare, rebuild_connections, release_connections
from tests.tscnet import SERVICE, Watcher, net, pair, wait_until

PERIOD = 1 << 20
TO_CLIENT = random.Random(1).randbytes(PERIOD) * 2
TO_SERVER = random.Random(2).randbytes(PERIOD) * 2


class Stream(threading.Thread):
    """One end of the connection: sends one stream, checks the other. Stops and continues like a stopped process."""

    def __init__(self, sock, out, expected, seed):
        super().__init__(daemon=True)
        self.sock, self.out, self.expected = sock, out, expected
        self.sent = self.received = 0
        self.error = ""
        self.largest_gap = 0.0
        self.random = random.Random(seed)
        self.gate = threading.Lock()
        self.done = False
        sock.setblocking(False)

    def run(self):
        try:
            last = time.monotonic()
            while not self.done:
                with self.gate:
                    readable, writable, _ = select.select([self.sock], [self.sock], [], 0.005)
                    if readable:
                        data = self.sock.recv(self.random.randrange(1, 200_000))
                        at = self.received % PERIOD
                        assert data, "the stream ended"
                        assert data == self.expected[at : at + len(data)], f"corrupt at {self.received}"
                        self.received += len(data)
                        now = time.monotonic()
                        self.largest_gap, last = max(self.largest_gap, now - last), now
                    if writable and self.random.random() < 0.7:
                        at = self.sent % PERIOD
                        with contextlib.suppress(BlockingIOError):
                            self.sent += self.sock.send(self.out[at : at + self.random.randrange(1, 60_000)])
                # let the stopper in
                time.sleep(0)
        except (AssertionError, OSError) as error:
            self.error = repr(error)


def move(sock, source, target, family, hole):
    """Move one connection and the service address; returns the new socket and the record."""
    with source, Capture(ports={7000}) as here:
        states = quiet([sock])
        (record,) = records = export_connections([sock], states)
        exported = time.monotonic()
        with target:
            there = Capture(ports={7000})
            there.start()
            elapsed = time.monotonic() - exported
            (made,) = socks = rebuild_connections(records, elapsed=elapsed)
            (again,) = export_connections(socks, states)
            assert compare(record, again) == []
        source.remove(family)
        target.add(family)
        arrived = here.segments()
        with target:
            wait_until(lambda: is_local(SERVICE[family]))
            release_connections(socks, records)
            replay(arrived + there.segments(), records)
            target.announce(family)
            time.sleep(0.002)
            replay(there.segments(), records)
            there.close()
        discard_connections([sock])
    return made, record


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
        with Watcher(hosts.c) as watcher:
            served, client = pair(hosts.a, hosts.c, family, mapped=mapped)
            theirs = Stream(client, TO_SERVER, TO_CLIENT, 11)
            ours = Stream(served, TO_CLIENT, TO_SERVER, 12)
            theirs.start()
            ours.start()
            here, there = hosts.a, hosts.b
            kinds = {"unacked": 0, "unsent": 0, "unread": 0}
            chance = random.Random(family + moves)
            for _ in range(moves):
                time.sleep(chance.uniform(0.01, 0.06))
                with ours.gate:
                    ours.sock, record = move(ours.sock, here, there, family, None)
                    ours.sock.setblocking(False)
                kinds["unacked"] += record.sent > 0
                kinds["unsent"] += len(record.send_queue) > record.sent
                kinds["unread"] += bool(record.receive_queue)
                here, there = there, here
                assert not ours.error
                assert not theirs.error
            before = ours.received, theirs.received
            wait_until(lambda: ours.received > before[0] and theirs.received > before[1], 10)
            time.sleep(0.2)
            ours.done = theirs.done = True
            ours.join()
            theirs.join()
            resets = watcher.resets()
        assert (ours.error, theirs.error) == ("", "")
        assert resets == []
        print(
            f"{moves} moves: {ours.sent >> 10} KiB and {theirs.sent >> 10} KiB, {kinds}, "
            f"largest gap at the client {theirs.largest_gap * 1e3:.1f} ms"
        )
        return kinds


@pytest.mark.parametrize(
    ("family", "mapped"), [(socket.AF_INET, False), (socket.AF_INET6, False), (socket.AF_INET, True)]
)
def test_streams_survive_forty_moves(family, mapped):
    kinds = run(family, 40, mapped=mapped)
    assert min(kinds.values()) > 0, f"the moves did not meet every kind of queue: {kinds}"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_streams_survive_moves_with_two_percent_loss(family):
    run(family, 10, loss=True)
