"""Somebody who is logged in by ssh, in a shell with jobs, on a host whose sshd moves."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import select
import shlex
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.hosts import Host, ThreeHosts
from tests.hosts.process import HostProcess

__all__ = ["OPTIONS", "LoggedIn", "Session", "logged_in", "own_address", "sshd"]

CONFIG = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
"""
OPTIONS = "-o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
#: seconds until an answer must have come
PATIENCE = 30


def own_address(host: Host) -> str:
    """The host's IPv4 address."""
    return next(a.split("/")[0] for a in sorted(host.addresses()) if ":" not in a)


def sshd(host: Host, folder: Path, address: str = "") -> HostProcess:
    """An sshd in the host, with keys of its own, that lets us in; at its own address if none is given."""
    folder.mkdir()
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "config").write_text(CONFIG.format(address=address or own_address(host), folder=folder))
    host.run(["mkdir", "-p", "/run/sshd"])
    null = subprocess.DEVNULL
    return host.popen(["/usr/sbin/sshd", "-D", "-f", folder / "config"], stdin=null, stdout=null, stderr=null)


class Session:
    """A person in front of an ssh client."""

    def __init__(self, process: HostProcess) -> None:
        self.process = process
        self.seen = b""

    def type(self, text: str, expected: str) -> None:
        """Until the regular expression comes back."""
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(text.encode())
        process.stdin.flush()
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(expected.encode(), self.seen)):
            assert time.monotonic() < deadline, (expected, self.seen)
            if select.select([process.stdout], [], [], 0.1)[0]:
                piece = os.read(process.stdout.fileno(), 4096)
                assert piece, self.seen
                self.seen += piece
        self.seen = self.seen[found.end() :]


@dataclass(frozen=True, slots=True)
class LoggedIn:
    """sshd's PID; the client that is logged in, and the person before it; a command that logs in as well."""

    pid: int
    client: HostProcess
    person: Session
    login: list[object]


@contextlib.contextmanager
def logged_in(hosts: ThreeHosts, folder: Path) -> Iterator[LoggedIn]:
    """An sshd on the source, and somebody at the service's address in a shell with a job behind."""
    service = hosts.net.service4
    for host in (hosts.source, hosts.target):
        # terminals of its own: else their numbers would be taken by the source's
        host.sh("mount -t devpts -o newinstance,ptmxmode=666,mode=620 none /dev/pts")
        # where whoever logs in is kept until then; the hosts have a /run each
        host.run(["mkdir", "-p", "/run/sshd"])
    login: list[object] = ["ssh", "-i", folder / "key", *shlex.split(OPTIONS), f"{getpass.getuser()}@{service}"]
    with sshd(hosts.source, folder, service) as daemon:
        deadline = time.monotonic() + PATIENCE
        while hosts.client.run([*login, "true"], check=False).returncode:
            assert time.monotonic() < deadline, "sshd does not let us in"
            time.sleep(0.1)
        command = [*login, "-tt", "env HISTFILE= PS1='ready> ' bash --norc --noediting -i"]
        pipe = subprocess.PIPE
        with hosts.client.popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as client:
            person = Session(client)
            person.type("", "ready> ")
            person.type("kept=here; sleep 1000 &\n", r"\[1\] \d+\s+ready> ")
            yield LoggedIn(daemon.pid, client, person, login)
