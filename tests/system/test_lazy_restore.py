"""`restore --lazy`: a process runs before its memory is there; what if its pages cannot be had, and if who brings them
is killed."""

from __future__ import annotations

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

from checkpoint.image.frames import DATA_MAX, Kind, Space
from checkpoint.image.reader import open_image
from tests.hosts import Net, ThreeHosts
from tests.hosts.process import HostProcess
from tests.hosts.tcpmig import tcpmig
from tests.system.test_cli_bad_input import connected

PORT = 7012
MIB = 24
REFUSED = 3
SERVER = f"""
import hashlib, mmap, os, random, socket, sys
size = {MIB} << 20
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = random.Random(1).randbytes(size)
whole = lambda: hashlib.blake2b(memory, digest_size=16).hexdigest().encode()
listener = socket.create_server((sys.argv[1], {PORT}))
connection, _ = listener.accept()
while word := connection.recv(64):
    if word == b"digest":
        answer = whole()
    elif word == b"fork":
        read, write = os.pipe()
        if not os.fork():
            os.write(write, whole())
            os._exit(0)
        answer = b""
        connection.sendall(b"%064d" % 0)
        continue
    else:
        at = int(word)
        answer = memory[at : at + 16].hex().encode()
    connection.sendall(answer.ljust(64))
"""


