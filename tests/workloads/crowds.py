"""Programs of `tests.workloads.crowd`, started in the clients' host and told the same."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

from tests.hosts import Host, HostProcess
from tests.workloads.crowd import LARGE, SMALL

__all__ = ["Crowds"]

PIPE = subprocess.PIPE


class Crowds:
    """Several of them, each with as many connections."""

    def __init__(self, host: Host, ends: ExitStack, each: int) -> None:
        self._host = host
        self._ends = ends
        self._each = each
        self._crowds: list[HostProcess] = []

    def add(self, address: str, port: int) -> None:
        """One more, to this server; ``ends`` ends it."""
        argv = [sys.executable, "-m", "tests.workloads.crowd", address, port, self._each, len(self._crowds)]
        self._crowds.append(self._ends.enter_context(self._host.popen(argv, stdin=PIPE, stdout=PIPE)))

    def hear(self) -> list[dict[str, Any]]:
        """What each answers; the first answer comes when all its connections have been served."""
        found = []
        for crowd in self._crowds:
            assert crowd.stdout is not None
            line = crowd.stdout.readline()
            assert line, "a crowd has ended: what it met is in its traceback"
            found.append(json.loads(line))
        return found

    def ask(self, word: str) -> list[dict[str, Any]]:
        """Say a word of `tests.workloads.crowd` to each."""
        for crowd in self._crowds:
            assert crowd.stdin is not None
            crowd.stdin.write(word.encode() + b"\n")
            crowd.stdin.flush()
        return self.hear()

    def checked(self) -> list[dict[str, Any]]:
        """At the end of a test, once: all is compared, and it was as much as there is."""
        found = self.ask("check")
        # each asked twice, those that do not read for more than they take; the others spoke meanwhile
        fixed = SMALL * 2 * self._each + LARGE * (self._each // 3)
        assert [one["bytes"] for one in found] == [fixed + SMALL * one["spoken"] for one in found]
        return found
