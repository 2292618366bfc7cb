"""A migration over a real sshd, as an operator runs it; and an sshd that itself moves, with somebody logged in."""

from __future__ import annotations

import getpass
import os
import re
import select
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Host, ThreeHosts
from tests.hosts.process import HostProcess
from tests.hosts.tcpmig import TCPMIG, migrate, tcpmig
from tests.workloads import scenes

pytestmark = pytest.mark.alone

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


def own_address(host: Host) -> str:
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


OPTIONS = "-o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"


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
        deadline = time.monotonic() + 30
        while not (found := re.search(expected.encode(), self.seen)):
            assert time.monotonic() < deadline, (expected, self.seen)
            if select.select([process.stdout], [], [], 0.1)[0]:
                piece = os.read(process.stdout.fileno(), 4096)
                assert piece, self.seen
                self.seen += piece
        self.seen = self.seen[found.end() :]


def test_an_interactive_session_moves_with_its_sshd(hosts: ThreeHosts, tmp_path: Path) -> None:
    service = hosts.net.service4
    for host in (hosts.source, hosts.target):
        # terminals of its own: else their numbers would be taken by the source's
        host.sh("mount -t devpts -o newinstance,ptmxmode=666,mode=620 none /dev/pts")
        # where whoever logs in is kept until then; the hosts have a /run each
        host.run(["mkdir", "-p", "/run/sshd"])
    keys = tmp_path / "keys"
    login = ["ssh", "-i", keys / "key", *shlex.split(OPTIONS), f"{getpass.getuser()}@{service}"]
    with sshd(hosts.source, keys, service) as daemon:
        deadline = time.monotonic() + 10
        while hosts.client.run([*login, "true"], check=False).returncode:
            assert time.monotonic() < deadline, "sshd does not let us in"
            time.sleep(0.1)
        command = [*login, "-tt", "env HISTFILE= PS1='ready> ' bash --norc --noediting -i"]
        pipe = subprocess.PIPE
        with hosts.client.popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as client:
            person = Session(client)
            person.type("", "ready> ")
            person.type("kept=here; sleep 1000 &\n", r"\[1\] \d+\s+ready> ")
            person.type("cat\n", "cat\r\n")
            person.type("one line\n", "one line\r\none line\r\n")
            summary = migrate(hosts.source, daemon.pid, hosts.target)
            assert summary["outcome"] == "done", summary
            person.type("another\n", "another\r\nanother\r\n")
            person.type("\x1a", r"Stopped\s+cat\s+ready> ")
            person.type("jobs\n", r"Running\s+sleep 1000 &\r\n.*Stopped\s+cat\r\n")
            person.type("echo it is $kept, $(hostname), $(tty)\n", r"it is here, \S+, /dev/pts/0\r\n")
            # others can log in, where it is now
            assert hosts.client.run([*login, "echo $SSH_CONNECTION"]).stdout.split()[2] == service
            person.type("kill -9 %1 %2; exit 7\n", "exit")
            # bash says that there are stopped jobs, and stays
            person.type("exit 7\n", "")
            assert client.wait(30) == 7
        hosts.target.kill(daemon.pid, 9)


def test_a_server_moves_over_ssh(hosts: ThreeHosts, tmp_path: Path) -> None:
    keys, root = tmp_path / "keys", Path(__file__).parents[2]
    rsh = f"ssh -i {keys / 'key'} {OPTIONS}"
    where = f"{getpass.getuser()}@{own_address(hosts.target)}"
    receive = f"cd {shlex.quote(str(root))} && {shlex.join(TCPMIG)} receive"

    def mover(source: Host, pid: int, _: Host) -> dict[str, Any]:
        status, summary, printed = tcpmig(source, "migrate", pid, where, "--rsh", rsh, "--remote-command", receive)
        assert status == 0, (summary, printed)
        return summary

    with sshd(hosts.target, keys) as daemon:
        deadline = time.monotonic() + 10
        while hosts.source.run([*shlex.split(rsh), where, "true"], check=False).returncode:
            assert time.monotonic() < deadline, "sshd does not let us in"
            time.sleep(0.1)
        with scenes.echo(hosts, tmp_path, mover=mover) as stage:
            report = stage.move()
            assert not report.problems, report
            # the process has left the session and the group of sshd with which it was built
            sid = hosts.target.run(["ps", "-o", "sid=,ppid=", "-p", str(stage.pid)]).stdout.split()
            assert sid == [str(stage.pid), "1"]
            assert not stage.finish()
            hosts.target.kill(stage.pid, 9)
        daemon.kill()
