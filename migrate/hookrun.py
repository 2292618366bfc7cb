"""One call of a program of the user's: started, waited for, killed when its time is up.

The program inherits nothing of ours but the environment; what it is told is on its standard input, what it says is
kept for the log.
"""

from __future__ import annotations

import enum
import logging
import os
import select
import shlex
import signal
import time
from collections.abc import Mapping
from typing import Final

__all__ = ["HookCall", "words_of"]

_log = logging.getLogger(__name__)

_KEPT_OUTPUT: Final = 16 << 10
_NOT_FOUND: Final = 127


def words_of(command: str, option: str) -> list[str]:
    """``command`` split as a shell would; no shell runs it. ValueError, with ``option`` named, if it cannot be split or
    is empty."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"{option} cannot be split into words: {error}") from error
    if not words:
        raise ValueError(f"{option} is empty")
    return words


class HookCall:
    """The program runs from here on. Call :meth:`over` until it is True, then :meth:`failure`.

    name   what it is called in the log
    point  why it is called
    told   its standard input
    limit  seconds that it may take
    """

    def __init__(
        self,
        name: str,
        point: enum.Enum,
        words: list[str],
        environment: Mapping[str, str],
        told: bytes,
        limit: float,
    ) -> None:
        self._name, self._point, self._limit = name, point, limit
        self._failure: str | None = None
        self._said = os.memfd_create("tcpmig-hook-output", os.MFD_CLOEXEC)
        self._deadline = time.monotonic() + limit
        self._pid = self._pidfd = -1
        asked = os.memfd_create("tcpmig-hook", os.MFD_CLOEXEC)
        try:
            os.write(asked, told)
            os.lseek(asked, 0, os.SEEK_SET)
            self._start(words, environment, asked)
        finally:
            os.close(asked)

    def _start(self, words: list[str], environment: Mapping[str, str], asked: int) -> None:
        moves = [(os.POSIX_SPAWN_DUP2, end, number) for number, end in ((0, asked), (1, self._said), (2, self._said))]
        try:
            # posix_spawn: threads may be running here, and signals may be held back, which a child would inherit
            self._pid = os.posix_spawnp(
                words[0],
                words,
                os.environ | environment,
                file_actions=moves,
                setsid=True,
                setsigmask=[],
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT],
            )
        except OSError as error:
            self._failure = f"cannot be started ({error.strerror})"
            return
        self._pidfd = os.pidfd_open(self._pid)

    def over(self, timeout: float | None = None) -> bool:
        """Whether it has ended within ``timeout`` seconds, of its own accord or because its time was up; None: wait
        for that."""
        if self._failure is not None:
            return True
        left = max(0.0, self._deadline - time.monotonic())
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if poll.poll(1000 * (left if timeout is None else min(timeout, left))):
            self._failure = self._ended(killed=False)
        elif time.monotonic() >= self._deadline:
            self._failure = self._kill()
        return self._failure is not None

    def _kill(self) -> str:
        try:
            # with all that it has started, unless that has a session of its own
            os.killpg(self._pid, signal.SIGKILL)
        except PermissionError:
            os.close(self._pidfd)
            return f"took longer than {self._limit:g} seconds and, having changed its user, cannot be killed"
        return self._ended(killed=True)

    def _ended(self, *, killed: bool) -> str:
        os.close(self._pidfd)
        _, status = os.waitpid(self._pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if killed:
            return f"took longer than {self._limit:g} seconds and was killed"
        if code == _NOT_FOUND:
            return "cannot be started, or something in it (status 127)"
        return "" if code == 0 else f"failed ({_in_words(code)})"

    def failure(self) -> str:
        """What went wrong, in words, or nothing; once, when it is over. Waits for it if need be."""
        self.over()
        size = os.fstat(self._said).st_size
        text = os.pread(self._said, _KEPT_OUTPUT, max(0, size - _KEPT_OUTPUT)).decode(errors="replace")
        os.close(self._said)
        lines = [line for line in text.splitlines() if line.strip()]
        for line in lines:
            _log.debug("%s, %s: %s", self._name, self._point.value, line)
        if not self._failure:
            _log.info("%s: %s done", self._name, self._point.value)
            return ""
        last = f"; it said: {lines[-1].strip()}" if lines else ""
        return f"the {self._name} {self._failure} at {self._point.value}{last}"


def _in_words(code: int) -> str:
    """An exit code of Python's, in words."""
    return f"status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
