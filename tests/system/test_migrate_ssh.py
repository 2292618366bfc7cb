"""A migration over a real sshd, as an operator runs it; and an sshd that itself moves, with somebody logged in."""

from __future__ import annotations

import getpass
import shlex
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Host, ThreeHosts
from tests.hosts.tcpmig import TCPMIG, migrate, tcpmig
from tests.workloads import scenes
from tests.workloads.session import OPTIONS, logged_in, own_address, sshd

pytestmark = pytest.mark.alone


def test_an_interactive_session_moves_with_its_sshd(hosts: ThreeHosts, tmp_path: Path) -> None:
    with logged_in(hosts, tmp_path / "keys") as here:
        person = here.person
        person.type("cat\n", "cat\r\n")
        person.type("one line\n", "one line\r\none line\r\n")
        summary = migrate(hosts.source, here.pid, hosts.target)
        assert summary["outcome"] == "done", summary
        person.type("another\n", "another\r\nanother\r\n")
        person.type("\x1a", r"Stopped\s+cat\s+ready> ")
        person.type("jobs\n", r"Running\s+sleep 1000 &\r\n.*Stopped\s+cat\r\n")
        person.type("echo it is $kept, $(hostname), $(tty)\n", r"it is here, \S+, /dev/pts/0\r\n")
        # others can log in, where it is now
        assert hosts.client.run([*here.login, "echo $SSH_CONNECTION"]).stdout.split()[2] == hosts.net.service4
        person.type("kill -9 %1 %2; exit 7\n", "exit")
        # bash says that there are stopped jobs, and stays
        person.type("exit 7\n", "")
        assert here.client.wait(30) == 7
        hosts.target.kill(here.pid, 9)


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
