"""tcpmig that kills itself when it is about to call a certain function.

python -m tests.workloads.killed_in MODULE:CLASS.FUNCTION COMMAND...
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
from typing import Any, NoReturn

from cli.main import main


def die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL was survived")


if __name__ == "__main__":
    place, sys.argv = sys.argv[1], [sys.argv[0], *sys.argv[2:]]
    module, _, path = place.partition(":")
    *owner, name = path.split(".")
    setattr(functools.reduce(getattr, owner, importlib.import_module(module)), name, die)
    main()
