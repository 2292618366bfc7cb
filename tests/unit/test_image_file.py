"""Image files: how they appear, how they are verified, what inspect tells."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from checkpoint.errors import (
    BadImageRecord,
    ForeignImage,
    ImageDamaged,
    ImageError,
    ImageNotWritten,
    ImageTruncated,
    ImageUnreadable,
    UnknownFrameKind,
)
from checkpoint.image.format import Kind, PageRun, Space
from checkpoint.image.inspect import SECTIONS, describe, section
from checkpoint.image.reader import open_image
from checkpoint.image.writer import ImageFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    text: str
    conn_id: str = "tcp:10.0.0.1:1-10.0.0.2:2"
    snd_una: int = 0
    raw: bytes = b"\xff\x00"


def page(start: int = 0x1000, size: int = 4096) -> PageRun:
    return PageRun(space=Space.MEMORY, id=9, runs=((start, size),), data=memoryview(os.urandom(size)))


def make(path: Path) -> Path:
    with ImageFile(path) as image:
        image.record(Kind.TREE, Note(text="tree"))
        image.pages([page()])
        image.record("NEWKIND", Note(text="later"), optional=True)
    return path


def test_a_file_round_trips(tmp_path: Path) -> None:
    pages = [page(0x10000 * i, 4096 * i) for i in range(1, 9)]
    with ThreadPoolExecutor(2) as pool:
        with ImageFile(tmp_path / "image", executor=pool) as image:
            image.record(Kind.TREE, Note(text="tree"))
            assert image.pages(pages) == sum(len(p.data) for p in pages)
        for executor in (None, pool):
            with open_image(tmp_path / "image", executor=executor) as found:
                assert [f.decode(Note).text for f in found.records(Kind.TREE)] == ["tree"]
                assert [(p.id, p.runs, bytes(p.data)) for p in found.pages()] == [
                    (p.id, p.runs, bytes(p.data)) for p in pages
                ]
                assert found.size == os.stat(tmp_path / "image").st_size


def test_only_the_owner_may_read_it_and_nothing_else_is_left(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        make(tmp_path / "image")
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(tmp_path / "image").st_mode) == 0o600
    assert os.listdir(tmp_path) == ["image"]


def fail_midway(path: Path) -> None:
    with ImageFile(path) as image:
        image.record(Kind.TREE, Note(text="x"))
        assert len(os.listdir(path.parent)) == 2
        raise KeyError("the dump failed")


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"before")
    with pytest.raises(KeyError, match="the dump failed"):
        fail_midway(tmp_path / "image")
    assert os.listdir(tmp_path) == ["image"]
    assert (tmp_path / "image").read_bytes() == b"before"


def test_a_full_disk_is_an_error_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, views: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(ImageNotWritten, match="No space left"):
        make(tmp_path / "image")
    assert os.listdir(tmp_path) == []


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, views: real(fd, [memoryview(views[0])[:7]]))
    make(tmp_path / "image")
    monkeypatch.undo()
    assert open_image(tmp_path / "image").end is not None


def test_places_where_no_image_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(ImageNotWritten), ImageFile(tmp_path / "none" / "image"):
        raise RuntimeError("not reached")
    (tmp_path / "directory").mkdir()
    with pytest.raises(ImageNotWritten), ImageFile(tmp_path / "directory"):
        pass
    assert os.listdir(tmp_path) == ["directory"]


def test_what_is_no_image_file(tmp_path: Path) -> None:
    with pytest.raises(ImageUnreadable):
        open_image(tmp_path / "none")
    with pytest.raises(ImageUnreadable):
        open_image(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageUnreadable):
        open_image(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    with pytest.raises(ImageTruncated):
        open_image(tmp_path / "empty")
    (tmp_path / "text").write_text("#!/bin/sh\n")
    with pytest.raises(ForeignImage):
        open_image(tmp_path / "text")


def test_every_flipped_byte_and_every_truncation(tmp_path: Path) -> None:
    data = bytearray(make(tmp_path / "image").read_bytes())
    bad = tmp_path / "bad"
    for i in range(len(data)):
        data[i] ^= 0x20
        bad.write_bytes(data)
        with pytest.raises(ImageError):
            open_image(bad)
        data[i] ^= 0x20
    for length in range(len(data)):
        bad.write_bytes(data[:length])
        with pytest.raises(ImageTruncated):
            open_image(bad)
    bad.write_bytes(data + b"\0")
    with pytest.raises(ImageError):
        open_image(bad)
    end = bytes(data[-16:])
    bad.write_bytes(data + end)
    with pytest.raises(ImageDamaged):
        open_image(bad)


def test_unknown_mandatory_kinds_are_refused_by_name(tmp_path: Path) -> None:
    with ImageFile(tmp_path / "image") as image:
        image.record("NEWKIND", Note(text="x"))
    with pytest.raises(UnknownFrameKind, match="NEWKIND"):
        open_image(tmp_path / "image")


def test_inspect_tells_every_part_and_is_json(tmp_path: Path) -> None:
    with open_image(make(tmp_path / "image"), known=None) as image:
        told = describe(image)
        json.dumps(told)
        assert told["processes"][0]["text"] == "tree"
        assert told["processes"][0]["raw"] == "ff00"
        assert [c["conn_id"] for c in told["connections"]] == ["tcp:10.0.0.1:1-10.0.0.2:2"] * 2
        assert told["memory"]["pages"] == [{"space": "memory", "id": 9, "bytes": 4096, "runs": 1, "drops": 0}]
        assert told["other"]["NEWKIND"][0]["text"] == "later"
        assert told["image"]["root"] == image.end.root.hex()
        for name in SECTIONS:
            assert section(image, name) == told[name]
        with pytest.raises(ValueError, match="nothing"):
            section(image, "nothing")


def test_inspect_of_what_msgpack_cannot_read(tmp_path: Path) -> None:
    with ImageFile(tmp_path / "image") as image:
        image.record(Kind.TREE, Note(text="x"))
    with open_image(tmp_path / "image") as found:
        found.frames[0].record = b"\xc1"
        with pytest.raises(BadImageRecord):
            describe(found)
