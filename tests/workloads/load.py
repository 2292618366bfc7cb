"""One client program in the client's host, steered by the harness."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from tests.hosts import CommandFailed, Host

__all__ = ["Load", "ask_all"]


class Load:
    """A running client; `ask` it before, after and between migrations.

    name     how reports call it
    wrongs   how many wrong, missing or cut-off replies it has reported; wrong: the texts of the first of them
    """

    def __init__(self, host: Host, name: str, module: str, *arguments: object) -> None:
        self.name = name
        self.wrongs = 0
        self.wrong: list[str] = []
        self._told = (0, 0)
        self._buffer = b""
        pipe = subprocess.PIPE
        argv = [sys.executable, "-m", f"tests.workloads.{module}", *arguments]
        given = {name: os.environ[name] for name in ("TMH_PATIENCE",) if name in os.environ}
        self._process = host.popen(argv, stdin=pipe, stdout=pipe, env=given)
        try:
            ready = self._answer(30)
            if not ready.get("ready"):
                raise CommandFailed(f"client {name} did not start: {ready}")
        except BaseException:
            self._process.close()
            raise

    def ask(self, step: str, timeout: float = 60) -> dict[str, Any]:
        """before, after, mark, replies (of each connection since the last mark) or finish; its answer. Raises
        CommandFailed if it does not answer."""
        self.tell(step)
        return self._answer(timeout)

    def tell(self, step: str) -> None:
        """Like `ask`, but the answer is taken by `answer`: so that all clients do the step at the same time."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{step}\n".encode())
        except BrokenPipeError:
            raise CommandFailed(f"client {self.name} ended with {self._process.wait(5)}") from None

    def answer(self, timeout: float = 60) -> dict[str, Any]:
        """The answer to the last `tell`."""
        return self._answer(timeout)

    def _answer(self, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        end = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            piece = self._process.stdout.read(1 << 16) if ready else b""
            if not piece:
                state = "does not answer" if not ready else f"ended with {self._process.wait(5)}"
                raise CommandFailed(f"client {self.name} {state}")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        self.wrongs = answer.pop("wrongs", self.wrongs)
        self.wrong = answer.pop("wrong", self.wrong)
        return answer

    def news(self) -> list[str]:
        """What it has complained about since the last call; of very many complaints only the first have a text."""
        wrongs, texts = self._told
        self._told = (self.wrongs, len(self.wrong))
        fresh = self.wrong[texts:]
        more = self.wrongs - wrongs - len(fresh)
        return fresh + ([f"{more} more"] if more else [])

    def close(self) -> None:
        """End it."""
        self._process.close()


def ask_all(loads: Sequence[Load], step: str, timeout: float = 60) -> dict[str, dict[str, Any]]:
    """The same step for all clients at once; name -> answer."""
    for load in loads:
        load.tell(step)
    return {load.name: load.answer(timeout) for load in loads}
