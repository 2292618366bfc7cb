"""A remote shell whose line breaks at a chosen message: ``tcpmig migrate --rsh "python .../cutline.py OPTIONS"``.

    cutline.py [--warm] --at WAY:NAME:COUNT --do cut|stall|hold [--after] --marker FILE HOST COMMAND...

WAY is ``source`` (messages of the source) or ``target``, NAME a message as it is on the wire or ``image``, COUNT which
one of them.  There, before the message is passed on or after it, the line is cut, stalls for ever, or holds until there
is a FILE.go.  FILE is made at that moment; a line that finds it made from the beginning passes everything on.  With
--warm the command is forked, as rsh.py says.
"""

from __future__ import annotations

import argparse
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgpack

RSH = Path(__file__).with_name("rsh.py")
PREAMBLE = 8
HEADER = struct.Struct("<B3sII")  # as in migrate/wire.py
MESSAGE = 1


class Line:
    """Both directions."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.way, self.name, count = given.at.split(":")
        self.left = int(count)
        self.do = given.do
        self.after = given.after
        self.marker = Path(given.marker)
        self.quiet = self.marker.exists()
        self.stalled = threading.Event()

    def pump(self, way: str, source: int, sink: int) -> None:
        """Pass on what comes, frame by frame."""
        try:
            self._write(sink, self._read(source, PREAMBLE))
            while True:
                header = self._read(source, HEADER.size)
                kind, _, length, _ = HEADER.unpack(header)
                body = self._read(source, length)
                here = self._is_here(way, kind, body)
                if here and not self.after:
                    self._act()
                self._write(sink, header + body)
                if here and self.after:
                    self._act()
        except (EOFError, BrokenPipeError):
            os.close(sink)

    def _is_here(self, way: str, kind: int, body: bytes) -> bool:
        if self.quiet or way != self.way:
            return False
        name = msgpack.unpackb(body, strict_map_key=False)["kind"] if kind == MESSAGE else "image"
        self.left -= name == self.name
        if self.left or name != self.name:
            return False
        self.quiet = True
        return True

    def _act(self) -> None:
        self.marker.touch()
        if self.do == "cut":
            os._exit(255)
        if self.do == "stall":
            self.stalled.set()
        while self.do == "hold" and not self.marker.with_suffix(".go").exists():
            time.sleep(0.005)

    def _read(self, fd: int, count: int) -> bytes:
        found = b""
        while len(found) < count:
            piece = os.read(fd, count - len(found))
            while self.stalled.is_set():
                time.sleep(0.1)
            if not piece:
                raise EOFError
            found += piece
        return found

    @staticmethod
    def _write(fd: int, data: bytes) -> None:
        while data:
            data = data[os.write(fd, data) :]


def main() -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--at", required=True)
    parser.add_argument("--do", required=True, choices=["cut", "stall", "hold"])
    parser.add_argument("--after", action="store_true")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--marker", required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    line = Line(given)
    rsh = [sys.executable, "-IS", str(RSH), *["--warm"] * given.warm]
    child = subprocess.Popen([*rsh, *given.command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    threading.Thread(target=line.pump, args=("source", 0, child.stdin.fileno()), daemon=True).start()
    line.pump("target", child.stdout.fileno(), 1)
    return child.wait()


if __name__ == "__main__":
    sys.exit(main())
