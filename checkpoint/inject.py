"""System calls made inside a stopped process. (First version: the interface.)"""

from __future__ import annotations

from collections.abc import Mapping

from checkpoint.tracee import Process
from tcpstate.kernel.calls import CallTable

__all__ = ["Injection", "clean", "leftovers"]


class Injection:
    """`open()`, `run({tid: table}, ...)`, `close()`; a context manager does the first and the last.

    A table's `undo` calls (CallTable.undo) are made by the process itself if the tool dies.
    """

    def __init__(self, process: Process, *, accept_seccomp_risk: bool = False) -> None: ...
    def open(self) -> None: ...
    def run(self, tables: Mapping[int, CallTable], *, timeout: float = 60.0) -> None: ...
    def close(self) -> None: ...
    @property
    def ranges(self) -> list[tuple[int, int]]: ...  # (start, end) of memory that is ours


def leftovers(pid: int) -> object: ...
def clean(process: Process) -> None: ...
