"""Trees with mounts of their own: what is on top of the host's, and roots of their own."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.hosts import ThreeHosts
from tests.hosts.tcpmig import MigrationFailed
from tests.workloads import deaths, steps
from tests.workloads.contained import PYTHON, contained, in_container, make_root, refused
from tests.workloads.move import Stage

IN_MEMORY = """
mount -t tmpfs -o size=1m none /mnt; mkdir -m 700 /mnt/own; echo inside >/mnt/own/file; chown -R 5:6 /mnt/own
mount -t overlay -o lowerdir=/run/a,upperdir=/run/b,workdir=/run/c none /srv; echo above >/srv/above
mkdir /mnt/point; mount --bind /etc /mnt/point; touch /mnt/bound; mount --bind /etc/hostname /mnt/bound
exec "$@"
"""


def mounts_of(answer: dict[str, Any]) -> list[str]:
    """But for the network namespaces of other tests, which come and go on this machine."""
    return [line for line in answer["me"]["mounts"] if " /run/netns/" not in line]


def test_file_systems_in_memory_and_overlays_move(hosts: ThreeHosts, tmp_path: Path) -> None:
    for host in (hosts.source, hosts.target):
        host.sh("mkdir /run/a /run/b /run/c; echo below >/run/a/below")
    with contained(hosts, "--mount", "sh", "-c", IN_MEMORY, "sh") as server:
        before = server.ask()
        for number in range(2):
            if number:
                server.rest(tmp_path / "image")
            else:
                server.move()
            assert mounts_of(server.ask()) == mounts_of(before)
            root = server.host.path(f"/proc/{server.pid}/root")
            assert (root / "mnt/own/file").read_text() == "inside\n"
            info = (root / "mnt/own").stat()
            assert (info.st_mode & 0o777, info.st_uid, info.st_gid) == (0o700, 5, 6)
            assert (root / "srv/below").read_text() == "below\n"
            assert (root / "mnt/bound").read_text() == Path("/etc/hostname").read_text()
            assert (root / "mnt/point/passwd").exists()


@pytest.mark.parametrize(
    "mounts",
    [
        "mount -t tmpfs none /mnt; mknod /mnt/disk b 7 0",
        "mount -t tmpfs none /mnt; mount -t tmpfs none /mnt",
        "mount -t tmpfs none /mnt; touch /mnt/file; mount -o remount,ro,bind /mnt",
        "mount --make-shared /",
    ],
)
def test_mounts_that_cannot_be_made_again(hosts: ThreeHosts, mounts: str) -> None:
    with contained(hosts, "--mount", "sh", "-c", mounts + '; exec "$@"', "sh") as server:
        assert refused(hosts.source, server.pid) == "TM-0726"
        server.ask()


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("overlay",)])
@pytest.mark.parametrize("program", ["contained.py", "furnished.py"])
def test_a_root_of_its_own_moves_there_and_back(
    hosts: ThreeHosts, tmp_path: Path, options: tuple[str, ...], program: str
) -> None:
    root = make_root(tmp_path / "root")
    unshare = ("--pid", "--mount", "--ipc", "--uts", "--cgroup", *map(str, in_container(root, *options)))
    with contained(hosts, *unshare, python=PYTHON, program=f"/srv/{program}") as server:
        before = server.ask()
        for number in range(2):
            if number:
                server.rest(tmp_path / "image")
            else:
                server.move()
            assert server.ask() == before


@pytest.mark.long
def test_a_root_directory_that_is_not_its_namespaces(hosts: ThreeHosts, tmp_path: Path) -> None:
    unshare = ("--pid", "--mount", "--ipc", *map(str, in_container(make_root(tmp_path / "root"), "chroot")))
    with contained(hosts, *unshare, python=PYTHON, program="/srv/contained.py") as server:
        assert refused(hosts.source, server.pid) == "TM-0726"
        server.ask()


@pytest.mark.parametrize("number", [30, pytest.param(15, marks=pytest.mark.long)])
def test_nothing_is_left_of_a_container_that_did_not_come(hosts: ThreeHosts, tmp_path: Path, number: int) -> None:
    """The target's tool is killed while the container's files are made: the original goes on, and goes later."""
    root = make_root(tmp_path / "root")
    unshare = ("--pid", "--mount", "--ipc", "--uts", "--cgroup", *map(str, in_container(root)))
    with contained(hosts, *unshare, python=PYTHON, program="/srv/furnished.py") as server:
        before = server.ask()
        mounts = hosts.target.run(["cat", "/proc/self/mountinfo"]).stdout.count("/root/")
        stage = SimpleNamespace(here=hosts.source, there=hosts.target, pid=server.pid)
        assert steps.run(cast("Stage", stage), tmp_path, "rebuild", number)[0] == 1, (tmp_path / "tool.log").read_text()
        assert server.ask() == before
        done, items = deaths.settle(hosts.target)
        assert done == 0, items
        assert not list(root.rglob(".tcpmig-*"))
        assert hosts.target.run(["cat", "/proc/self/mountinfo"]).stdout.count("/root/") == mounts
        server.move()
        assert server.ask() == before
        assert not list(root.rglob(".tcpmig-*"))


@pytest.mark.long
def test_a_root_that_is_elsewhere_at_the_target(hosts: ThreeHosts, tmp_path: Path) -> None:
    """--map is about paths of the host: those inside stay what they are."""
    root, other = make_root(tmp_path / "root"), tmp_path / "other"
    shutil.copytree(root, other, symlinks=True)
    unshare = ("--pid", "--mount", "--ipc", "--uts", "--cgroup", *map(str, in_container(root)))
    with contained(hosts, *unshare, python=PYTHON, program="/srv/contained.py") as server:
        before = server.ask()
        with pytest.raises(MigrationFailed) as failed:
            server.move("--map", f"{root}=/nowhere")
        assert failed.value.status == 3
        assert server.ask() == before
        server.move("--map", f"{root}={other}")
        after = server.ask()
        assert [line.replace("/other /", "/root /") for line in after["me"]["mounts"]] == before["me"]["mounts"]
        assert after["me"]["directory"] == before["me"]["directory"]
        assert server.host.path(f"/proc/{server.pid}/root").stat().st_ino == other.stat().st_ino
