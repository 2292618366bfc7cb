"""What is in a file system in memory: read, written, and not believed."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from checkpoint.errors import MemoryFilesTooLarge, MountNotMovable
from checkpoint.namespaces import memoryfs
from checkpoint.namespaces.memoryfs import Folder, Node
from checkpoint.namespaces.mounts import Mount, Mounts
from tcpstate.codec import pack, unpack
from tcpstate.kernel.calls import CallTable

OURS = (os.geteuid(), os.getegid())


def node(path: bytes = b"", mode: int = stat.S_IFDIR | 0o755, **more: Any) -> Node:
    given: dict[str, Any] = {"path": path, "mode": mode, "uid": OURS[0], "gid": OURS[1], "times": (1, 2)}
    return Node(**given | more)


def filled(place: Path) -> None:
    (place / "deep/er").mkdir(parents=True)
    (place / "deep/er/file").write_bytes(b"x" * 5000)
    (place / "deep/empty").touch(0o600)
    (place / "link").symlink_to("deep/er/file")
    os.link(place / "deep/er/file", place / "other")
    os.mkfifo(place / "fifo", 0o620)
    (place / "deep").chmod(0o2751)
    os.utime(place / "deep/er", ns=(11, 12))


def shown(place: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for one in sorted(place.rglob("*")):
        info = one.lstat()
        data = one.read_bytes() if stat.S_ISREG(info.st_mode) else b""
        link = os.readlink(one) if one.is_symlink() else ""
        links = info.st_nlink if not one.is_dir() else 0
        found[str(one.relative_to(place))] = (info.st_mode, info.st_mtime_ns, data, link, links)
    return found


def test_all_of_it_is_made_again(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    for one in (before, after):
        one.mkdir()
    filled(before)
    (after / "deep").mkdir()  # a mount point that is there already
    folder = unpack(Folder, pack(Folder.read(str(tmp_path), "/before")))
    assert folder.at == "/before"
    Folder(at="/after", nodes=folder.nodes).write(str(tmp_path), OURS)
    assert shown(after) == shown(before)
    assert os.path.samefile(after / "other", after / "deep/er/file")


def test_it_can_be_looked_through_without_contents(tmp_path: Path) -> None:
    filled(tmp_path)
    folder = Folder.read(str(tmp_path), "/", contents=False)
    assert {one.path for one in folder.nodes} >= {b"", b"link", b"deep/er/file"}
    assert not any(one.data.strip(b"/") for one in folder.nodes)


@pytest.mark.parametrize(("name", "most"), [("_LARGEST", 4999), ("_MOST", 3)])
def test_what_is_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, most: int) -> None:
    filled(tmp_path)
    monkeypatch.setattr(memoryfs, name, most)
    with pytest.raises(MemoryFilesTooLarge):
        Folder.read(str(tmp_path), "/", contents=False)


def test_a_link_is_not_followed_to_the_mount(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "way").symlink_to("real")
    with pytest.raises(MountNotMovable):
        Folder.read(str(tmp_path), "/way")


@pytest.mark.parametrize(
    "changes",
    [
        {"path": b"/etc"},
        {"path": b"a/../b"},
        {"path": b"a//b"},
        {"path": b"a\0"},
        {"same": b"../x"},
        {"mode": stat.S_IFBLK | 0o600},
        {"mode": stat.S_IFSOCK | 0o600},
        {"mode": stat.S_IFCHR | 0o600, "device": (8, 0)},
        {"mode": stat.S_IFLNK | 0o777},
        {"uid": -1},
        {"times": (-1, 0)},
    ],
)
def test_what_is_no_entry(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"path|type|device|link|time"):
        node(**{"path": b"a"} | changes)


@pytest.mark.parametrize(
    "nodes",
    [
        (),
        (node(b"a"),),
        (node(), node(b"a/b")),
        (node(), node(b"a"), node(b"a")),
        (node(), node(b"a", stat.S_IFREG), node(b"a/b")),
        (node(), node(b"l", stat.S_IFLNK, data=b"/etc"), node(b"l/passwd", stat.S_IFREG)),
        (node(), node(b"a", stat.S_IFREG, same=b"b")),
        (node(), node(b"d"), node(b"a", stat.S_IFREG, same=b"d")),
    ],
)
def test_what_is_no_file_system(nodes: tuple[Node, ...]) -> None:
    with pytest.raises(ValueError, match=r"root|directory|link"):
        Folder(at="/mnt", nodes=nodes)


LAYERS = "lowerdir=/a:/b,upperdir=/c,workdir=/d,index=off"


def overlay(data: str = LAYERS) -> Mount:
    return Mount(kind="overlay", source="none", at="/mnt", flags=0, data=data)


def test_an_overlay_has_its_directories_where_they_are_here() -> None:
    assert Mounts(added=(overlay(),)).directories == {"/a", "/b", "/c", "/d"}
    calls = CallTable()
    overlay().make(calls, lambda path: "/new" + path, "")
    assert b"lowerdir=/new/a:/new/b,upperdir=/new/c,workdir=/new/d,index=off\0" in calls._data


@pytest.mark.parametrize(
    "data", ["", "upperdir=/c", "lowerdir=a", "lowerdir=/a,volatile", "lowerdir=/a:", "lowerdir=/a\\"]
)
def test_what_is_no_overlay(data: str) -> None:
    with pytest.raises(ValueError, match="overlay"):
        overlay(data)
