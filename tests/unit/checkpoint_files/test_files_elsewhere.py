"""Files at the target: mapped paths, what identifies a file, what the user decided on its way."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.errors import BadExternal, BadPathMap
from checkpoint.files.content import reopened
from checkpoint.files.identity import Beacons, build_id, digest, evidence_of, same_folder, shown
from checkpoint.files.pathmap import PathMap
from checkpoint.files.policy import External, Policy, rule_for
from checkpoint.verdict import Verdict
from migrate.fileoptions import FileOptions, shared_and_apart


@pytest.mark.parametrize(
    ("path", "mapped"),
    [
        ("/var/log", "/mnt/log"),
        ("/var/log/a/b", "/mnt/log/a/b"),
        ("/var/logs", "/var/logs"),
        ("/var/log/special/x", "/s/x"),
        ("/var", "/var"),
        ("/etc/passwd", "/else/passwd"),
    ],
)
def test_the_longest_beginning_decides(path: str, mapped: str) -> None:
    there = PathMap.parse(["/var/log=/mnt/log", "/var/log/special/=/s", "/etc=/else/"])
    assert there(path) == mapped


def test_the_root_may_be_mapped() -> None:
    there = PathMap([("/", "/chroot"), ("/tmp", "/")])
    assert (there("/a"), there("/"), there("/tmp/a"), there("/tmp")) == ("/chroot/a", "/chroot", "/a", "/")


@pytest.mark.parametrize("text", ["/a", "a=/b", "/a=b", "=/b", "/a=", "/a=/b\0"])
def test_what_is_no_map(text: str) -> None:
    with pytest.raises(BadPathMap):
        PathMap.parse([text])


def test_two_places_for_one_path() -> None:
    assert PathMap.parse(["/a=/b", "/a/=/b"])("/a") == "/b"
    with pytest.raises(BadPathMap, match="two places"):
        PathMap.parse(["/a=/b", "/a=/c"])


def test_options_travel_as_texts() -> None:
    said = FileOptions(path=PathMap.parse(["/a=/b=c"]), ship=True, overwrite=False)
    heard = FileOptions.told(said.texts() | {"of a later version": "?"})
    assert (heard.path.pairs, heard.ship, heard.overwrite) == ({"/a": "/b=c"}, True, False)
    assert FileOptions.told({}).texts() == {}
    with pytest.raises(BadPathMap):
        FileOptions.told({"map:relative": "/x"})


def test_what_the_target_says_of_written_files() -> None:
    answer = [Verdict(subject="/d/apart", kind="shipped file"), Verdict(subject="/e/same", kind="file")]
    shared, apart = shared_and_apart(["/d/apart", "/e/same", "/e/other"], answer)
    assert (shared, apart) == (["/e"], ["/d/apart"])
    policy = Policy(ship=True, shared=frozenset(shared), apart=frozenset(apart))
    assert [policy.stays_behind(p) for p in ("/d/apart", "/e/new", "/d/new", "/f/x")] == [True, False, True, True]
    # without a target there is nobody to share with
    assert Policy(ship=True).stays_behind("/e/same")
    assert not Policy().stays_behind("/e/same")


def elf(order: str, wide: bool, notes: bytes) -> bytes:
    """A file with one PT_NOTE segment behind its header."""
    header, entry = (64, 56) if wide else (52, 32)
    at = header + entry
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2]) + bytes(10)
    if wide:
        head = struct.pack(order + "HHIQQQIHHHHHH", 2, 62, 1, 0, header, 0, 0, header, entry, 1, 0, 0, 0)
        segment = struct.pack(order + "IIQQQQQQ", 4, 4, at, 0, 0, len(notes), len(notes), 4)
    else:
        head = struct.pack(order + "HHIIIIIHHHHHH", 2, 3, 1, 0, header, 0, 0, header, entry, 1, 0, 0, 0)
        segment = struct.pack(order + "IIIIIIII", 4, at, 0, 0, len(notes), len(notes), 4, 4)
    return ident + head + segment + notes


def note(order: str, name: bytes, kind: int, data: bytes) -> bytes:
    pad = b"\0" * (-len(name) % 4), b"\0" * (-len(data) % 4)
    return struct.pack(order + "III", len(name), len(data), kind) + name + pad[0] + data + pad[1]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("wide", [False, True])
def test_build_ids(order: str, wide: bool, tmp_path: Path) -> None:
    file = tmp_path / "program"
    other = note(order, b"GNU\0", 1, bytes(16)) + note(order, b"Xen\0", 3, b"not it")
    file.write_bytes(elf(order, wide, other + note(order, b"GNU\0", 3, b"\x12\x34\x56\x78\x9a")))
    with file.open("rb") as opened:
        assert build_id(opened.fileno()) == b"\x12\x34\x56\x78\x9a"
        assert evidence_of(opened.fileno(), file.stat().st_size).digest == b""
    file.write_bytes(elf(order, wide, other))
    with file.open("rb") as opened:
        assert build_id(opened.fileno()) == b""
        assert len(evidence_of(opened.fileno(), file.stat().st_size).digest) == 32


@given(
    st.one_of(
        st.binary(max_size=400),
        st.builds(lambda junk, w: elf("<", w, junk), st.binary(max_size=200), st.booleans()),
        st.builds(lambda junk: b"\x7fELF\x02\x01" + junk, st.binary(min_size=58, max_size=300)),
    )
)
def test_no_file_makes_it_stumble(content: bytes) -> None:
    fd = os.memfd_create("junk")
    try:
        os.write(fd, content)
        assert len(build_id(fd)) <= 64
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (16 << 20) + 1])
def test_digests_tell_contents_apart(size: int, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for path in (first, second):
        with path.open("wb") as out:
            out.truncate(size)
    with first.open("r+b") as a, second.open("r+b") as b:
        assert digest(a.fileno(), size) == digest(b.fileno(), size)
        if size:
            b.seek(size - 1)
            b.write(b"x")
            b.flush()
            assert digest(a.fileno(), size) != digest(b.fileno(), size)
    assert first.stat().st_size == size


@pytest.mark.parametrize("size", [0, 5])
def test_a_digest_is_of_the_size_that_was_seen(size: int, tmp_path: Path) -> None:
    """It may have grown; and whoever runs may have opened a file that never ends, of the size 0, by the same number."""
    (tmp_path / "file").write_bytes(b"01234" + bytes(1 << 21))
    (tmp_path / "before").write_bytes(b"01234"[:size])
    with (tmp_path / "file").open("rb") as grown, (tmp_path / "before").open("rb") as before:
        assert digest(grown.fileno(), size) == digest(before.fileno(), size)


def test_only_the_file_that_was_seen_is_opened_again(tmp_path: Path) -> None:
    """A fifo that was opened by its number meanwhile would be waited for."""
    (tmp_path / "file").write_bytes(b"seen")
    os.mkfifo(tmp_path / "fifo")
    fd = os.open(tmp_path / "file", os.O_WRONLY)
    seen = os.fstat(fd)
    with reopened(f"/proc/self/fd/{fd}", seen) as again:
        assert os.read(again, 10) == b"seen"
    fifo = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    os.dup2(fifo, fd)
    with pytest.raises(FileNotFoundError), reopened(f"/proc/self/fd/{fd}", seen):
        pass
    os.close(fd)
    os.close(fifo)


def test_a_beacon_shows_the_very_same_directory(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "file").write_text("the same")
    (tmp_path / "link").symlink_to(here)
    with Beacons([str(here), str(tmp_path / "missing")]) as beacons:
        name = beacons.names[str(here)]
        assert list(beacons.names) == [str(here)]
        assert same_folder(f"{here}/file", name)
        assert same_folder(f"{tmp_path}/link/file", name)
        assert not same_folder(f"{there}/file", name)
        for wrong in ("", "file", "../here/" + name, name + "x"):
            assert not same_folder(f"{here}/file", wrong)
    assert [p.name for p in here.iterdir()] == ["file"]


def test_marks_as_text() -> None:
    assert shown(5, 1_500_000_000_123_456_789) == "5 bytes of 2017-07-14 02:40:00.123456 UTC"
    assert shown(5, -1, b"\xab").endswith("1969-12-31 23:59:59.999999 UTC, build-id ab")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("1=/var/log/x", External(pid=0, fd=1, path="/var/log/x")),
        ("77:0=inherit", External(pid=77, fd=0, inherit=True)),
        ("5=close", External(pid=0, fd=5)),
        ("5=/a=b", External(pid=0, fd=5, path="/a=b")),
    ],
)
def test_external_rules(text: str, rule: External) -> None:
    assert External.parse(text) == rule
    assert str(rule) == text
    assert rule.closes == text.endswith("=close")


@pytest.mark.parametrize("text", ["", "1", "1=", "x=/a", "-1=/a", "0:1=/a", "1=relative", "1:2:3=/a", "9999999999=/a"])
def test_what_is_no_external_rule(text: str) -> None:
    with pytest.raises(BadExternal):
        External.parse(text)


def test_the_rule_that_names_the_process_comes_first() -> None:
    policy = Policy(external=tuple(map(External.parse, ["1=/all", "7:1=/seven", "8:1=close", "3=close"])))
    found = [policy.replaces([(pid, 1)]) for pid in (6, 7, 8)]
    assert [rule and rule.path for rule in found] == ["/all", "/seven", None]
    assert [policy.closes(pid, fd) for pid, fd in ((8, 1), (7, 1), (9, 3), (9, 4))] == [True, False, True, False]
    assert rule_for((), [(1, 1)]) is None
