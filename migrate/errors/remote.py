"""Errors that were told by the other host, and what they are here."""

from __future__ import annotations

from tcpstate.errors import Outcome, TcpmigError, catalogue

__all__ = ["from_remote", "refused", "undone"]


def from_remote(
    code: str, message: str, object: str, fix: str, *, otherwise: type[TcpmigError], where: str = "target"
) -> TcpmigError:
    """The error that the other host reported, under its own code where this program knows it, else as ``otherwise``."""
    cls = catalogue().get(code, otherwise)
    # past the subclass's own constructor, whose arguments are not known here
    error = cls.__new__(cls)
    TcpmigError.__init__(error, f"{where}: {message}" if where else message, object=object, fix=fix or None)
    return error


def undone(error: TcpmigError) -> TcpmigError:
    """The same error, ending the command as a failure: what it refused was found after the stop, and is undone."""
    if error.outcome in (Outcome.REFUSED, Outcome.USAGE):
        # of this one error, not of its class
        error.__dict__["outcome"] = Outcome.FAILED
    return error


def refused(error: TcpmigError) -> TcpmigError:
    """The same error, ending the command as a refusal: what failed was only tried, and nothing was stopped or built."""
    if error.outcome is Outcome.FAILED:
        error.__dict__["outcome"] = Outcome.REFUSED
    return error
