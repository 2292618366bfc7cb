"""Microseconds per connection of every step of a move, beside the same system calls in C.

``python -m tests.bench.bench_connections [COUNT ...]`` (as root): IPv4 and IPv6, with empty queues and with 4 KiB
unread in each; 1,000 and 10,000 of them if no COUNT is named.  C is compiled with gcc in the same run, if gcc is there.
Processor time, because hosts are shared, and for the three steps together also the clock on the wall.  C runs on one
thread; tcpstate is measured on one, which the ratio is of, and on the two that it uses where there are two processors:
they take less time together and more of the processors, as they meet in the kernel.  Nothing is judged by the clock.

Steps: options (and MD5 keys, which C does not look for) are read while the owner stands still and the connections live;
quiet to release is the time in which their peers meet silence; wire is the record packed and unpacked; C has no
records, only the calls. ``three`` is freeze (quiet), export and rebuild together; the rebuild gives learned state back
(``--no-soft``: not, in both).  The peers are in a process of their own: 10,000 pairs do not fit one RLIMIT_NOFILE.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tcpstate import options, roundtrip, softstate
from tcpstate.discard import discard_connections
from tcpstate.export import export_connections
from tcpstate.freeze import MARK, quiet, read_originals
from tcpstate.inward import inward
from tcpstate.kernel import bpf, columns, lanes
from tcpstate.kernel.bpf import windows
from tcpstate.kernel.sockets import Ioctl, ioctl_int, pack_address
from tcpstate.md5keys import keys_of
from tcpstate.rebuild import differences, rebuild_connections, release_connections
from tcpstate.record import ConnectionRecord
from tcpstate.rehearsal import rehearse
from tcpstate.silence import Blackhole
from tests.bench.results import note
from tests.tscnet import SERVICE, Host, Net, net, wait_until

T = TypeVar("T")
PORT = 7000
BATCH = 2000  # connections that are made before they are accepted
STEPS = ("options", "quiet", "export", "wire", "discard", "rebuild", "compare", "release")
THREE = ("quiet", "export", "rebuild")
WALL = "seconds on the wall"
SOURCE = Path(__file__).with_suffix(".c")


@dataclass(frozen=True, slots=True)
class Case:
    """So many connections of one family, each with so many bytes unread."""

    count: int
    family: int = socket.AF_INET
    unread: int = 0
    soft: bool = True

    @property
    def name(self) -> str:
        kind = "IPv6" if self.family == socket.AF_INET6 else "IPv4"
        return f"{self.count} {kind}" + (f", {self.unread} unread" if self.unread else "")


class One(ctypes.Structure):
    """``struct one`` of the C source."""

    _fields_ = (
        ("local", ctypes.c_char * 28),
        ("peer", ctypes.c_char * 28),
        ("loopback", ctypes.c_char * 28),
        ("packet", ctypes.c_char * 72),
        ("size", ctypes.c_uint),
        ("v6", ctypes.c_uint),
        ("send", ctypes.c_uint),
        ("receive", ctypes.c_uint),
        ("window", ctypes.c_uint * 5),
        ("unread", ctypes.c_uint),
        ("packet_size", ctypes.c_uint),
        ("taught", ctypes.c_uint),
        ("data", ctypes.c_char_p),
    )


def compiled(folder: Path) -> ctypes.CDLL | None:
    if shutil.which("gcc") is None:
        return None
    library = folder / "calls.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.export.restype = ctypes.c_long
    return loaded


class Peers:
    """A process on a host that makes connections to the service, sends, and drops them. ``say``: what it is told."""

    def __init__(self, host: Host) -> None:
        self._ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            try:
                self._ours.close()
                with host:
                    self._run(theirs)
            finally:
                os._exit(1)
        theirs.close()

    def say(self, what: str, family: int = 0, number: int = 0) -> None:
        """Returns when it is done."""
        self._ours.sendall(f"{what} {family} {number}\n".encode())
        assert self._ours.recv(1) == b".", "the peers' process ended"

    @staticmethod
    def _run(orders: socket.socket) -> None:
        socks: list[socket.socket] = []
        for line in orders.makefile("r"):
            what, family, number = line.split()
            if what == "connect":
                for _ in range(int(number)):
                    socks.append(socket.socket(int(family)))
                    socks[-1].connect((SERVICE[int(family)], PORT))
            elif what == "send":
                for sock in socks:
                    sock.sendall(bytes(int(number)))
            elif what == "drop":
                drop(socks)
                socks.clear()
            orders.sendall(b".")

    def close(self) -> None:
        self._ours.close()
        os.waitpid(self.pid, 0)


def connected(hosts: Net, peers: Peers, case: Case) -> list[socket.socket]:
    """Accepted on a; their peers are on c."""
    served = []
    with hosts.a, socket.socket(case.family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((SERVICE[case.family], PORT))
        listener.listen(BATCH)
        while len(served) < case.count:
            batch = min(BATCH, case.count - len(served))
            peers.say("connect", case.family, batch)
            for _ in range(batch):
                served.append(listener.accept()[0])
                served[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if case.unread:
        peers.say("send", number=case.unread)
        wait_until(lambda: all(ioctl_int(s.fileno(), Ioctl.SIOCINQ) == case.unread for s in served))
    return served


def drop(socks: Sequence[socket.socket]) -> None:
    """Close them such that nothing of them is left: their ports are used again."""
    for sock in socks:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()


class Clock:
    """Microseconds per connection, by step."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.spent: dict[str, float] = {}

    def time(self, step: str, what: Callable[[], T]) -> T:
        begun, wall = time.process_time(), time.perf_counter()
        result = what()
        self.spent[WALL] = self.spent.get(WALL, 0.0) + (time.perf_counter() - wall if step in THREE else 0)
        self.spent[step] = self.spent.get(step, 0.0) + (time.process_time() - begun) / self.count * 1e6
        return result


