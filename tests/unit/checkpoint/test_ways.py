"""Where paths of a tree with mounts of its own lead, before it stands and afterwards; roots of its own."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from checkpoint.namespaces.memoryfs import Folder, Node, ensure
from checkpoint.namespaces.mounts import Mount, Mounts
from checkpoint.namespaces.ways import Ways, found_in, real, way_of
from tcpstate.kernel.calls import CallTable

ROOT = Mount(kind="", source="/srv/root", at="/", flags=0)
USR = Mount(kind="", source="/usr", at="/usr", flags=1)
PROC = Mount(kind="proc", source="proc", at="/proc", flags=0)
DEV = Mount(kind="tmpfs", source="tmpfs", at="/dev", flags=0)
PTS = Mount(kind="devpts", source="devpts", at="/dev/pts", flags=0, data="gid=5,mode=620,ptmxmode=666")
MASK = Mount(kind="", source="/dev/null", at="/proc/keys", flags=0, file=True, device=(1, 3), inside=True)
SYS = Mount(kind="", source="/proc/sys", at="/proc/sys", flags=1, inside=True)
MOUNTS = Mounts(added=(ROOT, USR, PROC, DEV, PTS, MASK, SYS))


def mapped(path: str) -> str:
    return f"/there{path}"


def test_paths_before_the_tree_stands() -> None:
    ways = Ways(mapped, MOUNTS)
    assert ways("/etc/passwd") == "/there/srv/root/etc/passwd"
    assert ways("/") == "/there/srv/root"
    assert ways("/usr/bin/env") == "/there/usr/bin/env"
    assert ways("/usrlocal") == "/there/srv/root/usrlocal"
    carried = ["/dev/null", "/dev/pts/0", "/proc/self", "/proc/keys", "/proc/sys/kernel"]
    assert [path for path in [*carried, "/etc", "/usr"] if ways.carried(path)] == carried


def test_paths_when_the_tree_stands() -> None:
    ways = Ways(mapped, MOUNTS)
    ways.root = "/proc/7/root"
    # what is made beside it is made on the host, by a path that outlasts the tree
    assert ways("/etc/passwd") == "/there/srv/root/etc/passwd"
    assert ways("/dev/shm/file") == "/proc/7/root/dev/shm/file"
    assert ways.place("/etc/passwd") == "/proc/7/root/etc/passwd"
    assert ways.within("/etc/passwd") == "/etc/passwd"
    assert ways.ptmx == "/proc/7/root/dev/pts/ptmx"
    assert ways.lasting("/there/srv/root/x") == "/there/srv/root/x"
    assert ways.lasting("/proc/7/root/dev/x") == ""


def test_paths_of_the_host() -> None:
    """Without mounts of its own, and where the tree has none on top."""
    alone, ways = Ways(mapped), Ways(mapped, Mounts(added=(DEV,)))
    ways.root = "/proc/7/root"
    for one in (alone, ways):
        assert one("/etc") == "/there/etc"
        assert one.within("/etc") == "/there/etc"
        assert not one.carried("/etc")
    assert (alone.place("/etc"), ways.place("/etc")) == ("/there/etc", "/proc/7/root/there/etc")
    assert (alone.ptmx, ways.ptmx) == ("/dev/ptmx", "/dev/ptmx")
    assert (way_of(os.getpid()), real("/proc/7/root/link")) == ("", "/proc/7/root/link")


def test_paths_on_an_overlay(tmp_path: Path) -> None:
    for name in ("low/etc", "up/etc", "work"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "low/etc/old").touch()
    (tmp_path / "up/etc/new").touch()
    data = f"lowerdir={tmp_path}/low,upperdir={tmp_path}/up,workdir={tmp_path}/work"
    ways = Ways(str, Mounts(added=(Mount(kind="overlay", source="overlay", at="/", flags=0, data=data), DEV)))
    assert ways("/etc/old") == f"{tmp_path}/low/etc/old"
    assert ways("/etc/new") == f"{tmp_path}/up/etc/new"
    assert ways("/etc/none") == f"{tmp_path}/up/etc/none"
    assert not ways.carried("/etc/new")
    ways.root = "/proc/7/root"
    assert ways("/etc/new") == "/proc/7/root/etc/new"
    assert ways.lasting("/proc/7/root/etc/stage") == f"{tmp_path}/up/etc/stage"


def test_links_below_another_root(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/name").touch()
    (tmp_path / "var").symlink_to("/run")
    found = found_in(str(tmp_path), "/var/name")
    assert found is not None
    assert found[0].st_ino == (tmp_path / "run/name").stat().st_ino
    assert found_in(str(tmp_path), "/../../../etc/passwd") is None
    assert found_in("", "/nowhere/at/all") is None


def test_calls_that_make_a_root() -> None:
    calls = CallTable()
    MOUNTS.enter(calls, mapped)
    # unshare, private; root; /usr and its flags; proc; tmpfs; its directory and devpts; node and mask; /proc/sys and
    # its flags; and four calls that change the root
    assert len(calls) == 2 + 1 + 2 + 1 + 1 + 2 + 2 + 2 + 4
    assert b"/there/srv/root\0" in calls._data
    assert b"/proc/dev/null\0" in calls._data


@pytest.mark.parametrize(
    "given",
    [
        {"at": "/a/../b"},
        {"at": "relative"},
        {"source": "/a//b"},
        {"kind": "ext4"},
        {"kind": "devpts", "data": "gid=5,exec"},
        {"kind": "proc", "data": "hidepid=1,evil=2"},
        {"device": (8, 0)},
        {"inside": True, "at": "/"},
        {"inside": True, "kind": "tmpfs"},
        {"flags": 1 << 30},
    ],
)
def test_mounts_that_are_not_made_out_of_an_image(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Mount(**{"kind": "", "source": "/a", "at": "/b", "flags": 0, **given})


def test_a_root_is_the_first() -> None:
    assert MOUNTS.own_root
    assert not Mounts(added=(DEV,)).own_root
    with pytest.raises(ValueError, match="root"):
        Mounts(added=(DEV, ROOT))


def test_what_came_before_its_time_is_kept_or_removed(tmp_path: Path) -> None:
    """Files that are mapped before their bytes come, of which some are gone when these do."""
    user = (os.getuid(), os.getgid())
    at = tmp_path / "shm"
    at.mkdir()
    for path in ("/shm/kept", "/shm/gone", "/shm/folder/gone", "/shm/old/folder/gone"):
        ensure(str(tmp_path), path, user)
    inode = (at / "kept").stat().st_ino
    (at / "point").mkdir()
    given: dict[str, Any] = {"uid": user[0], "gid": user[1], "times": (1, 1)}
    nodes = (
        Node(path=b"", mode=stat.S_IFDIR | 0o755, **given),
        Node(path=b"folder", mode=stat.S_IFDIR | 0o755, **given),
        Node(path=b"kept", mode=stat.S_IFREG | 0o640, data=b"bytes", **given),
    )
    Folder(at="/shm", nodes=nodes).write(str(tmp_path), user, ["/shm/point", "/elsewhere"])
    assert sorted(path.name for path in at.rglob("*")) == ["folder", "kept", "point"]
    assert ((at / "kept").read_bytes(), (at / "kept").stat().st_ino) == (b"bytes", inode)
    ensure(str(tmp_path), "/shm/kept", user)
    assert (at / "kept").read_bytes() == b"bytes"


def test_nothing_is_made_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "shm").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"."):
        ensure(str(tmp_path), "/shm/file", (os.getuid(), os.getgid()))
    assert not list((tmp_path / "elsewhere").iterdir())
