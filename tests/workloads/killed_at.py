"""tcpmig, killed before one of the many small steps of a part of its work: which, is counted.

python -m tests.workloads.killed_at WHEN NUMBER FILE ARGUMENTS...

What is counted, and from which function on, :data:`MOMENTS` says for each WHEN.  A number too large (or 0) kills
nothing, and how many steps there were is written to the file.
"""

from __future__ import annotations

import enum
import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["MOMENTS", "Step"]


class Step(enum.Enum):
    """What is counted."""

    CALL = "a system call of a batch on sockets of ours"
    ENTRY = "an entry of a table that runs inside the process that is moved, or rebuilt"
    START = "a thread is about to be sent into code of ours, or just was"
    PYTHON = "a call of any function, written in Python or C"


#: what is counted, and from the first call of which function on
MOMENTS = {
    "freeze": (Step.CALL, "checkpoint.files.tcp:TcpGroup.freeze"),
    "thaw": (Step.CALL, "checkpoint.files.tcp:TcpGroup.thaw"),
    "rebuild": (Step.CALL, "checkpoint.files.rebuilttcp:RebuiltTcp.rebuild"),
    "release": (Step.CALL, "checkpoint.files.rebuilttcp:RebuiltTcp.release"),
    "settle": (Step.CALL, "migrate.recover:_settle"),
    "inject": (Step.ENTRY, ""),
    "start": (Step.START, ""),
    "recover": (Step.PYTHON, "migrate.recover:_settle"),
}


class Counter:
    """Counts, and kills this process before the step of the number."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.made = 0
        self.armed = False

    def step(self) -> None:
        """One step is about to be made."""
        if self.armed:
            self.made += 1
            if self.made == self.number:
                os.kill(os.getpid(), signal.SIGKILL)

    def count_calls(self) -> None:
        """Plain calls walk the tables, one after the other."""
        os.environ["TCPMIG_NO_BATCH"] = "1"
        batch = importlib.import_module("tcpstate.kernel.batch")
        call: Callable[..., int] = batch.syscall

        def counted(*arguments: int) -> int:
            self.step()
            return call(*arguments)

        batch.syscall = counted  # type: ignore[attr-defined]

    def count_entries(self) -> None:
        """The process that runs the table kills us, at that entry of it."""
        inject = importlib.import_module("checkpoint.inject")
        run = inject.Injection.run

        @functools.wraps(run)
        def counted(injection: Any, tables: Mapping[int, Any], **named: Any) -> None:
            for table in tables.values():
                if self.armed and 0 < self.number - self.made <= len(table):
                    _insert_kill(table, self.number - self.made - 1)
                self.made += len(table) if self.armed else 0
            run(injection, tables, **named)

        inject.Injection.run = counted

    def count_starts(self) -> None:
        """All that is injected begins so: single calls, and tables."""
        excursions = importlib.import_module("checkpoint.excursion").Excursions
        start = excursions.start

        @functools.wraps(start)
        def counted(*arguments: Any) -> None:
            self.step()
            start(*arguments)
            self.step()

        excursions.start = counted

    def count_python(self) -> None:
        """Calls of functions from the moment on at which this is called."""

        def event(_: FrameType, kind: str, __: object) -> None:
            if kind in ("call", "c_call"):
                self.step()

        sys.setprofile(event)

    def arm_at(self, place: str, begin: Callable[[], None]) -> None:
        """Count from the first call of a function on."""
        module, _, path = place.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        before = getattr(owner, name)

        def arming(*arguments: Any, **named: Any) -> Any:
            if not self.armed:
                self.armed = True
                begin()
            return before(*arguments, **named)

        setattr(owner, name, arming)


def _insert_kill(table: Any, index: int) -> None:
    """A call that kills us, before the given one of a table; the process that runs it has our PID namespace."""
    result = importlib.import_module("tcpstate.kernel.calls").Result
    kill = int(importlib.import_module("tcpstate.kernel.machine").SYS.kill)

    def moved(argument: Any) -> Any:
        later = isinstance(argument, result) and argument.index >= index
        return argument._replace(index=argument.index + 1) if later else argument

    table._calls[:] = [(nr, tuple(map(moved, args)), out, flags) for nr, args, out, flags in table._calls]
    table._undo[:] = [(nr, tuple(map(moved, args))) for nr, args in table._undo]
    table._calls.insert(index, (kill, (os.getpid(), signal.SIGKILL), None, 1))
    table._labels.insert(index, "killing tcpmig")


def main() -> None:
    """Run the command."""
    moment, number, file, sys.argv[1:] = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    counter = Counter(number)
    what, place = MOMENTS[moment]
    begin: Callable[[], None] = lambda: None  # noqa: E731
    match what:
        case Step.CALL:
            counter.count_calls()
        case Step.ENTRY:
            counter.count_entries()
        case Step.START:
            counter.count_starts()
        case Step.PYTHON:
            begin = counter.count_python
    if place:
        counter.arm_at(place, begin)
    else:
        counter.armed = True
    from cli.main import main as tcpmig

    try:
        tcpmig()
    finally:
        sys.setprofile(None)
        file.write_text(str(counter.made))


if __name__ == "__main__":
    main()
