"""`migrate --lazy`: memory comes after the process runs there; what if the line is cut meanwhile, who brings the pages
is killed, or the tool that has them."""

from __future__ import annotations

import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Net, ThreeHosts
from tests.hosts.process import HostProcess
from tests.hosts.tcpmig import RSH, TCPMIG, migrate, tcpmig
from tests.system.test_cli_bad_input import connected
from tests.system.test_lazy_restore import MIB, PORT, SERVER

# the second remote shell is that for the pages: slow, so that there is a while in which pages are missing
SLOW = f"""
import os, subprocess, sys, threading, time
marks, rest = sys.argv[1], sys.argv[2:]
with open(marks, "a") as file:
    print(os.getpid(), file=file)
number = len(open(marks).readlines())
command = {RSH!r} + rest
if number != 2:
    os.execv(command[0], command)
child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
def pump(source, sink, pause):
    while data := os.read(source, 16384):
        view = memoryview(data)
        while view:
            view = view[os.write(sink, view):]
        time.sleep(pause)
    os.close(sink)
threading.Thread(target=pump, args=(0, child.stdin.fileno(), 0.005), daemon=True).start()
pump(child.stdout.fileno(), 1, 0)
"""


@dataclass(slots=True)
class Scene:
    hosts: ThreeHosts
    server: HostProcess
    sock: socket.socket
    marks: Path
    script: Path
    digest: bytes = b""

    def ask(self, word: bytes) -> bytes:
        self.sock.sendall(word)
        return self.sock.recv(64, socket.MSG_WAITALL).strip()

    def command(self) -> list[object]:
        rsh = shlex.join([sys.executable, "-IS", str(self.script), str(self.marks)])
        receive = shlex.join([*TCPMIG, "receive"])
        options = ["--rsh", rsh, "--remote-command", receive, "--lazy", "--compress", "never"]
        return [*TCPMIG, "migrate", self.server.pid, "target", *options]

    def wait_for(self, true: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        deadline = time.monotonic() + 60
        while True:
            status, found, told = tcpmig(self.hosts.target, "holds")
            assert status == 0, told
            if true(found["lazy"]):
                shown: list[dict[str, Any]] = found["lazy"]
                return shown
            assert time.monotonic() < deadline, found["lazy"]

    def under_way(self) -> dict[str, Any]:
        """They run there, and pages are missing."""
        (one,) = self.wait_for(lambda found: len(found) == 1 and 0 < found[0]["missing"] < found[0]["total"])
        return one

    def lines(self) -> list[int]:
        return [int(line) for line in self.marks.read_text().split()]


@pytest.fixture
def scene(hosts: ThreeHosts, net: Net, tmp_path: Path) -> Iterator[Scene]:
    null = subprocess.DEVNULL
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    argv = [sys.executable, "-IS", "-c", SERVER, net.service4]
    with hosts.source.popen(argv, stdin=null, stdout=null, stderr=null) as server:
        with hosts.client.netns_entered():
            sock = connected((net.service4, PORT))
        with sock:
            sock.settimeout(60)
            found = Scene(hosts, server, sock, tmp_path / "lines", script)
            found.digest = found.ask(b"digest")
            yield found
            if hosts.target.path(f"/proc/{server.pid}").exists():
                hosts.target.kill(server.pid, signal.SIGKILL)


def test_it_runs_there_with_its_connection_and_is_whole_in_the_end(scene: Scene) -> None:
    summary = migrate(scene.hosts.source, scene.server.pid, scene.hosts.target, options=["--lazy"])
    assert summary["later"] >= MIB << 20
    assert len(summary["rounds"]) == 1
    assert scene.ask(b"digest") == scene.digest
    assert not tcpmig(scene.hosts.target, "holds")[1]["lazy"]
    # nothing of it is left in its memory: it can move on at once
    migrate(scene.hosts.target, scene.server.pid, scene.hosts.source)
    assert scene.ask(b"digest") == scene.digest
    scene.hosts.source.kill(scene.server.pid, signal.SIGKILL)


@pytest.mark.long
def test_a_line_that_is_cut_is_dialled_again_and_servers_are_replaced(scene: Scene) -> None:
    with scene.hosts.source.popen(scene.command()) as tool:
        one = scene.under_way()
        assert len(scene.ask(b"0")) == 32
        for pid in one["servers"]:
            scene.hosts.target.kill(pid, signal.SIGKILL)
            scene.wait_for(lambda found, dead=pid: not found or dead not in found[0]["servers"])  # type: ignore[misc]
        for line in scene.lines()[1:]:
            # those of earlier lines have ended
            scene.hosts.source.sh(f"kill -9 {line}", check=False)
        assert scene.ask(b"digest") == scene.digest
        assert tool.wait(60) == 0
    assert len(scene.lines()) > 2
    scene.hosts.source.wait_until_gone(scene.server.pid)
    scene.wait_for(lambda found: not found)


def test_the_tool_that_has_the_pages_is_killed_and_recover_sends_them(scene: Scene) -> None:
    source = scene.hosts.source
    with source.popen(scene.command()) as tool:
        scene.under_way()
        tool.kill()
        tool.wait(10)
    scene.wait_for(lambda found: found[0]["state"] == "waiting")
    assert source.state(scene.server.pid) == "T", "the original stands still, and has the pages"
    status, found, told = tcpmig(source, "recover")
    assert status == 0, told
    assert [item["settled"] for item in found["items"]] == [True], found
    assert scene.ask(b"digest") == scene.digest
    source.wait_until_gone(scene.server.pid)
    scene.wait_for(lambda found: not found)
