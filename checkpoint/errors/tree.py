"""Errors of the check before the stop, of trees of processes, their supervisors and their numbers."""

from __future__ import annotations

from tcpstate.errors import Outcome, TcpmigError

__all__ = [
    "BacklogNotDrained",
    "LocalPeer",
    "PidTaken",
    "RebuildDiffers",
    "Refused",
    "SupervisedElsewhere",
    "TreeChanged",
    "UnitMainProcess",
    "UnitRestarts",
    "UnsupportedSession",
    "UnsupportedSharing",
]


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


class UnsupportedSharing(Refused):
    """Processes share a table of descriptors, or their directories (clone with CLONE_FILES or CLONE_FS), that no order
    of births can give them again: what two processes share must come from a process that bore both, and not lead
    through a third one that shares others with somebody else. The parent between two of them may have ended."""

    code = "TM-0775"
    fix = "Move the tree that all of them belong to, or restart the named process under the one it shares with."


class BacklogNotDrained(TcpmigError):
    """Before the stop new connections are held off and the application is given a moment to accept those that wait on
    its listeners. It did not accept them in time. They would be lost, or be in a queue at the target while a process
    of this host has the other end. So the process was left running as it was."""

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


class LocalPeer(Refused):
    """The other end of a TCP connection is held by a process of this host that is not moved. It would be left behind,
    talking to nobody."""

    code = "TM-0383"
    fix = "Name the other process as well, or decide what the moved one shall see: --local-peer close or reset."


class UnitRestarts(Refused):
    """The process belongs to a systemd service with Restart=, and is its main process as far as can be told. When the
    original ends, systemd takes it for a crash and starts a second copy, on the same files and without the address."""

    code = "TM-0384"
    fix = (
        "Give --unit-hook CMD, a program that keeps systemd from it (see docs/guide/migrating.md), or take Restart= "
        "off: a drop-in with Restart=no and `systemctl daemon-reload`."
    )


class UnitMainProcess(Refused):
    """The process is the main process of a systemd service. When it ends, systemd takes the service for stopped: it
    runs ExecStopPost=, kills what is left in the service's cgroup, and stops what is bound to the service."""

    code = "TM-0385"
    fix = "Give --unit-hook CMD, a program that deals with the unit on this host (see docs/guide/migrating.md)."


class SupervisedElsewhere(Refused):
    """The parent of the process is a program that starts its children again when they end: supervisord, runit, s6, a
    container engine. When the original ends, it starts a second copy."""

    code = "TM-0386"
    fix = "Tell the supervisor to let go of the process first, or give --unit-hook CMD, a program that does."
