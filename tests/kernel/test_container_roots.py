"""What a container's root, and the way into it from outside, rest on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.workloads.contained import MAKER, PYTHON, make_root

#: says that it stands, and waits
STANDS = """
import sys, os
file, master = open("/dev/shm/file", "w"), os.open("/dev/ptmx", os.O_RDWR)
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def container(root: Path, *options: str) -> Iterator[int]:
    argv = ["unshare", "--mount", "--pid", "--ipc", "--fork", PYTHON, "-IS", MAKER, root, *options, "--"]
    program = [*argv, PYTHON, "-IS", "-c", STANDS]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        try:
            yield int(children)
        finally:
            assert process.stdin is not None
            process.stdin.close()


def test_links_in_proc_are_paths_of_the_container(tmp_path: Path) -> None:
    """fs/d_path.c, prepend_path: up to the root of the file's own mount namespace, where ours is not above it."""
    root = make_root(tmp_path / "root")
    with container(root) as pid:
        links = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
        assert {"/dev/shm/file", "/dev/pts/ptmx"} <= links
        assert os.readlink(f"/proc/{pid}/exe") == os.path.realpath(PYTHON)
        assert os.readlink(f"/proc/{pid}/root") == "/"
        assert os.path.samestat(os.stat(f"/proc/{pid}/root"), root.stat())
        assert Path(f"/proc/{pid}/root/dev/shm/file").exists()
        assert not Path(root, "dev/shm").exists()


def test_mountinfo_tells_all_mounts_of_another_root(tmp_path: Path) -> None:
    """And the old root is gone: pivot_root(".", "."), umount2(".", MNT_DETACH), as pivot_root(2) has it."""
    with container(make_root(tmp_path / "root")) as pid:
        lines = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
        points = [line[4] for line in lines]
        assert points[:3] == ["/", "/usr", "/proc"]
        assert {"/dev", "/dev/pts", "/dev/shm", "/proc/keys", "/proc/sys"} <= set(points)
        assert lines[0][3].endswith("/root")
        numbers = {line[0] for line in lines}
        assert all(line[1] in numbers for line in lines[1:])


def test_each_devpts_is_a_new_one(tmp_path: Path) -> None:
    """Its terminals begin at 0, whatever the host has, and ptmx of another one gives them from outside."""
    master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
    try:
        with container(make_root(tmp_path / "root")) as pid:
            inside = Path(f"/proc/{pid}/root/dev/pts")
            assert sorted(path.name for path in inside.iterdir()) == ["0", "ptmx"]
            assert inside.stat().st_dev != os.stat("/dev/pts").st_dev
            other = os.open(inside / "ptmx", os.O_RDWR | os.O_NOCTTY)
            assert (inside / "1").exists()
            os.close(other)
    finally:
        os.close(master)
