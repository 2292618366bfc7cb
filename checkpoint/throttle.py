"""Slowing processes down: they stand still for part of the time, a few milliseconds at a go.

By ptrace, as in every stop: no signal is lost, none is late by more than one go, nobody sees it (a parent hears of
SIGSTOP, a SIGCONT is caught), and should we die the kernel lets them run on at once; a group that the cgroup freezer or
cpu.max holds would stay held.  A thread of ours does it, for ptrace binds a tracee to the thread that seized it: so it
must not be at work when anything else of ours stops the processes (:meth:`Throttle.paused`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Final

from checkpoint import waiting
from checkpoint.kernel.callwatch import CallWatch
from checkpoint.tracee import Tree
from tcpstate.errors import TcpmigError

__all__ = ["Throttle"]

_log = logging.getLogger(__name__)

#: seconds of one turn: once running, once standing still
_TURN: Final = 0.02


class Throttle:
    """See the module's docstring. ``roots``: PIDs of the trees' roots. It begins with :meth:`set`."""

    def __init__(self, roots: Sequence[int]) -> None:
        self._roots = tuple(roots)
        self._share = 1.0
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._stopping = threading.Lock()
        self._watch = CallWatch(stays=True)
        #: seconds that they have stood still
        self.stood = 0.0

    def set(self, share: float) -> None:
        """Let them run only so much of the time, between 0 and 1."""
        self._share = min(1.0, max(0.0, share))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="throttle", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """They run freely again. May be repeated."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self._watch.end()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block the processes are left alone: something else may stop them."""
        with self._stopping:
            yield

    def _run(self) -> None:
        try:
            while not self._over.wait(_TURN * self._share):
                with self._stopping:
                    if not self._over.is_set():
                        self._stand_still(_TURN * (1 - self._share))
        except TcpmigError as error:
            # that they cannot be stopped comes out in the stop itself
            _log.warning("they are slowed down no longer: %s", error)

    def _stand_still(self, seconds: float) -> None:
        began = time.monotonic()
        waiting.look_at(self._roots, self._watch)
        tree = Tree.stop(self._roots, watch=self._watch)
        try:
            self._over.wait(max(0.0, seconds - (time.monotonic() - began)))
        finally:
            tree.resume()
            self.stood += time.monotonic() - began
