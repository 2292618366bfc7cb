"""Microseconds per connection of every step of a move, beside the same system calls in C.

``python tests/bench/bench_connections.py [COUNT ...]`` (as root; 100, 1000 and 4000).  C is compiled with gcc in the
same run, if gcc is there.  Processor time, because hosts are shared; nothing is judged by the clock.

Steps: options are read while the owner stands still and the connections live; quiet to release is the time in which
their peers meet silence; wire is the record packed and unpacked; C has no records, only the calls.
"""

from __future__ import annotations

import ctypes
import gc
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
from pathlib import Path
from typing import Any, TypeVar

from tcpstate import options
from tcpstate.discard import discard_connections
from tcpstate.export import export_connections
from tcpstate.freeze import MARK, quiet, read_originals
from tcpstate.kernel import bpf
from tcpstate.rebuild import differences, rebuild_connections, release_connections
from tcpstate.record import ConnectionRecord
from tcpstate.rehearsal import rehearse
from tcpstate.silence import Blackhole
from tests.tscnet import SERVICE, Net, net

T = TypeVar("T")
PORT = 7000
COUNTS = (100, 1000, 4000)
STEPS = ("options", "quiet", "export", "wire", "rebuild", "compare", "release", "discard")
IN_SILENCE = STEPS[1:7]

SOURCE = r"""
#include <arpa/inet.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

static int set(int fd, int level, int option, int value) {
    return setsockopt(fd, level, option, &value, 4);
}
static int get(int fd, int level, int option) {
    int value = 0; socklen_t size = 4;
    getsockopt(fd, level, option, &value, &size);
    return value;
}
void options(int *fd, int count, int *table, int rows) {
    char value[256];
    for (int i = 0; i < count; i++)
        for (int k = 0; k < rows; k++) {
            socklen_t size = table[3 * k + 2];
            getsockopt(fd[i], table[3 * k], table[3 * k + 1], value, &size);
        }
}
void quiet(int *fd, int count, int program, int mark) {
    static const int own[][2] = {{1, 44}, {1, 36}, {6, 18}, {1, 9}, {1, 2}, {0, 21}, {41, 73}};
    for (int i = 0; i < count; i++) {
        socklen_t none = 0;
        getsockopt(fd[i], 1, 26, 0, &none);
        for (int k = 0; k < 7; k++) get(fd[i], own[k][0], own[k][1]);
        set(fd[i], 1, 50, program); set(fd[i], 1, 36, mark); set(fd[i], 6, 18, 0x7fffffff); set(fd[i], 1, 9, 0);
    }
}
void export(int *fd, int count) {
    char value[280];
    for (int i = 0; i < count; i++) {
        int f = fd[i]; socklen_t size; struct sockaddr_in a;
        get(f, 6, 12); get(f, 6, 10); get(f, 0, 1); get(f, 6, 19);
        set(f, 6, 19, 1); set(f, 1, 10, 1);
        size = 280; getsockopt(f, 6, 11, value, &size);
        get(f, 6, 2); get(f, 6, 24);
        size = 20; getsockopt(f, 6, 29, value, &size);
        size = 16; getsockopt(f, 6, 13, value, &size);
        get(f, 1, 7); get(f, 1, 8); get(f, 1, 72);
        for (int turn = 0; turn < 2; turn++) {
            int n;
            if (turn) { size = 8; getsockopt(f, 6, 11, value, &size); } else ioctl(f, 0x8905, &n);
            ioctl(f, 0x5411, &n); ioctl(f, 0x894b, &n); ioctl(f, 0x541b, &n);
            set(f, 6, 20, 2); get(f, 6, 21); set(f, 6, 20, 1); get(f, 6, 21); set(f, 6, 20, 0);
        }
        size = sizeof a; getsockname(f, (void *)&a, &size);
        size = sizeof a; getpeername(f, (void *)&a, &size);
        set(f, 1, 10, 0);
    }
}
/* per connection: local and peer (struct sockaddr_in), sequence numbers, windows (5) */
struct one { struct sockaddr_in local, peer; unsigned send, receive, window[5]; };
void rebuild(int *fd, int count, struct one *c, int program, int mark) {
    static const int agreed[] = {4, 0, 3, 7 | 7 << 16, 8, 0, 2, 1460};
    for (int i = 0; i < count; i++) {
        int f = fd[i];
        set(f, 6, 19, 1); set(f, 0, 19, 1); set(f, 1, 32, 1 << 18); set(f, 1, 33, 1 << 18); set(f, 1, 36, 0);
        set(f, 6, 20, 2); set(f, 6, 21, c[i].send); set(f, 6, 20, 1); set(f, 6, 21, c[i].receive); set(f, 6, 20, 0);
        bind(f, (void *)&c[i].local, sizeof c[i].local);
        connect(f, (void *)&c[i].peer, sizeof c[i].peer);
        setsockopt(f, 6, 22, agreed, sizeof agreed);
        setsockopt(f, 0, 4, 0, 0);
        set(f, 6, 24, 1000); set(f, 1, 36, mark); set(f, 6, 18, 0x7fffffff); set(f, 1, 50, program);
        set(f, 1, 33, 1 << 17);
        setsockopt(f, 6, 29, c[i].window, 20);
        setsockopt(f, 6, 13, "cubic", 5);
        set(f, 6, 1, 1); set(f, 6, 10, c[i].window[3]);
    }
}
void compare(int *fd, int count) {
    char value[280];
    for (int i = 0; i < count; i++) {
        int f = fd[i], n; socklen_t size; struct sockaddr_in a;
        size = 280; getsockopt(f, 6, 11, value, &size);
        get(f, 6, 2); get(f, 6, 24);
        size = 20; getsockopt(f, 6, 29, value, &size);
        size = 16; getsockopt(f, 6, 13, value, &size);
        get(f, 1, 7); get(f, 1, 8); get(f, 1, 72);
        ioctl(f, 0x8905, &n); ioctl(f, 0x5411, &n); ioctl(f, 0x894b, &n); ioctl(f, 0x541b, &n);
        set(f, 6, 20, 2); get(f, 6, 21); set(f, 6, 20, 1); get(f, 6, 21); set(f, 6, 20, 0);
        size = sizeof a; getsockname(f, (void *)&a, &size);
        size = sizeof a; getpeername(f, (void *)&a, &size);
        get(f, 6, 1); get(f, 6, 10);
    }
}
void release(int *fd, int count) {
    for (int i = 0; i < count; i++) {
        int f = fd[i];
        set(f, 6, 20, 2); get(f, 6, 21); set(f, 6, 20, 0);
        set(f, 6, 1, 1); set(f, 1, 27, 0); set(f, 1, 36, 0); set(f, 6, 19, 0);
        set(f, 1, 2, 1); set(f, 1, 32, 1 << 17); set(f, 1, 72, 0); set(f, 0, 19, 0); set(f, 41, 75, 0);
        set(f, 6, 1, 1); set(f, 6, 18, 0); set(f, 6, 12, 1);
    }
}
void discard(int *fd, int count) {
    char none[16] = {0};
    for (int i = 0; i < count; i++) { set(fd[i], 6, 19, 1); connect(fd[i], (void *)none, 16); }
}
"""


