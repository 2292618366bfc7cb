"""A process with open files captured, rebuilt and captured again: what must be the same."""

from __future__ import annotations

from typing import Any

from checkpoint.files.table import TreeFiles
from tcpstate.codec import to_plain
from tests.system.files_children import Outcome, capture, round_trip

#: what differs between a file and its copy: numbers of this boot, times that go on
VOLATILE = {"socket", "peer", "waits_at", "pipe", "pid", "left", "deadline", "inode", "mtime_ns", "file"}


def essence(value: Any) -> Any:
    """A record without what must differ."""
    if isinstance(value, dict):
        if value.get("events", 0) & 1 << 30 and not value["events"] & 0x7:
            # a one-shot entry that has fired, of a file that is not ready: it listens for errors again
            value = {**value, "events": 1 << 30}
        return {k: (v is not None if k in VOLATILE else essence(v)) for k, v in value.items()}
    if isinstance(value, list):
        # the kernel lists the entries of an epoll instance in the order of addresses
        return sorted((essence(v) for v in value), key=lambda v: v.get("number", 0) if isinstance(v, dict) else 0)
    return value


def by_descriptor(files: TreeFiles) -> dict[int, Any]:
    """What each descriptor of the one process leads to, and with whom it shares it."""
    ((_, table),) = files.tables.items()
    shared = {fd: sorted(f for f, (i, _) in table.items() if i == index) for fd, (index, _) in table.items()}
    return {fd: (essence(to_plain(files.files[index])), cloexec, shared[fd]) for fd, (index, cloexec) in table.items()}


def differences(was: Any, now: Any, path: str = "") -> list[str]:
    """Where two plain values differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = sorted({*was, *now}, key=str)
        return [d for k in keys for d in differences(was.get(k), now.get(k), f"{path}.{k}")]
    if isinstance(was, list | tuple) and isinstance(now, list | tuple) and len(was) == len(now):
        return [d for i, (a, b) in enumerate(zip(was, now, strict=True)) for d in differences(a, b, f"{path}[{i}]")]
    return [] if was == now else [f"{path}: {was!r} -> {now!r}"]


def captured(pid: int) -> TreeFiles:
    """The open files of one stopped process."""
    table, records = capture(pid)
    table.close()
    return records


def same(setup: str, check: str, **options: Any) -> Outcome:
    """A round trip after which everything reads as before."""
    outcome = round_trip(setup, check, **options)
    assert differences(by_descriptor(outcome.records), by_descriptor(outcome.again)) == []
    assert essence(to_plain(outcome.again.contents)) == essence(to_plain(outcome.records.contents))
    return outcome
