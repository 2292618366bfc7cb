"""The log that every run of a command leaves behind, whatever becomes of the command.

One file per run, ``TCPMIG_STATE_DIR/log/TIME-COMMAND-PID.log``, mode 0600 in a directory of mode 0700; for a user who
may not write there, ``$XDG_STATE_HOME/tcpmig/log``. It holds what the rooms log (names and numbers: never the bytes of
a connection or of a process's memory) and, if something broke, the traceback. The newest :data:`KEPT` files are kept.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["KEPT", "ROOMS", "SayHandler", "attached", "file_handler", "log_directories"]

# log files that are kept: a few days of a busy host, at some kilobytes each
KEPT = 500
# the loggers that are ours; those of libraries stay as they are
ROOMS = ("tcpstate", "checkpoint", "migrate", "cli")

_FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s: %(message)s"
_STATE_DIR = "/var/lib/tcpmig"


class SayHandler(logging.Handler):
    """Passes records on to a function that speaks to the user."""

    def __init__(self, say: Callable[[str], None], level: int) -> None:
        super().__init__(level)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Say one record; a warning says that it is one."""
        text = record.getMessage()
        self._say(f"warning: {text}" if record.levelno >= logging.WARNING else text)


def log_directories() -> list[Path]:
    """Where a log may be written, in the order of trying."""
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return [Path(os.environ.get("TCPMIG_STATE_DIR") or _STATE_DIR) / "log", Path(home) / "tcpmig" / "log"]


def file_handler(command: str) -> tuple[logging.Handler, Path] | None:
    """Begin the log of this run: its handler and its path; None, with a word on stderr, where none can be written."""
    reasons = []
    for directory in log_directories():
        try:
            path, descriptor = _create(directory, command)
        except OSError as error:
            reasons.append(f"{directory}: {error.strerror}")
            continue
        handler = logging.FileHandler(path, encoding="utf-8", errors="replace", delay=True)
        handler.setStream(os.fdopen(descriptor, "w", buffering=1, encoding="utf-8", errors="replace"))
        formatter = logging.Formatter(_FORMAT, "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
        handler.setLevel(logging.DEBUG)
        _prune(directory)
        return handler, path
    print("tcpmig: no log is kept (" + "; ".join(reasons) + ")", file=sys.stderr)
    return None


@contextmanager
def attached(handlers: Sequence[logging.Handler]) -> Iterator[None]:
    """The handlers have every record of ours of their level; afterwards they are closed and the loggers as before."""
    loggers = [logging.getLogger(room) for room in ROOMS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        # nobody above has asked for our records: warnings would be printed twice
        logger.propagate = False
        logger.setLevel(min((handler.level for handler in handlers), default=logging.WARNING))
        for handler in handlers:
            logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            for handler in handlers:
                logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
        for handler in handlers:
            handler.close()


def _create(directory: Path, command: str) -> tuple[Path, int]:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    path = directory / f"{stamp}-{command}-{os.getpid()}.log"
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    return path, os.open(path, flags, 0o600)


def _prune(directory: Path) -> None:
    # names begin with the time: their order is that of age
    for old in sorted(directory.glob("*.log"))[:-KEPT]:
        old.unlink(missing_ok=True)
