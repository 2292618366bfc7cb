"""What came here by a drain, as the journals tell."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.traces import Stubs, Trace, Traced, write
from migrate import drains
from migrate.errors import NothingDrained
from migrate.journal import End, Journal, Role

ME = Traced.now(os.getpid())
PARENT = Traced.now(os.getppid())


def moved(
    folder: Path, number: int, drain: str, *roots: Traced, end: End | None = End.MOVED, role: Role = Role.TARGET
) -> None:
    journal = Journal.open(role, f"{number:032x}", directory=folder)
    note = drains.told(drains.label(drain))
    assert note is not None
    journal.note(drains.NOTE, note)
    there = {9000 + one.pid: one.pid for one in roots}
    write(journal.note, Trace.STUBS, Stubs(processes=list(roots), names=[], roots=there))
    if end is None:
        journal.leave()
    else:
        journal.finish(end)


def test_what_runs_here_is_told_by_drain(tmp_path: Path) -> None:
    moved(tmp_path, 1, "00000001", ME)
    moved(tmp_path, 2, "00000001", PARENT)
    moved(tmp_path, 3, "00000002", PARENT)
    one, two = drains.here(tmp_path)
    assert (one.drain, one.host, one.roots) == ("00000001", socket.gethostname(), tuple(sorted((ME.pid, PARENT.pid))))
    assert (two.drain, two.roots) == ("00000002", (PARENT.pid,))
    assert drains.back("00000002", tmp_path) == two


@pytest.mark.parametrize("end", [End.ABORTED, None])
def test_what_did_not_come_is_not(tmp_path: Path, end: End | None) -> None:
    moved(tmp_path, 1, "00000001", ME, end=end)
    moved(tmp_path, 2, "00000001", ME, role=Role.SOURCE)
    assert drains.here(tmp_path) == []
    with pytest.raises(NothingDrained):
        drains.back("00000001", tmp_path)


def test_another_process_of_the_same_number_is_not_meant(tmp_path: Path) -> None:
    moved(tmp_path, 1, "00000001", dataclasses.replace(ME, start_time=ME.start_time - 1), PARENT)
    (one,) = drains.here(tmp_path)
    assert one.roots == (PARENT.pid,)


@given(st.text(max_size=9))
def test_a_label_that_is_none_is_ignored(text: str) -> None:
    assert drains.told({drains.NOTE: text}) is None
    assert drains.told({}) is None
    assert drains.told({drains.NOTE: "0123abcd host-1.example"}) is not None