@dataclass(slots=True)
class Lazy:
    """A server with a client, in a file."""

    hosts: ThreeHosts
    server: HostProcess
    sock: socket.socket
    image: Path
    digest: bytes

    def ask(self, word: bytes) -> bytes:
        self.sock.sendall(word)
        return self.sock.recv(64, socket.MSG_WAITALL).strip()

    def restore(self) -> dict[str, Any]:
        status, found, told = tcpmig(self.hosts.source, "restore", "--lazy", self.image)
        assert status == 0, told
        assert found["later"] >= MIB << 20
        return found

    def standing(self) -> list[dict[str, Any]]:
        status, found, told = tcpmig(self.hosts.source, "holds")
        assert status == 0, told
        shown: list[dict[str, Any]] = found["lazy"]
        return shown

    def names(self) -> list[str]:
        """Of the processes there."""
        return self.hosts.source.run(["ps", "-e", "-o", "comm="]).stdout.split()

    def wait_for(self, true: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        deadline = time.monotonic() + 60
        while not true(found := self.standing()):
            assert time.monotonic() < deadline, found
        return found

    def data_of_a_page_frame(self) -> int:
        """Where in the file are bytes that belong into the middle of the large memory."""
        with open_image(self.image) as image:
            whole = [
                frame
                for frame in image.frames
                if frame.kind == Kind.PAGES and frame.runs().space is Space.MEMORY and len(frame.data) == DATA_MAX
            ]
            assert len(whole) > 8
            frame = whole[len(whole) // 2]
            end = frame.offset + 64 + len(frame.record)
            return end + -end % 4096

    def flip(self, at: int) -> None:
        with open(self.image, "r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))


@pytest.fixture
def lazy(hosts: ThreeHosts, net: Net, tmp_path: Path) -> Iterator[Lazy]:
    null = subprocess.DEVNULL
    argv = [sys.executable, "-IS", "-c", SERVER, net.service4]
    with hosts.source.popen(argv, stdin=null, stdout=null, stderr=null) as server:
        with hosts.client.netns_entered():
            sock = connected((net.service4, PORT))
        with sock:
            sock.settimeout(30)
            found = Lazy(hosts, server, sock, tmp_path / "image", b"")
            found.digest = found.ask(b"digest")
            status, _, told = tcpmig(hosts.source, "checkpoint", server.pid, "-o", found.image)
            assert status == 0, told
            hosts.source.wait_until_gone(server.pid)
            yield found
            if hosts.source.path(f"/proc/{server.pid}").exists():
                hosts.source.kill(server.pid, signal.SIGKILL)


def test_it_answers_with_the_right_bytes_and_is_whole_in_the_end(lazy: Lazy) -> None:
    lazy.restore()
    assert lazy.ask(b"digest") == lazy.digest
    lazy.wait_for(lambda found: not found)
    smaps = lazy.hosts.source.path(f"/proc/{lazy.server.pid}/smaps").read_text()
    assert not [line for line in smaps.splitlines() if line.startswith("VmFlags") and " um" in line]
    status, _, told = tcpmig(lazy.hosts.source, "checkpoint", lazy.server.pid, "-o", lazy.image, "-R")
    assert status == 0, told
    assert lazy.ask(b"digest") == lazy.digest


def test_pages_that_are_not_right_are_waited_for_and_servers_are_replaced(lazy: Lazy) -> None:
    damaged = lazy.data_of_a_page_frame()
    lazy.flip(damaged)
    lazy.restore()
    (one,) = lazy.wait_for(lambda found: [x["state"] for x in found] == ["waiting"] and found[0]["missing"] == DATA_MAX)
    assert "digest" in one["reason"]
    assert len(lazy.ask(b"0")) == 32, "the rest can be used"
    for command in (["check", lazy.server.pid], ["checkpoint", lazy.server.pid, "-o", f"{lazy.image}.2"]):
        status, found, told = tcpmig(lazy.hosts.source, *command)
        assert status == REFUSED, told
        assert "TM-0750" in str(found)
    lazy.ask(b"fork")  # a child that will need the page, too
    before = set(one["servers"])
    for _ in range(2):
        for pid in one["servers"]:
            # one after the other: the one that is left makes a new one
            lazy.hosts.source.kill(pid, signal.SIGKILL)
            (one,) = lazy.wait_for(
                lambda found, dead=pid: len(found) == 1 and len(set(found[0]["servers"]) - {dead}) == 2  # type: ignore[misc]
            )
    assert not before & set(one["servers"])
    lazy.flip(damaged)
    assert lazy.ask(b"digest") == lazy.digest
    lazy.wait_for(lambda found: not found)


def test_a_process_that_waits_can_be_killed_and_nothing_is_left(lazy: Lazy) -> None:
    lazy.flip(lazy.data_of_a_page_frame())
    lazy.restore()
    (one,) = lazy.wait_for(lambda found: [x["state"] for x in found] == ["waiting"])
    lazy.sock.sendall(b"digest")
    lazy.hosts.source.kill(lazy.server.pid, signal.SIGKILL)
    lazy.hosts.source.wait_until_gone(lazy.server.pid)
    lazy.wait_for(lambda found: not found)
    for pid in one["servers"]:
        lazy.hosts.source.wait_until_gone(pid)


def test_an_index_that_is_not_right_is_refused_before_anything_is_built(lazy: Lazy) -> None:
    with open_image(lazy.image) as image:
        (index,) = image.records(Kind.PAGE_INDEX)
        assert len(index.record) > MIB * 32
    lazy.flip(index.offset + 64 + len(index.record) // 2)
    status, found, told = tcpmig(lazy.hosts.source, "restore", "--lazy", lazy.image)
    assert (status, found["code"][:5]) == (REFUSED, "TM-04"), told
    assert not lazy.hosts.source.path(f"/proc/{lazy.server.pid}").exists()
    assert not lazy.standing()


@pytest.mark.parametrize("moment", ["migrate.bringer:Bringer.seal", "checkpoint.restore:Restore.survive"])
def test_a_tool_that_dies_before_the_processes_survive_it_leaves_no_server_of_pages(lazy: Lazy, moment: str) -> None:
    host = lazy.hosts.source
    command = [sys.executable, "-m", "tests.workloads.killed_in", moment, "restore", "--lazy", lazy.image]
    done = host.run(command, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    host.wait_until_gone(lazy.server.pid)
    lazy.wait_for(lambda found: not found and "tcpmig-lazy" not in lazy.names())
    status, _, told = tcpmig(host, "recover")
    assert status == 0, told
    lazy.restore()
    assert lazy.ask(b"digest") == lazy.digest
    lazy.wait_for(lambda found: not found)
