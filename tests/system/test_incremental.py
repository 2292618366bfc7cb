"""Checkpoints that copy memory while it changes, and images that build on earlier ones."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.hosts import Host, ThreeHosts
from tests.hosts.tcpmig import TCPMIG, tcpmig
from tests.system.test_precopy import churn, start, talking


def checkpoint(host: Host, pid: int, image: Path, *options: object) -> dict[str, object]:
    status, found, log = tcpmig(host, "checkpoint", pid, "-o", image, *options, timeout=120)
    assert status == 0, (found, log)
    return found


def asked(sock: socket.socket) -> int:
    """The server has looked at all of its memory: how often it has changed it."""
    sock.sendall(b"?")
    word, count, *_ = sock.recv(1000).decode().split()
    assert word == "ok"
    return int(count)


@pytest.mark.long
@pytest.mark.parametrize("seed", [5])
def test_memory_that_changes_in_every_way(hosts: ThreeHosts, tmp_path: Path, seed: int) -> None:
    """Each image takes from those before what has not changed, and the last one has every page as it was."""
    chance = random.Random(seed)
    host, pid = hosts.source, churn(hosts, seed).pid
    with talking(hosts.client, hosts.net.service4) as sock:
        steps, parent = 0, None
        for number in range(4):
            time.sleep(chance.uniform(0.05, 0.3))
            image = tmp_path / f"image{number}"
            options = [] if parent is None else ["--parent", parent]
            lazy = ["--lazy"] if number % 2 else []
            found = checkpoint(host, pid, image, "--max-downtime", 0, *options)
            assert (len(found["rounds"]) > 1) == bool(parent), "it ends: without a parent it is written at once"
            assert bool(found["inherited"]) == bool(parent), "the program and its libraries have not changed"
            status, found, log = tcpmig(host, "restore", image, *lazy)
            assert status == 0, f"seed {seed}: {found} {log}"
            now = asked(sock)
            assert now > steps, f"seed {seed}"
            steps, parent = now, image
        status, found, _ = tcpmig(host, "verify", image)
        assert (status, len(found["parents"])) == (0, 3)


def test_only_what_has_changed_is_written(hosts: ThreeHosts, tmp_path: Path) -> None:
    megabytes = 100
    process = start(hosts, megabytes)
    first, second, moved = tmp_path / "first", tmp_path / "second", tmp_path / "moved"
    with talking(hosts.client, hosts.net.service4) as sock:
        sock.sendall(b"?")
        byte = sock.recv(1)
        one = checkpoint(hosts.source, process.pid, first, "-R")
        assert one["bytes"] > megabytes << 20
        # most of it was not copied in the stop
        assert sum(each["bytes"] for each in one["rounds"]) > megabytes << 20
        two = checkpoint(hosts.source, process.pid, second, "--parent", first)
        assert two["bytes"] < 10 << 20
        assert two["inherited"] > megabytes << 20
        # they are found as long as they are together
        moved.mkdir()
        for image in (first, second):
            os.rename(image, moved / image.name)
        status, found, log = tcpmig(hosts.source, "restore", moved / "second")
        assert status == 0, (found, log)
        sock.sendall(b"?")
        assert sock.recv(1) == byte


def test_an_image_without_its_parent_is_refused(hosts: ThreeHosts, tmp_path: Path) -> None:
    process = start(hosts, 4)
    first, second, other = tmp_path / "first", tmp_path / "second", tmp_path / "other"
    checkpoint(hosts.source, process.pid, first, "-R")
    checkpoint(hosts.source, process.pid, second, "-R", "--parent", first)
    checkpoint(hosts.source, process.pid, other, "-R")
    for replace, code in ((None, "TM-0415"), (other, "TM-0416")):
        os.rename(first, tmp_path / "kept")
        if replace is not None:
            os.rename(replace, first)
        for command in ("verify", "restore"):
            status, found, _ = tcpmig(hosts.source, command, second)
            assert (status, found["code"]) == (3, code)
        status, found, _ = tcpmig(
            hosts.source, "checkpoint", process.pid, "-o", tmp_path / "x", "-R", "--parent", second
        )
        assert (status, found["code"]) == (3, code)
        assert not (tmp_path / "x").exists()
        os.rename(tmp_path / "kept", first)
    # a byte of the parent is not what it was
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    first.write_bytes(data)
    status, found, _ = tcpmig(hosts.source, "restore", second)
    assert (status, found["code"]) == (3, "TM-0403")
    assert hosts.source.state(process.pid) in ("R", "S")
    status, found, _ = tcpmig(
        hosts.source, "checkpoint", process.pid, "-o", second, "--parent", other, "--stop-and-copy"
    )
    assert (status, found["code"]) == (2, "TM-0110")


def test_one_image_after_the_other(hosts: ThreeHosts, tmp_path: Path) -> None:
    host, process = hosts.source, churn(hosts, 3)
    image = tmp_path / "image"
    argv = [*TCPMIG, "checkpoint", process.pid, "-o", image, "--every", "0.3s", "--keep", 2, "--full", 3, "--json"]
    with talking(hosts.client, hosts.net.service4) as sock:
        with host.popen(argv, stdout=subprocess.PIPE) as tool:
            assert tool.stdout is not None
            told = [json.loads(tool.stdout.readline()) for _ in range(4)]
            host.kill(tool.pid, signal.SIGTERM)
            assert tool.wait(30) == 0
        assert all(one["running"] for one in told)
        # the first and the fourth build on none
        assert [bool(one["inherited"]) for one in told] == [False, True, True, False]
        asked(sock)
    newest = Path(os.path.realpath(image))
    numbers = sorted(int(one.suffix[1:]) for one in tmp_path.glob("image.*"))
    assert numbers[-1] == int(newest.suffix[1:])
    assert 2 <= len(numbers) <= 4, numbers
    host.kill(process.pid, signal.SIGKILL)
    host.wait_until_gone(process.pid)
    status, found, log = tcpmig(host, "restore", image)
    assert status == 0, (found, log)
    with talking(hosts.client, hosts.net.service4) as sock:
        asked(sock)
