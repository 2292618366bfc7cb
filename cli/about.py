"""What a person wants to know of a process: whose it is, what it runs, how large and how old it is."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from cli.session import Table

__all__ = ["about", "table"]

_ATTRIBUTES = ["pid", "name", "cmdline", "username", "memory_info", "num_threads", "create_time"]
_COMMAND_WIDTH = 60
_MIB = 1 << 20
_UNITS = (("d", 86400), ("h", 3600), ("m", 60))


def about(pids: Iterable[int]) -> list[dict[str, Any]]:
    """The processes among ``pids`` that are there, as fields of a result; None where the kernel does not tell us.

    memory is what is resident, in bytes; age in seconds.
    """
    import psutil

    found = []
    for pid in sorted(set(pids)):
        try:
            told = psutil.Process(pid).as_dict(_ATTRIBUTES)
        except psutil.NoSuchProcess:
            # it ended: whoever asked for it by name is told so by what he asked for
            continue
        memory, born = told["memory_info"], told["create_time"]
        found.append(
            {
                "pid": pid,
                "name": told["name"],
                "command": told["cmdline"],
                "user": told["username"],
                "memory": None if memory is None else memory.rss,
                "threads": told["num_threads"],
                "age": None if born is None else max(0.0, time.time() - born),
            }
        )
    return found


def table(processes: Iterable[dict[str, Any]]) -> Table:
    """What :func:`about` found, a line each, for a person."""
    rows = [
        [
            str(each["pid"]),
            each["name"] or "-",
            each["user"] or "-",
            "-" if each["memory"] is None else f"{each['memory'] / _MIB:.1f}",
            str(each["threads"] or "-"),
            "-" if each["age"] is None else _age(each["age"]),
            _shortened(" ".join(each["command"] or ())),
        ]
        for each in processes
    ]
    return Table(columns=["pid", "name", "user", "MiB", "threads", "age", "command"], rows=rows)


def _age(seconds: float) -> str:
    return next((f"{seconds / size:.0f}{unit}" for unit, size in _UNITS if seconds >= size), f"{seconds:.0f}s")


def _shortened(command: str) -> str:
    # a process may write anything there, and it goes to a terminal
    plain = "".join(c if c.isprintable() else "?" for c in command)
    return plain if len(plain) <= _COMMAND_WIDTH else plain[: _COMMAND_WIDTH - 1] + "…"
