"""When a restored process answers first: `restore`, and `restore --lazy`, by the size of its memory.

``python -m tests.bench.bench_lazy [MIB ...]`` (as root; 256, 1024 and 4096).  The image lies in /dev/shm; the process
listens on loopback and reads one page at random for each answer.  A client of its own tries from before the restore on,
with a new connection every few milliseconds: one alone would wait a second for its second SYN if the first met nobody.
Times are from the call of the library, whose imports are done, to the first right answer; in brackets that of the whole
command, with the start of Python, in the same way.  ``all`` is when no page is missing any more.  The floor is memcpy
of the same bytes.  Nothing is judged by the clock.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.bench_precopy import memcpy_ms, room
from tests.bench.results import Row, measured, spread

SIZES = (256, 1024, 4096)  # MiB
TIMES = 3
PORT = 7393
SERVER = """
import mmap, random, socket, sys
size, port = int(sys.argv[1]) << 20, int(sys.argv[2])
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
block = random.Random(1).randbytes(1 << 20)
for at in range(0, size, len(block)):
    memory[at : at + len(block)] = block
    memory[at : at + 8] = at.to_bytes(8, "little")
listener = socket.create_server(("127.0.0.1", port))
while True:
    peer, _ = listener.accept()
    at = random.randrange(size >> 20) << 20
    if memory[at : at + 8] == at.to_bytes(8, "little"): peer.sendall(b"y")
    peer.close()
"""
CLIENT = """
import socket, sys, time
while True:
    with socket.socket() as sock:
        try:
            sock.settimeout(0.003)
            sock.connect(("127.0.0.1", int(sys.argv[1])))
            sock.settimeout(None)
            if sock.recv(1) == b"y": break
        except OSError:
            time.sleep(0.001)
print(time.monotonic())
"""
RESTORE = """
import sys, time
from migrate import snapshot
from tests.bench.bench_lazy import imported
imported()
print(time.monotonic(), flush=True)
snapshot.restore(sys.argv[1], lazy=sys.argv[2] == "lazy")
"""
TCPMIG = [sys.executable, "-m", "cli.main"]
NULL = subprocess.DEVNULL


def imported() -> None:
    """Have what a first use costs behind us."""
    from migrate.rtnetlink import Netlink
    from migrate.warm import arriving

    arriving()
    with Netlink():
        pass


def first_answer(command: list[str], *, tells_start: bool) -> float:
    """Seconds from the start of a restore to the first answer."""
    with subprocess.Popen([sys.executable, "-IS", "-c", CLIENT, str(PORT)], stdout=subprocess.PIPE) as client:
        began = time.monotonic()
        with subprocess.Popen(command, stdin=NULL, stdout=subprocess.PIPE, stderr=NULL) as restore:
            assert restore.stdout is not None
            assert client.stdout is not None
            if tells_start:
                began = float(restore.stdout.readline())
            answered = float(client.stdout.readline())
    return answered - began


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.005)


def measure(folder: Path, size: int) -> Row:
    """Of one size, both ways."""
    argv = [sys.executable, "-IS", "-c", SERVER, str(size), str(PORT)]
    server = subprocess.Popen(argv, stdin=NULL, stdout=NULL, stderr=NULL, start_new_session=True)
    try:
        return moves(folder, size, server)
    finally:
        if server.poll() is None:
            server.kill()


def moves(folder: Path, size: int, server: subprocess.Popen[bytes]) -> Row:
    found: Row = {}
    wait_listening()
    image = folder / "image"
    subprocess.run(
        [*TCPMIG, "checkpoint", str(server.pid), "-o", image, "--hold-timeout", "1"], check=True, stdout=NULL
    )
    server.wait()
    while socket_taken():
        time.sleep(0.05)  # the hold of its listener ends
    for how in ("eager", "lazy"):
        library, command, whole = [], [], []
        options = ["--lazy"] if how == "lazy" else []
        for _ in range(TIMES):
            library.append(first_answer([sys.executable, "-c", RESTORE, str(image), how], tells_start=True))
            began = time.monotonic()
            while any(Path(os.environ["TCPMIG_RUNTIME_DIR"]).glob("lazy/*.lazy")):
                time.sleep(0.002)
            whole.append(library[-1] + time.monotonic() - began)
            end(server.pid)
            command.append(first_answer([*TCPMIG, "restore", *options, str(image)], tells_start=False))
            end(server.pid)
        for what, seconds in (("library", library), ("command", command), ("all", whole)):
            found[f"{how} {what}"] = spread([1e3 * one for one in seconds])
    image.unlink()
    return found | {"memcpy": memcpy_ms(size << 20)}


def show(size: int, row: Row) -> None:
    for how in ("eager", "lazy"):
        library, command, whole = (row[f"{how} {what}"] for what in ("library", "command", "all"))
        figures = f"{library['median']:9.1f} ({command['median']:7.1f})"
        scope = f"{library['min']:8.1f}-{library['max']:.1f}"
        print(
            f"{size:5d} {how:6s} {figures} {scope:>18s} {whole['median'] / 1e3:9.2f} {row['memcpy']:9.1f}", flush=True
        )


def socket_taken() -> bool:
    """Whether a holder has the port still."""
    with socket.socket() as sock:
        # connections in TIME_WAIT, for a minute after the last question, are nobody's
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", PORT))
        except OSError:
            return True
    return False


def wait_listening() -> None:
    while True:
        try:
            with socket.create_connection(("127.0.0.1", PORT)) as sock:
                sock.recv(1)
            return
        except OSError:
            time.sleep(0.05)


def main() -> None:
    sizes = [int(text) for text in sys.argv[1:]] or SIZES
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        os.environ["TCPMIG_STATE_DIR"] = str(folder / "state")
        os.environ["TCPMIG_RUNTIME_DIR"] = str(folder / "run")
        print("  MiB how     first ms (command)              range     all s memcpy ms")
        for size in sizes:
            if size > room():
                print(f"{size:5d} (not measured: there is room for {room()} MiB)", flush=True)
                continue
            show(size, measured("lazy", {"mib": size}, lambda size=size: measure(folder, size)))  # type: ignore[misc]


if __name__ == "__main__":
    main()
