"""Which plain files are told ahead of the stop, of a process that goes on opening and closing them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from checkpoint.files import aheadplain
from checkpoint.files.aheadplain import AheadPlain
from checkpoint.files.policy import NO_POLICY
from checkpoint.kernel import filetable
from checkpoint.kernel.filetable import Row

PROGRAM = """
import os, sys
files = [os.open(path, os.O_RDWR) for path in sys.argv[1:]]
print(*files, flush=True)
for line in sys.stdin:
    os.dup2(*map(int, line.split()))
    print("done", flush=True)
"""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """With three files, and their descriptors."""
    paths = [tmp_path / name for name in ("first", "second", "third")]
    for path in paths:
        path.write_text(path.name)
    pipe = subprocess.PIPE
    argv = [sys.executable, "-IS", "-c", PROGRAM, *map(str, paths)]
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdout is not None
        yield child, [int(word) for word in child.stdout.readline().split()]
        child.kill()


def duplicate(child: subprocess.Popen[str], old: int, new: int) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    print(old, new, file=child.stdin, flush=True)
    assert child.stdout.readline() == "done\n"


@pytest.mark.parametrize("upwards", [True, False])
def test_one_that_is_duplicated_while_it_is_looked_at(
    process: tuple[subprocess.Popen[str], list[int]], monkeypatch: pytest.MonkeyPatch, upwards: bool
) -> None:
    """Each that is told is told by its own number: the other way the move failed in the stop (KeyError)."""
    child, (first, second, third) = process
    old, new = (first, second) if upwards else (second, first)
    alone = filetable.alone

    def and_then(pids: Sequence[int]) -> dict[int, list[tuple[bytes, Row]]]:
        found = alone(pids)
        duplicate(child, old, new)
        return found

    monkeypatch.setattr(aheadplain.filetable, "alone", and_then)
    ahead = AheadPlain(NO_POLICY, {}, 0)
    ahead.read([child.pid])
    told = {one.place.fd: one for one in ahead.found}
    assert {fd: one.view.fd for fd, one in told.items()} == {fd: fd for fd in told}
    assert third in told
    assert new not in told, "it is another file by now"
    # and in the stop nothing is missed: those that are there are as they were told
    assert ahead.standing(child.pid, dict.fromkeys(told)) == ({}, [])