def ours(hosts: Net, peers: Peers, case: Case) -> dict[str, float]:
    clock = Clock(case.count)
    served = connected(hosts, peers, case)
    with hosts.a:
        saved = clock.time("options", lambda: options.save(served))
        keys = clock.time("options", lambda: keys_of(served))
        originals = clock.time("quiet", lambda: read_originals(served))
        states = clock.time("quiet", lambda: quiet(served, originals))
        records = clock.time("export", lambda: export_connections(served, states, saved_options=saved, keys=keys))
    assert {len(record.receive_queue) for record in records} == {case.unread}
    wire = clock.time("wire", lambda: [record.to_bytes() for record in records])
    told = clock.time("wire", lambda: [ConnectionRecord.from_bytes(data) for data in wire])
    hosts.a.remove(case.family)
    with hosts.a:
        clock.time("discard", lambda: discard_connections(served, close=False))
    drop(served)
    with hosts.b:
        fresh = [socket.socket(case.family) for _ in told]
        made = clock.time("rebuild", lambda: rebuild_connections(told, fresh, soft=case.soft))
        found = clock.time("compare", lambda: differences(made, told))
    assert found == []
    hosts.b.add(case.family)
    with hosts.b:
        clock.time("release", lambda: release_connections(made, told))
    ended(hosts, peers, case, made)
    return clock.spent


def ended(hosts: Net, peers: Peers, case: Case, made: Sequence[socket.socket]) -> None:
    peers.say("drop")
    drop(made)
    hosts.b.remove(case.family)
    hosts.a.add(case.family)


def in_c(hosts: Net, peers: Peers, library: ctypes.CDLL, case: Case) -> dict[str, float]:
    clock = Clock(case.count)
    served = connected(hosts, peers, case)
    v6 = case.family == socket.AF_INET6
    program = bpf.drop_program()
    loaded = -1 if program is None else program

    def call(step: str, socks: Sequence[socket.socket], *more: Any) -> Any:
        fds = array("i", [sock.fileno() for sock in socks])
        at = (ctypes.c_int * len(fds)).from_buffer(fds)
        return clock.time(step, lambda: library[step](at, len(fds), *more))

    where = options.Where.IPV6 if v6 else options.Where.IPV4
    known = [o for o in options.TABLE if where & o.where]
    table = (ctypes.c_int * (3 * len(known)))(*(n for o in known for n in (o.level, o.number, o.size)))
    library.export.restype = ctypes.c_long
    data = ctypes.create_string_buffer(case.count * case.unread + 1)
    with hosts.a:
        states = read_originals(served)
        call("options", served, table, len(known))
        call("quiet", served, loaded, MARK)
        total = call("export", served, int(v6), data)
        records = export_connections(served, states)
    assert total == case.count * case.unread
    plans = softstate.plan(records) if case.soft else [softstate.NOTHING] * case.count
    ends = [_one(record, plan, case) for record, plan in zip(records, plans, strict=True)]
    hosts.a.remove(case.family)
    with hosts.a:
        call("discard", served)
    drop(served)
    with hosts.b:
        fresh = [socket.socket(case.family) for _ in records]
        with inward(frozenset([case.family])), roundtrip._raw(case.family) as raw:
            setter = windows.setter()
            name = setter.name.encode() if case.soft else None
            for start in range(0, case.count, windows.SLOTS):
                part = slice(start, start + windows.SLOTS)
                some = (One * len(ends[part]))(*ends[part])
                with setter.lent([plan.slot for plan in plans[part] if plan.slot]) as numbers:
                    call("rebuild", fresh[part], some, loaded, MARK, raw.fileno(), name, numbers.start)
        call("compare", fresh, data)
    hosts.b.add(case.family)
    with hosts.b:
        call("release", fresh)
    ended(hosts, peers, case, fresh)
    return clock.spent


