"""PID 1 of a guest: serves commands, reaps orphans, and ends the machine with its server.

It is copied into the guest's initramfs: nothing but the standard library.  What the host and the agent say to each
other, one connection per command::

    host to guest   one line of JSON (token, argv, cwd, env), then frames of kind IN, the last one empty
    guest to host   frames of kind OUT and ERR, then one of kind STATUS

A connection that is closed before ends the command's process group.
"""

from __future__ import annotations

import base64
import ctypes
import hmac
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

#: where the agent listens; qemu's own network gives it this address
ADDRESS, PORT = "10.0.2.15", 10022
READY = "tcpmig guest is ready"
_MODPROBE = '#!/run/busybox sh\nexec /run/busybox modprobe "$@"\n'
_POWER_OFF = 0x4321FEDC  # LINUX_REBOOT_CMD_POWER_OFF


IN, OUT, ERR, STATUS = range(4)
_HEAD = struct.Struct("!BI")
CHUNK = 1 << 16


def send(sock: socket.socket, kind: int, data: bytes) -> None:
    """One frame."""
    sock.sendall(_HEAD.pack(kind, len(data)) + data)


def receive(sock: socket.socket) -> tuple[int, bytes] | None:
    """One frame; None: the other side has closed the connection."""
    head = _exactly(sock, _HEAD.size)
    if head is None:
        return None
    kind, size = _HEAD.unpack(head)
    data = _exactly(sock, size)
    return None if data is None else (kind, data)


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            return None
        data += piece
    return bytes(data)


def line(sock: socket.socket) -> bytes:
    """Up to the first newline, or the end."""
    data = bytearray()
    while not data.endswith(b"\n"):
        piece = sock.recv(1)
        if not piece:
            break
        data += piece
    return bytes(data)


def main() -> None:
    """As PID 1."""
    told = json.loads(base64.b64decode(_option("tcpmig")))
    os.environ.update(PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", HOME="/root", TERM="dumb")
    modprobe = Path("/run/modprobe")
    modprobe.write_text(_MODPROBE)
    modprobe.chmod(0o755)
    Path("/proc/sys/kernel/modprobe").write_text(str(modprobe))
    socket.sethostname(told["name"])
    _network(told["nics"])
    server = os.fork()
    if not server:
        os.setsid()
        serve(ADDRESS, PORT, told["token"], lambda: Path("/dev/kmsg").write_text(f"<0>{READY}\n"))
    while os.wait()[0] != server:
        pass
    ctypes.CDLL(None).reboot(_POWER_OFF)


def _option(name: str) -> str:
    words = Path("/proc/cmdline").read_text().split()
    return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


def _network(nics: list[list[str]]) -> None:
    """The first interface is the control's; each of the others has its hardware address, its name and its addresses."""
    by_address = {(path / "address").read_text().strip(): path.name for path in Path("/sys/class/net").iterdir()}
    batch = ["link set lo up"]
    for hardware, name, *addresses in nics:
        batch.append(f"link set {by_address[hardware]} name {name}")
        batch += [f"addr add {address} dev {name} {'nodad' if ':' in address else ''}" for address in addresses]
        batch.append(f"link set {name} up")
    subprocess.run(["ip", "-batch", "-"], input="\n".join(batch), text=True, check=True)


def serve(address: str, port: int, token: str, ready: Callable[[], object]) -> None:
    """Take commands, for ever; ``ready`` is called once they can come."""
    listener = socket.create_server((address, port), backlog=64)
    ready()
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=_command, args=(sock, token), daemon=True).start()


def _command(sock: socket.socket, token: str) -> None:
    with sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        asked = json.loads(line(sock) or b"{}")
        if not hmac.compare_digest(str(asked.get("token", "")), token):
            return
        try:
            process = subprocess.Popen(
                asked["argv"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                cwd=asked["cwd"], env=os.environ | asked["env"], start_new_session=True, bufsize=0,
            )  # fmt: skip
        except OSError as error:
            send(sock, ERR, f"{error}\n".encode())
            send(sock, STATUS, b"127")
            return
        lock = threading.Lock()
        pumps = [
            threading.Thread(target=_out, args=(sock, lock, kind, pipe))
            for kind, pipe in ((OUT, process.stdout), (ERR, process.stderr))
        ]
        for pump in pumps:
            pump.start()
        threading.Thread(target=_in, args=(sock, process), daemon=True).start()
        status = process.wait()
        for pump in pumps:
            pump.join()
        send(sock, STATUS, str(status).encode())


def _out(sock: socket.socket, lock: threading.Lock, kind: int, pipe) -> None:
    while data := os.read(pipe.fileno(), CHUNK):
        with lock:
            send(sock, kind, data)


def _in(sock: socket.socket, process: subprocess.Popen[bytes]) -> None:
    stdin = process.stdin
    try:
        while (frame := receive(sock)) is not None:
            if frame[1]:
                stdin.write(frame[1])
            else:
                stdin.close()
    except (OSError, ValueError):
        # the command reads no more; whether it has ended is for the other threads
        return
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1:]:
        # on a host that is no guest: ADDRESS PORT, the token by the standard input
        serve(sys.argv[1], int(sys.argv[2]), input(), lambda: print(READY, flush=True))
    main()
