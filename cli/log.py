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
from collections.abc import Callable
from pathlib import Path

__all__ = ["KEPT", "ROOMS", "close_logs", "log_directories", "open_log", "say_on"]

# log files that are kept: a few days of a busy host, at some kilobytes each
KEPT = 500
# the loggers that are ours; those of libraries stay as they are
ROOMS = ("tcpstate", "checkpoint", "migrate", "cli")

_FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s: %(message)s"
_STATE_DIR = "/var/lib/tcpmig"


class _Spoken(logging.Handler):
    """Passes records on to a function that speaks to the user."""

    def __init__(self, say: Callable[[str], None], level: int) -> None:
        super().__init__(level)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self._say(f"warning: {text}" if record.levelno >= logging.WARNING else text)


def log_directories() -> list[Path]:
    """Where a log may be written, in the order of trying."""
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return [Path(os.environ.get("TCPMIG_STATE_DIR") or _STATE_DIR) / "log", Path(home) / "tcpmig" / "log"]


def open_log(command: str) -> Path | None:
    """Begin the log of this run and return its path; None, with a word on stderr, where none can be written."""
    reasons = []
    for directory in log_directories():
        try:
            path, descriptor = _create(directory, command)
        except OSError as error:
            reasons.append(f"{directory}: {error.strerror}")
            continue
        handler = logging.StreamHandler(os.fdopen(descriptor, "w", buffering=1, encoding="utf-8", errors="replace"))
        formatter = logging.Formatter(_FORMAT, "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
        _attach(handler, logging.DEBUG)
        _prune(directory)
        return path
    print("tcpmig: no log is kept (" + "; ".join(reasons) + ")", file=sys.stderr)
    return None


def say_on(say: Callable[[str], None], level: int) -> None:
    """Let ``say(text)`` have every record of ours from ``level`` on."""
    _attach(_Spoken(say, level), level)


def close_logs() -> None:
    """Take back what :func:`open_log` and :func:`say_on` attached (a test runs many commands in one process)."""
    for room in ROOMS:
        logger = logging.getLogger(room)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
            if isinstance(handler, logging.StreamHandler):
                handler.stream.close()


def _attach(handler: logging.Handler, level: int) -> None:
    for room in ROOMS:
        logger = logging.getLogger(room)
        logger.addHandler(handler)
        logger.setLevel(min(level, logger.level or level))
        logger.propagate = False


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