def _one(record: ConnectionRecord, plan: softstate.Plan, case: Case) -> One:
    conn, w = record.conn_id, record.windows
    local = pack_address(conn.local, conn.local_port, family=case.family)
    peer = pack_address(conn.peer, conn.peer_port, family=case.family)
    one = One(size=len(local), v6=int(case.family == socket.AF_INET6), send=record.snd_una, receive=record.copied_seq)
    places = [("local", local), ("peer", peer)]
    if plan.samples:
        assert len(plan.samples) == 1, "so few connections are given more samples than C sends"
        lesson = roundtrip.Lesson(conn, record.snd_una, record.copied_seq, plan.samples)
        packet = roundtrip._packet(lesson, 0, 1)
        one.taught, one.packet_size = 1, len(packet)
        places += [("packet", packet), ("loopback", pack_address(conn.local, 0, family=case.family))]
    for field, packed in places:
        ctypes.memmove(ctypes.addressof(one) + getattr(One, field).offset, packed, len(packed))
    one.window[:] = [w.snd_wl1, w.snd_wnd, w.max_window, w.rcv_wnd, w.rcv_wup]
    one.unread, one.data = len(record.receive_queue), record.receive_queue
    return one


def alone(work: Callable[[], T]) -> T:
    """What it returns, worked on by one thread."""
    kept = lanes.processors, columns.processors
    lanes.processors = columns.processors = lambda: 1  # type: ignore[assignment]
    try:
        return work()
    finally:
        lanes.processors, columns.processors = kept


def show(case: Case, both: dict[str, float], mine: dict[str, float], theirs: dict[str, float] | None) -> None:
    print(
        f"{case.name}, us each".ljust(30) + "".join(f"{step:>9}" for step in (*STEPS, "three")) + "   cpu, s  wall, s"
    )
    for name, spent in (("tcpstate, two threads", both), ("tcpstate, one thread", mine), ("C", theirs)):
        if spent is not None:
            three = sum(spent[step] for step in THREE)
            cells = [*(spent.get(step) for step in STEPS), three]
            line = "".join(f"{'-':>9}" if cell is None else f"{cell:9.1f}" for cell in cells)
            print(f"  {name:28s}{line}{three * case.count / 1e6:9.3f}{spent[WALL]:9.3f}", flush=True)
            steps = {step: spent[step] for step in STEPS if step in spent}
            note("connections", case=case.name, who=name, three=three, wall=spent[WALL], **steps)
    if theirs is not None:
        known = [step for step in STEPS if step in theirs]
        ratios = {step: mine[step] / theirs[step] for step in known}
        ratios["three"] = sum(mine[s] for s in THREE) / sum(theirs[s] for s in THREE)
        print(
            "  ratio, one thread"
            + " " * 12
            + "".join(f"{ratios[s]:9.2f}" if s in ratios else f"{'':>9}" for s in (*STEPS, "three"))
        )


def main() -> None:
    gc.disable()  # as in the stop of a migration
    counts = [int(argument) for argument in sys.argv[1:] if argument.isdigit()] or (1000, 10_000)
    soft = "--no-soft" not in sys.argv
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder, net() as hosts:
        library = compiled(Path(folder))
        for host in (hosts.a, hosts.b):
            with host:
                Blackhole().ensure()
        peers = Peers(hosts.c)
        for family in SERVICE:
            hosts.a.add(family)
        with hosts.a:
            rehearse()
        for count in counts:
            for family in SERVICE:
                for unread in (0, 4096):
                    case = Case(count, family, unread, soft)
                    both = ours(hosts, peers, case)
                    mine = alone(lambda case=case: ours(hosts, peers, case))  # type: ignore[misc]
                    show(case, both, mine, None if library is None else in_c(hosts, peers, library, case))
        peers.close()


if __name__ == "__main__":
    main()
