"""The rehearsal goes through to its end, leaves nothing, and stands in nobody's way."""

from __future__ import annotations

import gc
import logging
import os

import pytest

from checkpoint import procfs, rehearsal
from checkpoint.errors import SpawnFailed


def _ours() -> tuple[list[int], list[str], str, list[int]]:
    """What it could leave behind in this process: children, descriptors, a time namespace for children, signals."""
    us = os.getpid()
    gc.collect()  # what other tests have left to the collector is not to end in between
    links = sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in procfs.fds(us) if os.path.exists(f"/proc/self/fd/{fd}"))
    status = procfs.read_status(us)
    return procfs.children(us), links, os.readlink("/proc/self/ns/time_for_children"), [int(status["SigBlk"], 16)]


def test_it_goes_through_and_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    # who answers for Landlock, and the programs that read mappings, stay as long as we do, whoever asked first
    rehearsal.rehearse()
    before = _ours()
    with caplog.at_level(logging.DEBUG, logger="checkpoint"):
        for _ in range(3):
            rehearsal.rehearse()
    assert not [r for r in caplog.records if r.name == rehearsal.__name__], caplog.text
    assert _ours() == before


def test_a_failure_is_noted_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SpawnFailed("no more processes")

    rehearsal.rehearse()
    before = _ours()
    monkeypatch.setattr("checkpoint.state.table.build", fail)
    with caplog.at_level(logging.DEBUG, logger="checkpoint"):
        rehearsal.rehearse()
    assert "no more processes" in caplog.text
    assert _ours() == before
