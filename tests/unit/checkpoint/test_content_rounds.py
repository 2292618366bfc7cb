"""Shared memory in rounds: whatever is done to a file between them, the target's has the same bytes and holes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.errors import BadFileRecord
from checkpoint.files.abi import punch_hole
from checkpoint.files.content import Content, ContentKind, data_runs, punch, put
from checkpoint.files.contentrounds import BLOCK, LEAST, ContentRounds
from checkpoint.files.contents import ContentTable
from checkpoint.files.staged import Staged, StagedContents
from checkpoint.files.treefiles import TreeFiles
from checkpoint.image.frames import PageRun, Runs, Space

PAGE = 4096
SIZE = LEAST + 5 * PAGE


def table_of(fd: int) -> ContentTable:
    """A table that has found one memfd."""
    table = ContentTable()
    view: Any = SimpleNamespace(stat=os.fstat(fd), magic=f"/proc/self/fd/{fd}")
    table.of(view, ContentKind.MEMFD, "shared", 0)
    return table


@contextlib.contextmanager
def moving() -> Iterator[tuple[int, ContentRounds, Staged, list[int]]]:
    """A file, what copies it, what keeps it; the descriptor that comes of it at the end."""
    rounds, staged = ContentRounds(), Staged(str)
    rounds.wanted = True
    made: list[int] = []
    fd = os.memfd_create("shared", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, SIZE)
        yield fd, rounds, staged, made
    finally:
        rounds.close()
        staged.close()
        for one in (fd, *made):
            os.close(one)


def send(rounds: ContentRounds, staged: Staged) -> int:
    """A round; how many bytes it had."""
    size = 0
    for told in rounds.round():
        match told:
            case PageRun() as run:
                size += len(run.data)
                staged.write(run)
            case Runs() as holes:
                staged.drop(holes)
            case record:
                staged.tell(record)
    return size


def finish(fd: int, rounds: ContentRounds, staged: Staged, made: list[int]) -> int:
    """The stop; how many bytes it had."""
    table = table_of(fd)
    try:
        rounds.adopt(table)
        files = TreeFiles(files=[], contents=table.records, tables={}, staged=rounds.staged)
        staged.provide(files, lambda _, fd: made.append(fd))
        (content,) = table.records
        if not made:
            made.append(content.make(str))
        for holes in rounds.compare():
            punch(made[0], holes.runs, "content 0")
        size = 0
        for run in rounds.runs(table):
            size += len(run.data)
            put(content, made[0], run.runs, run.data, size=content.size, name="content 0")
        return size
    finally:
        table.close()


def same(fd: int, other: int) -> bool:
    size = os.fstat(fd).st_size
    return (
        size == os.fstat(other).st_size
        and list(data_runs(fd)) == list(data_runs(other))
        and os.pread(fd, size, 0) == os.pread(other, size, 0)
    )


pages = st.integers(0, SIZE // PAGE - 1)
change = st.one_of(
    st.tuples(st.just("write"), pages, st.integers(1, 40), st.integers(0, 255)),
    st.tuples(st.just("punch"), pages, st.integers(1, 40), st.just(0)),
    st.tuples(st.just("size"), pages, st.integers(0, PAGE - 1), st.just(0)),
    st.tuples(st.just("round"), st.just(0), st.just(0), st.just(0)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(change, max_size=12))
def test_the_target_has_the_same_bytes_and_holes(changes: list[tuple[str, int, int, int]]) -> None:
    with moving() as (fd, rounds, staged, made):
        os.pwrite(fd, bytes(range(256)) * (LEAST // 256), 0)
        for what, page, count, byte in changes:
            match what:
                case "write":
                    os.pwrite(fd, bytes([byte]) * (count * PAGE), page * PAGE)
                case "punch":
                    punch_hole(fd, page * PAGE, count * PAGE)
                case "size":
                    os.ftruncate(fd, page * PAGE + count)
                case _:
                    table = table_of(fd)
                    rounds.see(table)
                    table.close()
                    send(rounds, staged)
        finish(fd, rounds, staged, made)
        assert same(fd, made[0])


def test_only_what_was_written_is_sent_again() -> None:
    with moving() as (fd, rounds, staged, made):
        # without those that are written below: nothing would have changed
        os.pwrite(fd, os.urandom(LEAST).replace(b"x", b"-").replace(b"y", b"-"), 0)
        rounds.see(table := table_of(fd))
        table.close()
        assert send(rounds, staged) == LEAST
        assert send(rounds, staged) == 0
        os.pwrite(fd, b"x", 3 * BLOCK + 17)
        assert send(rounds, staged) == BLOCK
        os.pwrite(fd, b"y", 5 * BLOCK)
        assert finish(fd, rounds, staged, made) == BLOCK
        assert rounds.staged == {0: 0}
        assert same(fd, made[0])


def test_a_large_one_is_compared_in_halves() -> None:
    with moving() as (fd, rounds, staged, made):
        size = 65 << 20
        os.ftruncate(fd, size)
        for at in range(0, size, 1 << 20):
            os.pwrite(fd, os.urandom(PAGE), at)
        rounds.see(table := table_of(fd))
        table.close()
        assert send(rounds, staged) == 65 * PAGE
        for at in (0, size // 2 - PAGE, size // 2, size - PAGE):
            os.pwrite(fd, b"z" * PAGE, at)
        assert finish(fd, rounds, staged, made) < 65 * PAGE
        assert same(fd, made[0])


def test_nothing_is_kept_for_a_target_that_does_not_ask() -> None:
    with moving() as (fd, rounds, _, _):
        rounds.wanted = False
        os.pwrite(fd, os.urandom(LEAST), 0)
        rounds.see(table := table_of(fd))
        table.close()
        assert list(rounds.round()) == []


CONTENT = Content(kind=ContentKind.MEMFD, name="a", size=PAGE, mode=0o600, uid=os.getuid(), gid=os.getgid())


def test_what_was_not_told_is_refused() -> None:
    staged = Staged(str)
    try:
        with pytest.raises(BadFileRecord):
            staged.write(PageRun(space=Space.STAGED, id=7, runs=((0, 1),), data=memoryview(b"x")))
        with pytest.raises(BadFileRecord):
            staged.drop(Runs(space=Space.STAGED, id=7, runs=((0, 1),)))
        staged.tell(StagedContents(contents={7: CONTENT}))
        with pytest.raises(BadFileRecord):
            staged.tell(StagedContents(contents={7: CONTENT}))
    finally:
        staged.close()


def test_another_file_is_not_handed_over() -> None:
    staged = Staged(str)
    try:
        staged.tell(StagedContents(contents={7: CONTENT}))
        other = Content(kind=ContentKind.MEMFD, name="b", size=PAGE, mode=0o600, uid=0, gid=0)
        with pytest.raises(BadFileRecord):
            staged.provide(
                TreeFiles(files=[], contents=[other], tables={}, staged={0: 7}), lambda _, fd: pytest.fail(str(fd))
            )
    finally:
        staged.close()


def test_a_record_names_contents_that_are_there() -> None:
    with pytest.raises(ValueError, match="told ahead"):
        TreeFiles(files=[], contents=[CONTENT], tables={}, staged={1: 0})
    with pytest.raises(ValueError, match="told ahead"):
        TreeFiles(files=[], contents=[CONTENT, CONTENT], tables={}, staged={0: 0, 1: 0})
    with pytest.raises(ValueError, match="not told ahead"):
        StagedContents(contents={0: Content(kind=ContentKind.DELETED, name="/a", size=1, mode=0, uid=0, gid=0)})
