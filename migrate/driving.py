"""What both drivers use: errors to messages and back, signals that wait, failures that change nothing."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator

from checkpoint import urgency
from migrate.errors import from_remote
from migrate.messages import Failure
from migrate.wire import Channel
from tcpstate.errors import TcpmigError

__all__ = ["failure_of", "hurry", "logged", "remote_error", "signals_held"]

_log = logging.getLogger(__name__)

_HELD_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def failure_of(error: BaseException) -> Failure:
    """An error as the other side is told of it."""
    if isinstance(error, TcpmigError):
        return Failure(code=error.code, message=error.message, object=error.object, fix=error.fix)
    return Failure(code=TcpmigError.code, message=f"{type(error).__name__}: {error}")


def remote_error(failure: Failure, otherwise: type[TcpmigError], *, where: str = "target") -> TcpmigError:
    """The error that the other side told of."""
    return from_remote(failure.code, failure.message, failure.object, failure.fix, otherwise=otherwise, where=where)


def hurry(channel: Channel, on: bool) -> None:
    """The processes stand still, or will at once: the line's waits do not sleep, and nobody else comes first."""
    channel.hasty = on
    if on:
        urgency.begin()
    else:
        urgency.end()


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Signals that would interrupt wait until the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def logged(what: str) -> Iterator[None]:
    """An error in here is told and does not change the outcome."""
    try:
        yield
    except Exception as error:  # a defect too must not keep the rest from being done
        _log.warning("%s failed: %s", what, error, exc_info=not isinstance(error, TcpmigError | OSError))
