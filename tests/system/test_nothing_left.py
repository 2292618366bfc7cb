"""What /proc shows of a process, and every byte of its memory, before and after: nothing of ours is left in it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import Host, ThreeHosts, tcpmig
from tests.hosts.process import HostProcess

PROGRAM = Path(__file__).parent / "programs" / "everything.c"
LOOK = Path(__file__).parent / "proc_view.py"
PORT = 7100


def view(host: Host, pid: int) -> dict[str, object]:
    """All of one process, as a program in its host reads it from /proc; times and inode numbers left out."""
    found: dict[str, object] = json.loads(host.run([sys.executable, LOOK, pid]).stdout)
    return found


def network(host: Host) -> dict[str, str]:
    """What of the host's network could have been left: rules, addresses' neighbours excepted, and packet sockets."""
    commands = {"rules": "ip rule", "rules6": "ip -6 rule", "nft": "nft list ruleset", "packet": "cat /proc/net/packet"}
    return {name: host.run(["sh", "-c", command]).stdout for name, command in commands.items()}


def sockets(host: Host) -> list[str]:
    """The host's TCP sockets with marks, keepalive and filters, as ss shows them (-b: filters, -o: timers)."""
    lines = host.run(["ss", "-tanbH", "sport", "=", f":{PORT}"]).stdout.splitlines()
    return sorted(" ".join(line.split()) for line in lines)


@pytest.fixture
def resting(hosts: ThreeHosts, tmp_path: Path) -> Iterator[HostProcess]:
    """The program, with its connection from the client."""
    program, out = tmp_path / "everything", tmp_path / "out"
    subprocess.run(["gcc", "-O1", "-pthread", "-o", program, PROGRAM], check=True)
    address = hosts.net.service4

    def wait_for(text: str) -> None:
        deadline = time.monotonic() + 10
        while not out.read_text().endswith(text):
            assert time.monotonic() < deadline, out.read_text()
            time.sleep(0.01)

    with (
        out.open("wb") as log,
        hosts.source.popen(
            [program, address, PORT], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=tmp_path
        ) as process,
    ):
        wait_for("listening\n")
        with hosts.client.netns_entered():
            client = socket.create_connection((address, PORT))
        with client:
            wait_for("ready\n")
            client.sendall(b"unread")
            time.sleep(0.1)
            yield process


def test_nothing_is_left_in_a_process_that_moved(hosts: ThreeHosts, resting: HostProcess) -> None:
    quiet = [network(host) for host in (hosts.source, hosts.target)]
    before, shown = view(hosts.source, resting.pid), sockets(hosts.source)
    tcpmig.migrate(hosts.source, resting.pid, hosts.target)
    after = view(hosts.target, resting.pid)
    same(before, after)
    assert sockets(hosts.target) == shown
    assert sockets(hosts.source) == []
    assert [network(host) for host in (hosts.source, hosts.target)] == quiet
    # and back, which would add up what one move leaves
    tcpmig.migrate(hosts.target, resting.pid, hosts.source)
    again = view(hosts.source, resting.pid)
    hosts.source.kill(resting.pid, 9)
    same(before, again)
    assert [network(host) for host in (hosts.source, hosts.target)] == quiet


def test_nothing_is_left_in_a_process_that_was_checkpointed(
    hosts: ThreeHosts, resting: HostProcess, tmp_path: Path
) -> None:
    quiet = network(hosts.source)
    before, shown = view(hosts.source, resting.pid), sockets(hosts.source)
    for _ in range(3):
        status, result, printed = tcpmig.tcpmig(hosts.source, "checkpoint", resting.pid, "-R", "-o", tmp_path / "image")
        assert status == 0, (result, printed)
    after = view(hosts.source, resting.pid)
    same(before, after)
    assert sockets(hosts.source) == shown
    assert network(hosts.source) == quiet


def same(before: object, after: object) -> None:
    found = differences(before, after)
    assert not found, "\n".join(found)


def differences(before: object, after: object, path: str = "") -> list[str]:
    """Where two views are not equal, in words."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            line
            for key in sorted(before.keys() | after.keys())
            for line in differences(before.get(key), after.get(key), f"{path}/{key}")
        ]
    return [] if before == after else [f"{path}: {before!r} became {after!r}"]


def test_the_comparison_sees_what_is_left(hosts: ThreeHosts, resting: HostProcess) -> None:
    """A signal mask, a descriptor, a byte: each shows."""
    before = view(hosts.source, resting.pid)
    assert not differences(before, view(hosts.source, resting.pid))
    hosts.source.run(["prlimit", "--pid", str(resting.pid), "--core=1:1"])
    assert any("limits" in line for line in differences(before, view(hosts.source, resting.pid)))
    # one byte of its memory, written from outside
    script = (
        "import sys; pid = sys.argv[1]\n"
        "heap = next(l for l in open(f'/proc/{pid}/maps') if '[stack]' in l).split('-')[0]\n"
        "open(f'/proc/{pid}/mem', 'r+b', 0).seek(0)\n"
        "m = open(f'/proc/{pid}/mem', 'r+b', 0); m.seek(int(heap, 16) + 8); m.write(b'x')\n"
    )
    hosts.source.run([sys.executable, "-c", script, str(resting.pid)])
    assert any("memory" in line for line in differences(before, view(hosts.source, resting.pid)))
