"""``rsh.py FILE HOST COMMAND...``: a remote shell into the guest that FILE describes, as ssh is one.

The words of the command are joined by blanks and split by the guest's shell.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.guest import agent
from tests.guest.guest import begin


def main() -> int:
    where, _, *words = sys.argv[1:]
    sock = begin(json.loads(Path(where).read_text()), ["/bin/sh", "-c", " ".join(words)], "/root", {})

    def feed() -> None:
        while data := os.read(0, agent.CHUNK):
            agent.send(sock, agent.IN, data)
        agent.send(sock, agent.IN, b"")

    threading.Thread(target=feed, daemon=True).start()
    while (frame := agent.receive(sock)) is not None:
        kind, data = frame
        if kind == agent.STATUS:
            status = int(data)
            return status if status >= 0 else 128 - status
        stream = sys.stdout.buffer if kind == agent.OUT else sys.stderr.buffer
        stream.write(data)
        stream.flush()
    print("the guest has gone", file=sys.stderr)
    return 255


if __name__ == "__main__":
    sys.exit(main())
