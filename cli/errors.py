"""Errors of the command line itself, TM-0110 to TM-0199. See :mod:`tcpstate.errors` for the tree."""

from __future__ import annotations

from tcpstate.errors import Outcome, TcpmigError

__all__ = ["Interrupted", "PidFileNotWritten", "UnknownCode", "UsageMistake", "every_error"]


class UsageMistake(TcpmigError):
    """The command line could not be understood: an unknown command or option, an argument too many or too few, a value
    of the wrong form. Nothing was looked at, nothing was changed."""

    code = "TM-0110"
    outcome = Outcome.USAGE
    fix = "See `tcpmig --help` and `tcpmig COMMAND --help`."


class Interrupted(TcpmigError):
    """The command was ended by Ctrl-C, or by SIGTERM or SIGHUP, before it was done. What it had begun was undone: the
    processes run where they ran, frozen connections flow again."""

    code = "TM-0111"
    fix = "Run the command again when it suits."


class UnknownCode(TcpmigError):
    """There is no error with this code. A code is written ``TM-`` and four digits; it is the first word of an error
    message."""

    code = "TM-0112"
    outcome = Outcome.USAGE
    fix = "Copy the code from the message; `tcpmig explain` without a code lists all of them."


class PidFileNotWritten(TcpmigError):
    """The file of ``--pid-file`` could not be opened for writing: its directory does not exist, it is somebody else's,
    or the file system is read-only. Nothing was built."""

    code = "TM-0114"
    outcome = Outcome.REFUSED
    fix = "Name a file in a directory that exists and can be written."


def every_error() -> dict[str, type[TcpmigError]]:
    """All error classes of the project, by code: imports the ``errors`` module of each room first."""
    from importlib import import_module

    # the classes enter the catalogue as they are defined
    for room in ("checkpoint", "migrate"):
        import_module(f"{room}.errors")
    from tcpstate.errors import catalogue

    return catalogue()
