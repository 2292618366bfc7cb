"""A remote shell with a slow line: ``tcpmig migrate --rsh "python .../slowline.py RATE"``.

    slowline.py RATE HOST COMMAND...

No more than RATE bytes per second go to the command.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

RSH = Path(__file__).with_name("rsh.py")
PIECE = 16 << 10


def slowly(rate: float, source: int, sink: int) -> None:
    """Pass on what comes, until it ends."""
    due = time.monotonic()
    # both directions are one socket, which the command makes non-blocking
    while select.select([source], [], []) and (piece := os.read(source, PIECE)):
        due = max(due, time.monotonic()) + len(piece) / rate
        time.sleep(max(0.0, due - time.monotonic()))
        view = memoryview(piece)
        while view:
            view = view[os.write(sink, view) :]
    os.close(sink)


def main(rate: str, *rest: str) -> int:
    """The command's exit status."""
    with subprocess.Popen([sys.executable, "-IS", str(RSH), *rest], stdin=subprocess.PIPE) as shell:
        assert shell.stdin is not None
        pump = threading.Thread(target=slowly, args=(float(rate), 0, os.dup(shell.stdin.fileno())), daemon=True)
        shell.stdin.close()
        pump.start()
        return shell.wait()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
