"""A server with many open files moves there and back: ``python -m tests.bench.bench_descriptors [FILES ...]`` (as root;
0, 100, 1,000 and 4,000, six moves each).

One file in a hundred is written to all the time, the others stand where they are.  The floor is what each file costs at
the least if it is only looked at in the stop, in C: its link, its fdinfo and fstat at the source, open and lseek at the
target.  Nothing is judged by the clock.
"""

from __future__ import annotations

import ctypes
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.results import Row, measured, spread
from tests.hosts import three_hosts
from tests.hosts.tcpmig import migrate
from tests.workloads.servers import wait_listening

COUNTS = (0, 100, 1_000, 4_000)
MOVES = 6
PORT = 7240
PHASES = ("precopy", "stop", "copy", "freeze", "rebuild", "takeover")
SERVER = """
import os, socket, sys, threading, time
address, port, folder, count = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
listener = socket.create_server((address, port))
fds = [os.open(f"{folder}/{n}", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600) for n in range(count)]
for fd in fds: os.write(fd, b"begin")
def write():
    while True:
        for fd in fds[::100]: os.write(fd, b"more")
        time.sleep(0.01)
threading.Thread(target=write, daemon=True).start()
while True:
    peer, _ = listener.accept()
    sizes = {fd: (os.fstat(fd).st_size, os.lseek(fd, 0, os.SEEK_CUR)) for fd in fds}
    right = all(size == pos for fd, (size, pos) in sizes.items() if fd not in fds[::100])
    peer.sendall(b"right" if right else b"wrong")
    peer.close()
"""
FLOOR = r"""
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}
int floor_of(const char *folder, int count, double *look, double *make)
{
    static int fds[20000];
    char path[4096], text[4096];
    for (int i = 0; i < count; i++) {
        snprintf(path, sizeof path, "%s/%d", folder, i);
        if ((fds[i] = open(path, O_RDWR | O_CREAT, 0600)) < 0) return -1;
    }
    double began = now();
    for (int i = 0; i < count; i++) {
        struct stat st;
        snprintf(path, sizeof path, "/proc/self/fd/%d", fds[i]);
        if (readlink(path, text, sizeof text) < 0) return -1;
        snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fds[i]);
        int info = open(path, O_RDONLY);
        if (read(info, text, sizeof text) < 0 || close(info) || fstat(fds[i], &st)) return -1;
    }
    *look = now() - began;
    for (int i = 0; i < count; i++) close(fds[i]);
    began = now();
    for (int i = 0; i < count; i++) {
        snprintf(path, sizeof path, "%s/%d", folder, i);
        if ((fds[i] = open(path, O_RDWR | O_APPEND)) < 0 || lseek(fds[i], 5, SEEK_SET) < 0) return -1;
    }
    *make = now() - began;
    for (int i = 0; i < count; i++) close(fds[i]);
    return 0;
}
"""


def floor(folder: Path, count: int) -> Row:
    """Milliseconds of both sides in C; nothing without gcc."""
    if shutil.which("gcc") is None:
        return {}
    library, source, place = folder / "floor.so", folder / "floor.c", folder / "floor"
    source.write_text(FLOOR)
    place.mkdir()
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    both = []
    for _ in range(MOVES):
        look, make = ctypes.c_double(), ctypes.c_double()
        told = ctypes.CDLL(str(library)).floor_of(str(place).encode(), count, ctypes.byref(look), ctypes.byref(make))
        assert told == 0
        both.append(look.value + make.value)
    return {"floor": spread(both)}


def measure(count: int) -> Row:
    """Milliseconds of each phase, the stop, and the floor."""
    found: dict[str, list[float]] = {}
    with three_hosts() as hosts, tempfile.TemporaryDirectory(dir=hosts.net.directory) as name:
        here, there, folder = hosts.source, hosts.target, Path(name)
        (folder / "files").mkdir()
        argv = [sys.executable, "-IS", "-c", SERVER, hosts.net.service4, PORT, folder / "files", count]
        process = here.popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_listening(hosts.client, process, hosts.net.service4, PORT)
        pid = process.pid
        for _ in range(MOVES):
            told = migrate(here, pid, there)
            with hosts.client.netns_entered(), socket.create_connection((hosts.net.service4, PORT)) as sock:
                assert sock.recv(100) == b"right"
            pid, here, there = told["target_pid"], there, here
            for what, ms in {"stop_ms": told["stop_ms"], **told["phases"]}.items():
                found.setdefault(what, []).append(ms)
        here.sh(f"kill -9 {pid}")
        here.wait_until_gone(pid)
        return {what: spread(figures) for what, figures in found.items()} | floor(folder, count)


def main() -> None:
    """The table."""
    counts = [int(text) for text in sys.argv[1:]] or list(COUNTS)
    head = "  ".join(f"{phase:>8}" for phase in PHASES)
    print(f"{'files':>6} {'stop':>18}  {head}  {'floor':>8}   ms: median (range)")
    for count in counts:
        found = measured("descriptors", {"files": count}, lambda count=count: measure(count))  # type: ignore[misc]
        stop = "{median:7.1f} ({min:.0f}-{max:.0f})".format(**found["stop_ms"]).rjust(18)
        parts = "  ".join(f"{found[phase]['median']:8.1f}" for phase in PHASES)
        least = f"{found['floor']['median']:8.1f}" if "floor" in found else "  no gcc"
        print(f"{count:6} {stop}  {parts}  {least}", flush=True)


if __name__ == "__main__":
    main()
