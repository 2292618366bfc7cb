"""What leads out of the tree: pipes, local sockets and connections whose other end, or other holder, stays behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import ThreeHosts
from tests.hosts.shared import at_home, hosts
from tests.hosts.tcpmig import TCPMIG, MigrationFailed, migrate, tcpmig
from tests.system.test_cli_bad_input import connected

__all__ = ["at_home", "hosts"]

PORT = 7300
# a process that stays has a connection on the address that moves
ALLOW = ("--address-policy", "allow")

# A process that stays has the other end of everything; on a line from the service address it evaluates an expression.
SERVER = f"""
import errno, os, signal, socket, sys
def told(call):
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno]
listener = socket.create_server((sys.argv[1], {PORT}))
client = listener.accept()[0]
held = listener.accept()[0]
their_write, their_read = os.pipe()[::-1], os.pipe()
fd_in, fd_out = their_write[1], their_read[1]
sock, their_sock = socket.socketpair()
os.write(their_write[0], b"in the pipe")
their_sock.send(b"in the socket")
ready, to_us = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.setsid()
        for fd in (fd_in, fd_out, sock.fileno(), listener.fileno(), client.fileno(), ready, 0, 1, 2):
            os.close(fd)
        os.close(to_us)
        signal.pause()
    os._exit(0)
os.wait()
os.close(to_us)
assert os.read(ready, 1) == b""
for fd in (ready, their_write[0], their_read[0]):
    os.close(fd)
their_sock.close()
for line in client.makefile():
    client.sendall((repr(told(lambda: eval(line))) + "\\n").encode())
"""


@dataclass(slots=True)
class Service:
    hosts: ThreeHosts
    pid: int
    sock: socket.socket
    held: socket.socket
    folder: Path
    fds: dict[str, int]

    def say(self, expression: str) -> Any:
        self.sock.sendall(expression.encode() + b"\n")
        return eval(self.sock.makefile().readline())

    def migrate(self, *options: object) -> None:
        migrate(self.hosts.source, self.pid, self.hosts.target, options=[*ALLOW, *options])

    def refused(self, status: int, code: str, *options: object) -> dict[str, Any]:
        with pytest.raises(MigrationFailed) as raised:
            self.migrate(*options)
        assert (raised.value.status, raised.value.summary["code"]) == (status, code), raised.value
        assert self.hosts.source.state(self.pid) == "S"
        return raised.value.summary


@pytest.fixture
def service(hosts: ThreeHosts, tmp_path: Path) -> Iterator[Service]:
    out, into = os.pipe()
    argv = [sys.executable, "-IS", "-c", SERVER, hosts.net.service4]
    with (tmp_path / "err").open("wb") as err:
        process = hosts.source.popen(argv, stdout=into, stderr=err, pass_fds=())
    os.close(into)
    with process:
        with hosts.client.netns_entered():
            sock, held = (connected((hosts.net.service4, PORT)) for _ in range(2))
        with sock, held:
            sock.settimeout(20)
            found = Service(hosts, process.pid, sock, held, tmp_path, {})
            names = ("fd_in", "fd_out", "sock.fileno()", "held.fileno()")
            found.fds = dict(zip(("in", "out", "unix", "held"), found.say(f"({', '.join(names)})"), strict=True))
            yield found
            for host in (hosts.source, hosts.target):
                if host.state(process.pid):
                    host.kill(process.pid, 9)
    os.close(out)


def test_each_is_named_before_the_stop(service: Service) -> None:
    status, shown, _ = tcpmig(service.hosts.source, "check", service.pid)
    assert status == 3
    codes = {v["subject"]: v["code"] for v in shown["verdicts"] if v["status"] == "refuse"}
    fds = service.fds
    wanted = {"in": "TM-0341", "out": "TM-0341", "unix": "TM-0341", "held": "TM-0342"}
    assert codes == {f"pid {service.pid} fd {fds[name]}": code for name, code in wanted.items()}
    texts = [v["text"] for v in shown["verdicts"] if v["status"] == "refuse"]
    assert all("pid " in text for text in texts), "the process outside is named"
    service.refused(3, "TM-0342")
    # all are cut off by one word, and each is told
    status, shown, _ = tcpmig(service.hosts.source, "check", service.pid, "--local-peer", "reset")
    assert status == 0
    warned = {v["subject"] for v in shown["verdicts"] if v["status"] == "warn"}
    assert warned >= {f"pid {service.pid} fd {fd}" for fd in fds.values()}


@pytest.mark.parametrize(("policy", "end"), [("close", b""), ("reset", "ECONNRESET")])
def test_cut_off_by_policy(service: Service, policy: str, end: object) -> None:
    service.migrate("--local-peer", policy)
    assert service.say("os.read(fd_in, 100)") == b"in the pipe"
    assert service.say("os.read(fd_in, 100)") == b""
    assert service.say("os.write(fd_out, b'x')") == "EPIPE"
    assert service.say("sock.recv(100)") == b"in the socket"
    assert service.say("sock.recv(100)") == end
    assert service.say("sock.send(b'x')") == "EPIPE"
    assert service.say("held.recv(100)") == end
    # standard output led to a pipe outside: it is /dev/null
    assert service.say("os.readlink('/proc/self/fd/1')") == "/dev/null"


def test_single_descriptors(service: Service) -> None:
    fds, target = service.fds, service.hosts.target
    rules = [
        f"{fds['in']}=/var/input",
        f"{service.pid}:{fds['out']}=/var/output",
        f"{fds['unix']}=close",
        f"{fds['held']}=close",
    ]
    options = [option for rule in rules for option in ("--external", rule)]
    assert service.refused(3, "TM-0357", *options)["object"] == "/var/input"
    assert service.refused(3, "TM-0356", *options, "--external", "999=close")["object"] == "999=close"
    with pytest.raises(MigrationFailed) as usage:
        service.migrate("--external", "1=inherit")
    assert usage.value.status == 2
    target.path("/var/input").write_bytes(b"from the file")
    target.path("/var/output").write_bytes(b"before, ")
    service.migrate(*options)
    assert service.say("os.read(fd_in, 100)") == b"from the file"
    assert service.say("os.write(fd_out, b'after')") == 5
    assert target.path("/var/output").read_bytes() == b"before, after"
    assert service.say("sock.recv(1)") == "EBADF"
    assert service.say("held.recv(1)") == "EBADF"


def test_an_image_remembers(service: Service) -> None:
    source, image = service.hosts.source, service.folder / "image"
    rules = ["--external", "1=/dev/full", "--local-peer", "close"]
    assert tcpmig(source, "checkpoint", service.pid, "-o", image, *rules)[0] == 0
    source.wait_until_gone(service.pid)
    # what the image says is what counts, unless this host's user says otherwise
    command = [*TCPMIG, "restore", image, "--foreground", "--external", "1=inherit"]
    with source.popen(command, stdout=subprocess.PIPE) as restore:
        assert restore.stdout is not None
        assert int(restore.stdout.readline()) == service.pid
        assert service.say("os.write(1, b'to the caller\\n')") == 14
        assert restore.stdout.readline() == b"to the caller\n"
        assert service.say("(os.read(fd_in, 100), os.read(fd_in, 100))") == (b"in the pipe", b"")
        source.kill(service.pid, 9)
        assert restore.wait(20) == 128 + 9
