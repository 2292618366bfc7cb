"""Errors of the process engine, the image and the checks before the stop. See :mod:`tcpstate.errors` for the tree."""

from __future__ import annotations

from tcpstate.errors import Outcome, TcpmigError

__all__ = ["Refused"]


class Refused(TcpmigError):
    """The check before the stop found something that cannot be moved. Every such thing is named with its PID and
    descriptor or mapping; nothing was stopped or changed. ``tcpmig check PID`` lists all of them."""

    code = "TM-0300"
    outcome = Outcome.REFUSED
    fix = "See `tcpmig check PID` for all verdicts, and what to do about each."
