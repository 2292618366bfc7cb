"""A host of ours and a guest with another kernel on one bridge, and a client that talks on while its server moves."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.guest.agent import READY
from tests.guest.guest import Guest, Nic
from tests.hosts import Host, HostProcess, Net
from tests.hosts.host import ROOT
from tests.hosts.tcpmig import TCPMIG
from tests.workloads.servers import wait_listening

__all__ = ["Mixed", "PingPong", "mixed"]

#: what a guest's own processes and kernel threads do not reach
FIRST_PID = 30000
GUEST4, GUEST6 = "10.77.1.50", "fd77:1::50"
_PORT = 10022
_TIMEOUT = 300.0
#: what makes programs start as on the emulated CPU: neither the C library nor libcrypto takes what that one lacks
LESSER_CPU = {
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-XSAVEC,-RTM,-AVX512F,-AVX512VL,-AVX512BW,-AVX512CD,-AVX512DQ",
    "OPENSSL_ia32cap": ":~0xf0230000",
}
_REMOTE = shlex.join(["env", f"PYTHONPATH={ROOT}", *TCPMIG, "receive"])


class Mixed:
    """``host``: with this machine's kernel; ``guest``; ``client``: the third. ``folder`` is at one path in all."""

    def __init__(self, net: Net, guest: Guest, folder: Path, where: dict[str, object]) -> None:
        self.net = net
        self.host, self.client = net.hosts["host"], net.hosts["client"]
        self.guest = guest
        self.folder = folder
        self._where = where

    def start(self, argv: Sequence[object], port: int) -> HostProcess:
        """A server on our host that listens on the service's address."""
        env = LESSER_CPU | {"PYTHONPATH": str(ROOT)}
        nothing = subprocess.DEVNULL
        process = self.host.popen(argv, stdin=nothing, stdout=nothing, stderr=nothing, cwd=self.folder, env=env)
        wait_listening(self.host, process, self.net.service4, port)
        return process

    def to_guest(self, pid: int, *options: object) -> tuple[int, dict[str, Any]]:
        """`tcpmig migrate` on our host: exit status, the JSON that it printed (with ``said``, what it wrote beside)."""
        rsh = shlex.join(self.guest.remote_shell())
        argv = [*TCPMIG, "migrate", pid, "guest", "--rsh", rsh, "--remote-command", _REMOTE, "--json", *options]
        return _told(self.host.run(argv, check=False, timeout=_TIMEOUT))

    def to_host(self, pid: int, *options: object) -> tuple[int, dict[str, Any]]:
        """The same from the guest to our host."""
        where = "/root/where.json"
        write = ["/bin/sh", "-c", f"umask 077; cat > {where}"]
        assert self.guest.run(write, stdin=json.dumps(self._where).encode()).returncode == 0
        rsh = shlex.join([sys.executable, str(ROOT / "tests/guest/rsh.py"), where])
        argv = [*TCPMIG, "migrate", str(pid), "host", "--rsh", rsh, "--remote-command", _REMOTE, "--json", *options]
        return _told(self.guest.run([str(word) for word in argv], cwd=ROOT, timeout=_TIMEOUT))


def _told(done: subprocess.CompletedProcess[str]) -> tuple[int, dict[str, Any]]:
    lines = done.stdout.strip().splitlines()
    return done.returncode, json.loads(lines[-1]) | {"said": done.stderr} if lines else {"said": done.stderr}


@contextlib.contextmanager
def mixed(prepare: Sequence[Sequence[str]] = ()) -> Iterator[Mixed]:
    """All of it; commands in ``prepare`` are run first, in which OUT stands for the folder (a guest sees of this
    machine's files what was there when it started)."""
    with contextlib.ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="tcpmig-mixed-", dir="/srv")))
        folder.chmod(0o755)
        for command in prepare:
            subprocess.run([word.replace("OUT", str(folder)) for word in command], check=True)
        net = Net(1)
        ends.callback(net.close)
        host = net.host("host", uptime_offset=90000, first_pid=FIRST_PID)
        net.host("client", first_pid=200)
        net.add_service(host)
        token = secrets.token_hex(16)
        serve = [sys.executable, str(ROOT / "tests/guest/agent.py"), host.ip4, str(_PORT)]
        pipe = subprocess.PIPE
        agent = ends.enter_context(host.popen(serve, stdin=pipe, stdout=pipe, env={"PYTHONPATH": str(ROOT)}))
        agent.stdin.write(f"{token}\n".encode())
        agent.stdin.flush()
        assert agent.stdout.readline().decode().strip() == READY
        nic = Nic(f"/proc/{os.getpid()}/fd/{net.netns}", "tmh", (f"{GUEST4}/24", f"{GUEST6}/64"))
        guest = ends.enter_context(Guest(nics=[nic]))
        yield Mixed(net, guest, folder, {"address": host.ip4, "port": _PORT, "token": token})


class PingPong:
    """A connection to an echo server that is used all the time, by a thread; every byte is compared.

    head, answer  what stands before a message of N bytes, and before what comes back
    tail          what stands behind either
    """

    def __init__(
        self, host: Host, address: str, port: int, *, head: str = "", answer: str = "", tail: bytes = b""
    ) -> None:
        self._head, self._answer, self._tail = head, answer, tail
        with host.netns_entered():
            self._sock = socket.create_connection((address, port), timeout=120)
        self.count = 0
        self.error = ""
        self._random = random.Random(port)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._end.is_set():
                data = self._random.randbytes(self._random.randrange(1, 5000))
                self._sock.sendall(self._head.format(len(data)).encode() + data + self._tail)
                wanted = self._answer.format(len(data)).encode() + data + self._tail
                got = b""
                while len(got) < len(wanted):
                    piece = self._sock.recv(1 << 16)
                    if not piece:
                        self.error = "the server closed"
                        return
                    got += piece
                if got != wanted:
                    self.error = f"message {self.count}: other bytes came back"
                    return
                self.count += 1
                self._end.wait(0.005)
        except OSError as error:
            self.error = repr(error)

    def goes_on(self, messages: int = 20, timeout: float = 60.0) -> bool:
        """Whether so many more messages come back."""
        wanted = self.count + messages
        wait = threading.Event()
        for _ in range(int(timeout / 0.05)):
            if self.count >= wanted or self.error:
                break
            wait.wait(0.05)
        return self.count >= wanted and not self.error

    def close(self) -> None:
        """End it."""
        self._end.set()
        self._thread.join(120)
        self._sock.close()
