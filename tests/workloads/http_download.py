"""curl gets a big file, slowly; the gaps between its pieces are logged and its bytes are compared with the file.

    python -m tests.workloads.http_download --rate 20 --file PATH URL

The speed is limited by how fast curl's output is taken here, in small pieces: curl's own --limit-rate sleeps for up to
half a second at a time, in which a migration would pass unseen.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import selectors
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.workloads.control import Client, main

PIECE = 32 << 10  # bytes taken at once
PATIENCE = 120.0  # seconds that the download may take after `finish`


class HttpDownload(Client):
    """curl as a child, its output read here."""

    def __init__(self, url: str, file: Path, rate: float) -> None:
        super().__init__()
        self._url, self._file, self._rate = url, file, rate
        self._begun = 0.0
        self._reading = True
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._done = False
        self._gaps = self.new_gaps()

    def start(self) -> None:
        """Start curl and wait for the first bytes."""
        command = ["curl", "--silent", "--show-error", "--fail", "--no-buffer", self._url]
        self._curl = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self._curl.stdout is not None
        self._pipe = self._curl.stdout.fileno()
        self._begun = time.monotonic()
        self.watch(self._pipe, selectors.EVENT_READ, self._readable)
        self.spin(time.monotonic() + 10, lambda: self._bytes > 0)

    def tick(self, now: float) -> float:
        """Take no more than the rate allows."""
        ahead = self._bytes / self._rate - (now - self._begun)
        reading = ahead <= 0 and not self._done
        if reading != self._reading and not self._done:
            if reading:
                self.watch(self._pipe, selectors.EVENT_READ, self._readable)
            else:
                self.selector.unregister(self._pipe)
            self._reading = reading
        return now + max(ahead, 0.0) if not self._done else now + 1

    def _readable(self, _: int) -> None:
        data = os.read(self._pipe, PIECE)
        if data:
            self._gaps.reply()
            self._bytes += len(data)
            self._hash.update(data)
        else:
            self._done = True
            self.selector.unregister(self._pipe)

    def mark(self) -> dict[str, Any]:
        """Also: bytes so far, and whether the whole file is there."""
        return {**super().mark(), "bytes": self._bytes, "done": self._done}

    def finish(self) -> dict[str, Any]:
        """Wait for the end, compare."""
        if not self.spin(time.monotonic() + PATIENCE, lambda: self._done):
            self._curl.kill()
            self.blame(f"the download stands at byte {self._bytes}")
        assert self._curl.stderr is not None
        said = self._curl.stderr.read().decode(errors="replace").strip()
        if self._curl.wait():
            self.blame(f"curl ended with {self._curl.returncode}: {said}")
        with self._file.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self._hash.hexdigest():
            self.blame(f"sha256 of what curl got is {self._hash.hexdigest()}, of the file {digest}")
        return {"sha256": digest}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=20.0, help="MB/s")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("url")
    given = parser.parse_args()
    main(HttpDownload(given.url, given.file, given.rate * 1e6))
