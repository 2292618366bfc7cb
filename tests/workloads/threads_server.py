"""An echo server with threads beside it: some that sleep, some that come and go all the time.

python -m tests.workloads.threads_server SLEEPING CHURNING PORT ADDRESS...

SLEEPING wait for ever.  CHURNING make another thread each, which sleeps for a few milliseconds, and join it, again and
again; their names are "churn", their number, and how often they have.
"""

from __future__ import annotations

import itertools
import random
import sys
import threading
import time

from tests.workloads.echo_server import EchoServer

STACK = 256 << 10


def churn(seed: int) -> None:
    """For ever."""
    chance = random.Random(seed)
    for count in itertools.count():
        with open("/proc/thread-self/comm", "w", encoding="ascii") as name:
            name.write(f"churn {seed} {count}")
        child = threading.Thread(target=time.sleep, args=(chance.random() * 5e-3,))
        child.start()
        child.join()


def main() -> None:
    """Serve."""
    sleeping, churning, port = map(int, sys.argv[1:4])
    threading.stack_size(STACK)
    never = threading.Event()
    for _ in range(sleeping):
        threading.Thread(target=never.wait, daemon=True).start()
    for seed in range(churning):
        threading.Thread(target=churn, args=(seed,), daemon=True).start()
    EchoServer(port, sys.argv[4:]).serve()


if __name__ == "__main__":
    main()
