"""tcpmig, killed before one of the system calls that it makes in batches on sockets of its own: which, is counted.

python -m tests.workloads.killed_at WHEN NUMBER ARGUMENTS...

WHEN is ``freeze`` (and export of connections at the source), ``rebuild`` (at the target) or ``release``.  A number too
large kills nothing, and the count is written to standard error.
"""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

MOMENTS = {
    "freeze": ("checkpoint.files.tcp", "TcpGroup", "freeze"),
    "rebuild": ("checkpoint.files.tcp", "RebuiltTcp", "rebuild"),
    "release": ("checkpoint.files.tcp", "RebuiltTcp", "release"),
}


def main() -> None:
    """Run the command."""
    moment, number, sys.argv[1:] = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    # plain calls through the same table, one after the other
    os.environ["TCPMIG_NO_BATCH"] = "1"
    batch = importlib.import_module("tcpstate.kernel.batch")
    name, cls, method = MOMENTS[moment]
    owner = getattr(importlib.import_module(name), cls)
    armed = False
    made = 0
    call: Callable[..., int] = batch.syscall

    def counted(*arguments: int) -> int:
        nonlocal made
        if armed:
            made += 1
            if made == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)

    before = getattr(owner, method)

    def arming(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal armed
        armed = True
        return before(self, *arguments, **named)

    batch.syscall = counted  # type: ignore[attr-defined]
    setattr(owner, method, arming)
    atexit.register(lambda: print(f"batched calls: {made}", file=sys.stderr))
    from cli.main import main as tcpmig

    tcpmig()


if __name__ == "__main__":
    main()