class One(ctypes.Structure):
    """``struct one`` of the C source."""

    _fields_ = (
        ("local", ctypes.c_char * 16),
        ("peer", ctypes.c_char * 16),
        ("send", ctypes.c_uint),
        ("receive", ctypes.c_uint),
        ("window", ctypes.c_uint * 5),
    )


def compiled(folder: Path) -> ctypes.CDLL | None:
    if shutil.which("gcc") is None:
        return None
    source, library = folder / "calls.c", folder / "calls.so"
    source.write_text(SOURCE)
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


def connected(hosts: Net, count: int) -> tuple[list[socket.socket], list[socket.socket]]:
    """(accepted on a, their peers on c)."""
    served, peers = [], []
    with hosts.a:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((SERVICE[socket.AF_INET], PORT))
        listener.listen(64)
    with hosts.c, listener:
        for _ in range(count):
            peers.append(socket.create_connection((SERVICE[socket.AF_INET], PORT)))
            served.append(listener.accept()[0])
            served[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return served, peers


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
        begun = time.process_time()
        result = what()
        self.spent[step] = self.spent.get(step, 0.0) + (time.process_time() - begun) / self.count * 1e6
        return result


def ours(hosts: Net, count: int) -> dict[str, float]:
    clock = Clock(count)
    served, peers = connected(hosts, count)
    family = socket.AF_INET
    with hosts.a:
        saved = clock.time("options", lambda: options.save(served))
        originals = clock.time("quiet", lambda: read_originals(served))
        states = clock.time("quiet", lambda: quiet(served, originals))
        records = clock.time("export", lambda: export_connections(served, states, saved_options=saved))
    wire = clock.time("wire", lambda: [record.to_bytes() for record in records])
    told = clock.time("wire", lambda: [ConnectionRecord.from_bytes(data) for data in wire])
    with hosts.b:
        fresh = [socket.socket() for _ in told]
        made = clock.time("rebuild", lambda: rebuild_connections(told, fresh))
        found = clock.time("compare", lambda: differences(made, told))
    assert found == []
    hosts.a.remove(family)
    with hosts.a:
        clock.time("discard", lambda: discard_connections(served))
    hosts.b.add(family)
    with hosts.b:
        clock.time("release", lambda: release_connections(made, told))
    drop([*peers, *made])
    hosts.b.remove(family)
    hosts.a.add(family)
    return clock.spent


def in_c(hosts: Net, library: ctypes.CDLL, count: int) -> dict[str, float]:
    clock = Clock(count)
    served, peers = connected(hosts, count)
    family = socket.AF_INET
    program = bpf.drop_program()

    def call(step: str, socks: Sequence[socket.socket], *more: Any) -> None:
        fds = array("i", [sock.fileno() for sock in socks])
        at = (ctypes.c_int * len(fds)).from_buffer(fds)
        clock.time(step, lambda: library[step](at, len(fds), *more))

    known = [o for o in options.TABLE if options.Where.IPV4 & o.where]
    table = (ctypes.c_int * (3 * len(known)))(*(n for o in known for n in (o.level, o.number, o.size)))
    with hosts.a:
        states = read_originals(served)
        call("options", served, table, len(known))
        if program is None:
            call("quiet", served, -1, MARK)
        else:
            call("quiet", served, program, MARK)
        call("export", served)
        records = export_connections(served, states)
    ends = (One * count)()
    for one, record in zip(ends, records, strict=True):
        conn, w = record.conn_id, record.windows
        for name, address, port in (("local", conn.local, conn.local_port), ("peer", conn.peer, conn.peer_port)):
            packed = family.to_bytes(2, sys.byteorder) + port.to_bytes(2, "big") + socket.inet_aton(address) + bytes(8)
            ctypes.memmove(ctypes.addressof(one) + getattr(One, name).offset, packed, 16)
        one.send, one.receive = record.snd_una, record.rcv_nxt
        one.window[:] = [w.snd_wl1, w.snd_wnd, w.max_window, w.rcv_wnd, w.rcv_wup]
    with hosts.b:
        fresh = [socket.socket() for _ in records]
        call("rebuild", fresh, ends, -1 if program is None else program, MARK)
        call("compare", fresh)
    hosts.a.remove(family)
    with hosts.a:
        call("discard", served)
    hosts.b.add(family)
    with hosts.b:
        call("release", fresh)
    drop([*peers, *fresh, *served])
    hosts.b.remove(family)
    hosts.a.add(family)
    return clock.spent


def show(count: int, mine: dict[str, float], theirs: dict[str, float] | None) -> None:
    print(f"{count} connections, us each".ljust(28) + "".join(f"{step:>9}" for step in (*STEPS, "silence")))
    for name, spent in (("tcpstate", mine), ("C", theirs)):
        if spent is not None:
            cells = [spent.get(step) for step in STEPS] + [sum(spent.get(step, 0.0) for step in IN_SILENCE)]
            print(f"  {name:26s}" + "".join(f"{'-':>9}" if cell is None else f"{cell:9.1f}" for cell in cells))


def main() -> None:
    gc.disable()  # as in the stop of a migration
    counts = [int(argument) for argument in sys.argv[1:]] or COUNTS
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder, net() as hosts:
        library = compiled(Path(folder))
        rules = [Blackhole(), Blackhole()]
        for host, rule in zip((hosts.a, hosts.b), rules, strict=True):
            with host:
                rule.ensure()
        hosts.a.add(socket.AF_INET)
        with hosts.a:
            rehearse()
        for count in counts:
            show(count, ours(hosts, count), None if library is None else in_c(hosts, library, count))


if __name__ == "__main__":
    main()
