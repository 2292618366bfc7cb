"""tcpmig with a clock on every function of ours: ``python stopwatch.py DIRECTORY ARGUMENTS...``.

Writes DIRECTORY/ROLE.PID.json at the end: ``[[begin, end, depth, name], ...]`` of all calls over 30 us that the main
thread made, in nanoseconds of CLOCK_REALTIME (the hosts' other clocks differ).  A wrapped call costs about a
microsecond, so the whole is slower by a fifth.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("checkpoint", "migrate", "tcpstate")
ROLES = {"migrate": "source", "receive": "target"}
LEAST = 30_000  # nanoseconds

Call = tuple[int, int, int, str]


class Stopwatch:
    """Notes the calls of wrapped functions."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._depth = 0
        self._thread = threading.get_ident()
        self._wrapped: dict[FunctionType, Callable[..., Any]] = {}

    def of(self, function: FunctionType) -> Callable[..., Any]:
        """The function with a clock; the same one each time."""
        if function not in self._wrapped:
            self._wrapped[function] = self._wrap(function)
        return self._wrapped[function]

    def _wrap(self, function: FunctionType) -> Callable[..., Any]:
        name = f"{function.__module__}.{function.__qualname__}"

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            self._depth += 1
            begin = time.clock_gettime_ns(time.CLOCK_REALTIME)
            try:
                return function(*args, **kwargs)
            finally:
                end = time.clock_gettime_ns(time.CLOCK_REALTIME)
                self._depth -= 1
                if end - begin >= LEAST:
                    self.calls.append((begin, end, self._depth, name))

        return timed

    def wrap_module(self, module: ModuleType) -> None:
        """All functions, methods and properties of a module, and what it has imported of ours."""
        for name, value in list(vars(module).items()):
            if _ours(value):
                setattr(module, name, self.of(value))
            elif isinstance(value, type) and value.__module__ == module.__name__:
                self._wrap_class(value)

    def _wrap_class(self, cls: type) -> None:
        for name, value in list(vars(cls).items()):
            if _ours(value) and name != "__init_subclass__":
                setattr(cls, name, self.of(value))
            elif isinstance(value, property) and _ours(value.fget):
                setattr(cls, name, property(self.of(value.fget), value.fset, value.fdel))


def _ours(value: object) -> bool:
    return (
        isinstance(value, FunctionType)
        and (value.__module__ or "").partition(".")[0] in ROOMS
        and not hasattr(value, "__wrapped__")
    )


def main() -> None:
    """Run tcpmig; the calls are written whatever becomes of it."""
    directory = Path(sys.argv.pop(1))
    sys.path.insert(0, str(ROOT))
    import cli.main

    role = next((ROLES[argument] for argument in sys.argv[1:] if argument in ROLES), "")
    watch = Stopwatch()
    if role:
        # a command's own are imported when it runs, and would not be wrapped then
        for name in ("incoming", "outgoing", "source", "target", "transport"):
            importlib.import_module(f"migrate.{name}")
        for name in [name for name in sys.modules if name.partition(".")[0] in ROOMS]:
            watch.wrap_module(sys.modules[name])
    try:
        cli.main.main()
    finally:
        if role:
            (directory / f"{role}.{os.getpid()}.json").write_text(json.dumps(watch.calls))


if __name__ == "__main__":
    main()
