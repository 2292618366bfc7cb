"""Images that build on earlier ones, byte by byte; and which of the pages that were collected count."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.errors import BadImageRecord, ParentDiffers, ParentMissing
from checkpoint.image.chain import Chain, Inherited, Parent, Parents, inherits, open_chain
from checkpoint.image.frames import Kind, PageRun, Runs, Space
from checkpoint.image.reader import open_image
from checkpoint.image.writer import ImageFile
from checkpoint.spool import Piece, resolve

PAGE = 4096
Memory = dict[int, bytes]  # pages, by address


def page_runs(memory: Memory, pid: int, at_once: int = 5) -> Iterable[PageRun]:
    pages = sorted(memory)
    for at in range(0, len(pages), at_once):
        part = pages[at : at + at_once]
        data = memoryview(b"".join(memory[page] for page in part))
        yield PageRun(space=Space.MEMORY, id=pid, runs=tuple((page, PAGE) for page in part), data=data)


def write(path: Path, memories: dict[int, Memory], parent: Chain | None = None) -> None:
    """As a checkpoint does: what the parent has is not written."""
    with ImageFile(path) as image:
        heirs = [] if parent is None else parent.heirs(str(path))
        if heirs:
            image.record(Kind.PARENTS, Parents(images=tuple(heirs)))
        for pid, memory in memories.items():
            own = dict(memory)
            for run in page_runs(memory, pid) if parent else ():
                assert parent is not None
                known = [(a, b, n if n >= 0 else len(heirs) - 1) for a, b, n in parent.known(run)]
                for record in inherits(known, pid):
                    image.record(Kind.INHERITED, record)
                for start, end, _ in known:
                    for page in range(start, end, PAGE):
                        assert own.pop(page) == memory[page]
            image.pages(page_runs(own, pid))


def opened(path: Path) -> Chain:
    return open_chain(open_image(path))


def read(path: Path) -> dict[int, Memory]:
    chain = opened(path)
    found: dict[int, Memory] = {}
    for frame in chain.frames():
        if frame.kind == Kind.PAGES:
            run, at = frame.pages(), 0
            for start, length in run.runs:
                for page in range(start, start + length, PAGE):
                    assert page not in found.setdefault(run.id, {}), "a page came twice"
                    found[run.id][page] = bytes(run.data[at : at + PAGE])
                    at += PAGE
    chain.close()
    return found


@pytest.mark.parametrize("seed", range(20))
def test_each_image_of_a_row_has_all_of_its_memory(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    contents = [bytes([n]) * PAGE for n in range(6)]
    memories: dict[int, Memory] = {5: {}, 7: {}}
    row: list[tuple[Path, dict[int, Memory]]] = []
    for number in range(6):
        for memory in memories.values():
            for page in range(PAGE, 40 * PAGE, PAGE):
                what = chance.random()
                if what < 0.2:
                    memory.pop(page, None)
                elif what < 0.5:
                    memory[page] = chance.choice(contents)
        path = tmp_path / f"{number}"
        parent = opened(row[-1][0]) if row and chance.random() < 0.9 else None
        write(path, memories, parent)
        row.append((path, {pid: dict(memory) for pid, memory in memories.items() if memory}))
    for path, expected in row:
        assert read(path) == expected, f"seed {seed}"


def test_pages_of_one_image_are_never_written_again(tmp_path: Path) -> None:
    memory = {page * PAGE: os.urandom(PAGE) for page in range(1, 2000)}
    write(tmp_path / "a", {1: memory})
    write(tmp_path / "b", {1: memory}, opened(tmp_path / "a"))
    memory[700 * PAGE] = os.urandom(PAGE)
    write(tmp_path / "c", {1: memory}, opened(tmp_path / "b"))
    assert (tmp_path / "b").stat().st_size < 200_000
    (frame,) = open_image(tmp_path / "c").records(Kind.PAGES)
    assert len(frame.data) == PAGE
    # of the middle one nothing is needed, but it is named
    assert [Path(one.path).name for one in opened(tmp_path / "c").parents] == ["a", "b"]
    assert read(tmp_path / "c") == {1: memory}


def test_images_in_another_directory_are_found(tmp_path: Path) -> None:
    memory = {PAGE: bytes(PAGE)}
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    write(tmp_path / "x/a", {1: memory})
    write(tmp_path / "y/b", {1: memory}, opened(tmp_path / "x/a"))
    assert read(tmp_path / "y/b") == {1: memory}
    (tmp_path / "x/a").rename(tmp_path / "x/elsewhere")
    with pytest.raises(ParentMissing):
        opened(tmp_path / "y/b")


def test_another_image_in_the_place_of_a_parent(tmp_path: Path) -> None:
    memory = {PAGE: bytes(PAGE)}
    write(tmp_path / "a", {1: memory})
    write(tmp_path / "b", {1: memory}, opened(tmp_path / "a"))
    write(tmp_path / "a", {1: {PAGE: b"x" * PAGE}})
    with pytest.raises(ParentDiffers):
        opened(tmp_path / "b")


@pytest.mark.parametrize(
    ("image", "runs"), [(0, ((2 * PAGE, PAGE),)), (0, ((PAGE, 2 * PAGE),)), (1, ((PAGE, PAGE),)), (9, ((PAGE, PAGE),))]
)
def test_pages_that_the_parent_has_not_are_a_bad_record(
    tmp_path: Path, image: int, runs: tuple[tuple[int, int], ...]
) -> None:
    write(tmp_path / "a", {1: {PAGE: bytes(PAGE)}})
    root = open_image(tmp_path / "a").end.root
    with ImageFile(tmp_path / "b") as file:
        file.record(Kind.PARENTS, Parents(images=(Parent(path="a", root=root),)))
        file.record(Kind.INHERITED, Inherited(image=image, pages=Runs(space=Space.MEMORY, id=1, runs=runs)))
    with pytest.raises(BadImageRecord):
        list(opened(tmp_path / "b").frames())


def test_parents_are_named_once(tmp_path: Path) -> None:
    write(tmp_path / "a", {})
    named = Parents(images=(Parent(path="a", root=open_image(tmp_path / "a").end.root),))
    with ImageFile(tmp_path / "b") as file:
        file.record(Kind.PARENTS, named)
        file.record(Kind.PARENTS, named)
    with pytest.raises(BadImageRecord):
        opened(tmp_path / "b")


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12), st.booleans(), st.integers(0, 2)), max_size=30))
def test_the_later_of_two_counts(log: list[tuple[int, int, bool, int]]) -> None:
    pieces, model, end = [], dict[int, tuple[int, int]](), 0
    for start, length, void, source in log:
        pieces.append(Piece(start, start + length, None if void else end, source))
        for at in range(start, start + length):
            if void:
                model.pop(at, None)
            else:
                model[at] = (source, end + at - start)
        end += length
    found = resolve(pieces)
    assert {p.start + i: (p.source, (p.place or 0) + i) for p in found for i in range(p.end - p.start)} == model
    assert all(a.end <= b.start for a, b in itertools.pairwise(found))
