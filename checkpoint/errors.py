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


class UnsupportedSession(Refused):
    """A process belongs to a session or process group whose leader is alive but is neither its ancestor nor a
    sibling, so that no order of births can put it there again."""

    code = "TM-0380"
    fix = "Move the session leader's tree together with it, or restart the named process under its leader."


class BacklogNotDrained(TcpmigError):
    """Before the stop new connections are held off and the application is given a moment to accept those that wait on
    its listeners. It did not accept them in time. They would be lost, so the process was left running as it was."""

    code = "TM-0590"
    fix = "Try again when the application accepts connections promptly."


class TreeChanged(TcpmigError):
    """Between the check and the stop the process opened, mapped or became something that cannot be moved, or changed
    so fast that no consistent picture could be taken. It was left running as it was."""

    code = "TM-0591"
    fix = "Try again; if the same object is named again, see `tcpmig check PID`."


class RebuildDiffers(TcpmigError):
    """A rebuilt connection was read back before the commit and is not what was sent. The target's copy was discarded
    and the original goes on."""

    code = "TM-0592"
    fix = "Report it with the log: it names the item, the value sent and the value found."


class PidTaken(TcpmigError):
    """A process of the image needs its PID, and the number is in use here, as a process, a process group or a
    session."""

    code = "TM-0381"
    outcome = Outcome.REFUSED
    fix = "End the process that has the number, or restore in another PID namespace."


class ImageIncomplete(TcpmigError):
    """The image or the stream ended, or went on, without a record that is needed at that point."""

    code = "TM-0382"
    outcome = Outcome.REFUSED
    fix = "Make the image again."
