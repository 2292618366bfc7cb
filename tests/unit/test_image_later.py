"""Images whose pages are read when they are needed: where they are is known without their frames, and no wrong byte of
them is handed out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from checkpoint.errors import ImageDamaged, ImageError
from checkpoint.image.format import FrameWriter, Kind, PageRun, Space
from checkpoint.image.frames import DATA_MAX
from checkpoint.image.lazypages import FileIndex, ImagePages
from checkpoint.image.reader import ImageReader, open_image
from checkpoint.image.writer import ImageFile

PAGE = 4096
RUNS = {
    7: [((0x10000, PAGE), (0x12000, 2 * PAGE)), ((0x20000, PAGE),)],
    9: [((0x15000, PAGE),), ((0x10000, 2 * PAGE),)],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    text: str


def bytes_of(pid: int, address: int) -> bytes:
    return (b"%06d %016x " % (pid, address)) * (PAGE // 24) + bytes(PAGE % 24)


def page_run(pid: int, runs: tuple[tuple[int, int], ...], space: Space = Space.MEMORY) -> PageRun:
    data = b"".join(bytes_of(pid, at) for start, length in runs for at in range(start, start + length, PAGE))
    return PageRun(space=space, id=pid, runs=runs, data=memoryview(data))


def make(path: Path, *more: PageRun) -> Path:
    with ThreadPoolExecutor(2) as pool, ImageFile(path, executor=pool) as image:
        image.record(Kind.TREE, Note(text="tree"))
        for pid, frames in RUNS.items():
            image.pages(page_run(pid, runs) for runs in frames)
        image.pages([page_run(3, ((0, PAGE),), Space.CONTENT), *more])
        image.record(Kind.HOLD, Note(text="hold"))
    return path


def read(image: ImageReader) -> dict[tuple[int, int], bytes]:
    """All that the index tells of, by process and page."""
    assert image.later is not None
    source, found = ImagePages(image.fd, image.later, image.path), {}
    for pid, ranges in image.later.ranges():
        for start, end in ranges:
            source.want(pid, start, end - start, urgent=False)
        for number, start, data in source.ready():
            for at in range(0, len(data), PAGE):
                found[number, start + at] = bytes(data[at : at + PAGE])
    return found


def read_at_once(image: ImageReader) -> dict[tuple[int, int], bytes]:
    """The same, all that is wanted told before."""
    assert image.later is not None
    found = {}
    with contextlib.closing(ImagePages(image.fd, image.later, image.path)) as source:
        for pid, ranges in image.later.ranges():
            source.read_ahead(pid, ranges)
        for run in source.runs():
            assert sum(length for _, length in run.runs) == len(run.data)
            at = 0
            for start, length in run.runs:
                for page in range(start, start + length, PAGE):
                    found[run.id, page] = bytes(run.data[at : at + PAGE])
                    at += PAGE
    return found


Reads = Callable[[ImageReader], dict[tuple[int, int], bytes]]
EXPECTED = {
    (pid, at): bytes_of(pid, at)
    for pid, frames in RUNS.items()
    for runs in frames
    for start, length in runs
    for at in range(start, start + length, PAGE)
}


def without_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrameWriter, "page_index", lambda self: None)


@pytest.mark.parametrize("indexed", [True, False], ids=["index", "none"])
def test_pages_are_found_without_their_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indexed: bool) -> None:
    if not indexed:
        without_index(monkeypatch)
    make(tmp_path / "image")
    with ThreadPoolExecutor(2) as pool:
        for executor in (None, pool):
            with open_image(tmp_path / "image", executor=executor, later=True) as image:
                kinds = [frame.kind for frame in image.frames]
                assert kinds == [Kind.TREE, Kind.PAGES, Kind.HOLD, *[Kind.PAGE_INDEX] * indexed]
                assert [run.space for run in image.pages()] == [Space.CONTENT]
                assert read(image) == read_at_once(image) == EXPECTED
                assert dict(image.later.ranges() if image.later else ()) == {
                    7: [(0x10000, 0x11000), (0x12000, 0x14000), (0x20000, 0x21000)],
                    9: [(0x10000, 0x12000), (0x15000, 0x16000)],
                }


def test_who_does_not_ask_for_it_reads_all(tmp_path: Path) -> None:
    with open_image(make(tmp_path / "image")) as image:
        assert image.later is None
        assert sum(run.space is Space.MEMORY for run in image.pages()) == 4


@pytest.mark.parametrize("read", [read, read_at_once])
def test_no_flipped_byte_gives_a_wrong_page(tmp_path: Path, read: Reads) -> None:
    data = bytearray(make(tmp_path / "image").read_bytes())
    bad, told, used = tmp_path / "bad", 0, 0
    # of the bytes of pages themselves, which are most, a sample
    for at in [*range(0, len(data), 509), *range(4096), *range(len(data) - 1500, len(data))]:
        data[at] ^= 0x20
        bad.write_bytes(data)
        data[at] ^= 0x20
        try:
            image = open_image(bad, later=True)
        except ImageError:
            told += 1
            continue
        with image:
            try:
                assert read(image) == EXPECTED, at
            except ImageError:
                used += 1
    assert told > 1000
    assert used > 10


def test_every_truncation_is_told(tmp_path: Path) -> None:
    data = make(tmp_path / "image").read_bytes()
    for length in [*range(0, len(data), 997), *range(len(data) - 100, len(data))]:
        (tmp_path / "bad").write_bytes(data[:length])
        with pytest.raises(ImageError):
            open_image(tmp_path / "bad", later=True)


def test_pages_that_come_twice_cannot_come_later(tmp_path: Path) -> None:
    make(tmp_path / "image", page_run(7, ((0x13000, PAGE),)))
    with open_image(tmp_path / "image") as image:
        assert not list(image.records(Kind.PAGE_INDEX))
    with pytest.raises(ImageDamaged, match="more than once"):
        open_image(tmp_path / "image", later=True)


Change = Callable[[FileIndex], dict[str, object]]


def drop_a_frame(index: FileIndex) -> dict[str, object]:
    columns = {name: getattr(index, name)[:-8] for name in ("offsets", "records", "data")}
    return {**columns, "digests": index.digests[:-32]}


def one_number_up(column: str) -> Change:
    def change(index: FileIndex) -> dict[str, object]:
        first = int.from_bytes(getattr(index, column)[:8], "little") + PAGE
        return {column: first.to_bytes(8, "little") + getattr(index, column)[8:]}

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda index: {"digests": index.digests[:-1]},
        lambda index: {"digests": bytes(32) + index.digests[32:]},
        lambda index: {"data": index.data[:-8]},
        lambda index: {"data": (DATA_MAX + PAGE).to_bytes(8, "little") + index.data[8:]},
        lambda index: {"have": {}},
        lambda index: {"runs": {**index.runs, 7: index.runs[7][:-8]}},
        one_number_up("offsets"),
        one_number_up("records"),
        one_number_up("data"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    real = FrameWriter.page_index

    def index(self: FrameWriter) -> object:
        found = real(self)
        assert found is not None
        names = ("offsets", "records", "data", "digests", "runs", "have")
        return Wrong(**({name: getattr(found, name) for name in names} | change(found)))  # type: ignore[arg-type]

    monkeypatch.setattr(FrameWriter, "page_index", index)
    make(tmp_path / "image")
    with open_image(tmp_path / "image"):
        pass  # to who reads all of it, it is none of its business
    with pytest.raises(ImageError):
        open_image(tmp_path / "image", later=True)


def test_a_frame_that_is_not_there_is_told_when_it_is_used(tmp_path: Path) -> None:
    with open_image(make(tmp_path / "image"), later=True) as image:
        assert image.later is not None
        far = image.later.runs[9][:16] + (77).to_bytes(8, "little") + image.later.runs[9][24:]
        names = ("offsets", "records", "data", "digests", "have")
        index = FileIndex(**{name: getattr(image.later, name) for name in names}, runs={**image.later.runs, 9: far})
        source = ImagePages(image.fd, index, "image")
        source.want(9, 0x10000, PAGE, urgent=True)
        with pytest.raises(ImageDamaged, match="no frame 77"):
            list(source.ready())
        with pytest.raises(ImageDamaged, match="no frame 77"):
            source.read_ahead(9, [(0x10000, 0x12000)])


def test_a_place_behind_the_end_of_a_frame_is_told(tmp_path: Path) -> None:
    with open_image(make(tmp_path / "image"), later=True) as image:
        assert image.later is not None
        far = image.later.runs[9][:24] + PAGE.to_bytes(8, "little") + image.later.runs[9][32:]
        names = ("offsets", "records", "data", "digests", "have")
        index = FileIndex(**{name: getattr(image.later, name) for name in names}, runs={**image.later.runs, 9: far})
        with contextlib.closing(ImagePages(image.fd, index, "image")) as source:
            source.read_ahead(9, [(0x10000, 0x12000)])
            with pytest.raises(ImageDamaged, match="no such pages"):
                list(source.runs())


def test_more_frames_than_are_read_ahead_come_all(tmp_path: Path) -> None:
    count = 40
    with ThreadPoolExecutor(2) as pool, ImageFile(tmp_path / "image", executor=pool) as image:
        image.pages(page_run(7, ((at * PAGE, PAGE),)) for at in range(1, count))
    with open_image(tmp_path / "image", later=True) as opened:
        assert read_at_once(opened) == {(7, at * PAGE): bytes_of(7, at * PAGE) for at in range(1, count)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong:
    """What is written in the place of an index."""

    offsets: bytes
    records: bytes
    data: bytes
    digests: bytes
    runs: dict[int, bytes]
    have: dict[int, bytes]
