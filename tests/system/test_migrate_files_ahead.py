"""Plain files are opened before the stop: whatever happens to them until then is found, and none is mistaken."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.hosts import ThreeHosts
from tests.system.moves import moved
from tests.workloads.servers import wait_listening

pytestmark = pytest.mark.alone

PORT = 7300
ROOT = Path(__file__).parent.parent.parent


class Client:
    """The connection to the server."""

    def __init__(self, hosts: ThreeHosts) -> None:
        with hosts.client.netns_entered():
            self.sock = socket.create_connection((hosts.net.service4, PORT), timeout=60)
        self.lines = self.sock.makefile("rw", encoding="ascii")

    def ask(self, line: str) -> str:
        self.lines.write(line + "\n")
        self.lines.flush()
        return self.lines.readline().strip()


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(n, marks=pytest.mark.long) for n in range(3, 40))])
def test_files_that_change_until_the_last_moment(hosts: ThreeHosts, tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    argv = [sys.executable, "-m", "tests.workloads.files_server", PORT, hosts.net.service4, folder, 120]
    process = hosts.source.popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT)
    wait_listening(hosts.client, process, hosts.net.service4, PORT)
    client, chance = Client(hosts), random.Random(seed)
    pid, here, there = process.pid, hosts.source, hosts.target
    for _ in range(4):
        over, wrong = threading.Event(), list[str]()

        def busy(over: threading.Event = over, wrong: list[str] = wrong) -> None:
            while not over.is_set():
                answer = client.ask(f"act {chance.randrange(1 << 30)}")
                if answer != "here":
                    wrong.append(answer)
                    return
                time.sleep(chance.choice([0, 0.001, 0.005]))

        thread = threading.Thread(target=busy)
        thread.start()
        try:
            summary = moved(here, pid, there, "/smaps")
        finally:
            over.set()
            thread.join()
        assert wrong == []
        assert client.ask("check") == "right", f"seed {seed}"
        pid, here, there = summary["target_pid"], there, here
