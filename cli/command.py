"""What all commands have in common: ``--json``, ``-v``, the log, and what becomes of an error."""

from __future__ import annotations

import functools
import logging
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from cli.errors import Interrupted
from cli.log import SayHandler, attached, file_handler
from cli.session import Result, Session

__all__ = ["command", "signals_interrupt", "spoken"]

_log = logging.getLogger("cli")


def command(
    name: str, *, json: bool = True, logged: bool = True
) -> Callable[[Callable[..., Result | None]], click.Command]:
    """Make a command of ``function(session, **arguments) -> Result | None``; its docstring is the help text.

    json    the command has ``--json``
    logged  the run leaves a log

    The function raises :class:`tcpstate.errors.TcpmigError` for whatever went wrong; anything else that gets out of it
    is told as TM-0100, with the path of the log.
    """

    def decorate(function: Callable[..., Result | None]) -> click.Command:
        # wraps() hands over what click's decorators have written on the function: its arguments and options
        @functools.wraps(function)
        def run(verbose: bool, json: bool = False, **arguments: Any) -> int:
            session = click.get_current_context().find_object(Session) or Session()
            session.json, session.verbose = json, verbose
            return _run(function, session, name if logged else "", arguments)

        wrapped: Callable[..., int] = run
        if json:
            wrapped = click.option("--json", is_flag=True, help="One JSON object on stdout, also on failure.")(wrapped)
        wrapped = click.option("-v", "--verbose", is_flag=True, help="More detail on stderr.")(wrapped)
        return click.command(name)(wrapped)

    return decorate


def _run(function: Callable[..., Result | None], session: Session, log_name: str, arguments: dict[str, Any]) -> int:
    try:
        with signals_interrupt(), spoken(session, log_name):
            try:
                result = function(session, **arguments)
                return session.emit(result) if result is not None else 0
            except (click.exceptions.Exit, click.ClickException):
                raise
            except KeyboardInterrupt as stop:
                # One that passed through an exec() of text, as a dataclass is made by, counts as unhandled until the
                # next: `python -m` would end by SIGINT whatever we return (run_eval_code_obj, Python/pythonrun.c).
                exec("")
                return _failed(session, Interrupted(f"ended by {stop}" if stop.args else "ended by Ctrl-C"))
            except Exception as error:  # the one place that turns whatever happens into an exit status
                return _failed(session, error)
    except KeyboardInterrupt:
        # a second one, while the first was being told
        return int(Interrupted.outcome)


def _failed(session: Session, error: Exception) -> int:
    _log.debug("failed", exc_info=error)
    return session.fail(error)


@contextmanager
def spoken(session: Session, log_name: str) -> Iterator[None]:
    """What the rooms log goes to the user and, with ``log_name``, into the log of this run."""
    # With --json the caller is a program: it gets the object, and warnings on stderr.
    level = logging.DEBUG if session.verbose else logging.WARNING if session.json else logging.INFO
    handlers: list[logging.Handler] = [SayHandler(session.say, level)]
    if log_name and (opened := file_handler(log_name)):
        handlers.append(opened[0])
        session.log_path = opened[1]
    with attached(handlers):
        _log.debug("command line: %s", shlex.join(sys.argv))
        yield


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does: by an exception, so that what was begun is undone."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        # who ignores SIGHUP (nohup) goes on ignoring it
        if signal.getsignal(number) is signal.SIG_DFL:
            before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
