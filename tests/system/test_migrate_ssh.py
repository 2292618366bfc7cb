"""A migration over a real sshd, as an operator runs it."""

from __future__ import annotations

import getpass
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Host, ThreeHosts
from tests.hosts.process import HostProcess
from tests.hosts.tcpmig import TCPMIG, tcpmig
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


def sshd(host: Host, folder: Path) -> HostProcess:
    """An sshd in the host, with keys of its own, that lets us in."""
    folder.mkdir()
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "config").write_text(CONFIG.format(address=own_address(host), folder=folder))
    host.run(["mkdir", "-p", "/run/sshd"])
    null = subprocess.DEVNULL
    return host.popen(["/usr/sbin/sshd", "-D", "-f", folder / "config"], stdin=null, stdout=null, stderr=null)


def test_a_server_moves_over_ssh(hosts: ThreeHosts, tmp_path: Path) -> None:
    keys, root = tmp_path / "keys", Path(__file__).parents[2]
    options = "-o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    rsh = f"ssh -i {keys / 'key'} {options}"
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
