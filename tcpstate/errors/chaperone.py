"""Errors of the chaperone and of what it permits."""

from __future__ import annotations

from tcpstate.errors.tree import Outcome, TcpmigError

__all__ = [
    "BadChaperoneMessage",
    "ChaperoneLimit",
    "ChaperoneRuns",
    "ChaperoneUnreachable",
    "ForbiddenEndpoint",
    "ForbiddenState",
    "NoSuchUser",
    "NotYours",
    "OwnerRuns",
]


class BadChaperoneMessage(TcpmigError):
    """What came over the chaperone's socket is not its protocol: a frame that is too long, a message that does not
    decode, a request before the greeting, a descriptor that belongs to no request. The connection to the chaperone was
    closed; connections that its client had frozen flow again."""

    code = "TM-0260"
    outcome = Outcome.REFUSED
    fix = "Use tcpstate.chaperone.client of the same version as the chaperone."


class NotYours(TcpmigError):
    """The connection belongs to another user. The chaperone does for a process what it might do with its own
    connections only: the user of the process at the other end of its socket must be the owner of the connection's
    socket (the user who made it), and hold it in a process of its own. Nothing was changed."""

    code = "TM-0261"
    outcome = Outcome.REFUSED
    fix = "Ask as the user who owns the connection, or as root with `tcpmig` itself."


class ChaperoneLimit(TcpmigError):
    """A limit that the chaperone keeps for each user was reached: requests per second, bytes of a request or of an
    answer, connections frozen at a time, clients at a time. Nothing was changed."""

    code = "TM-0262"
    outcome = Outcome.REFUSED
    fix = "Ask later, resume what is frozen, or let the operator raise the limit (see `tcpmig chaperone --help`)."


class ForbiddenEndpoint(TcpmigError):
    """The record's own end is an address or a port that its caller may not use: the address is not configured on this
    host and not allowed by the chaperone's policy, the port is privileged, or another user has a socket on it. Nothing
    was built."""

    code = "TM-0263"
    outcome = Outcome.REFUSED
    fix = "Let the operator allow it (`tcpmig chaperone --address`, `--low-port`), or rebuild elsewhere."


class ForbiddenState(TcpmigError):
    """The record holds what its caller might not set on a socket of its own: an option that takes a capability (mark,
    priority above 6, extension headers, ..), a buffer beyond this host's limits, a window that the connection cannot
    have. Only root may. Nothing was built."""

    code = "TM-0264"
    outcome = Outcome.REFUSED
    fix = "Let the application give the option up before the export, or let root rebuild the connection."


class OwnerRuns(TcpmigError):
    """A connection is to be exported by its conn-ID, and the process that has it open runs. Its next system call on the
    socket would fail, and what it read or wrote meanwhile would be in two places. Nothing was changed."""

    code = "TM-0265"
    outcome = Outcome.REFUSED
    fix = "Stop that process (SIGSTOP) and ask again, or let it ask itself, passing its socket."


class ChaperoneUnreachable(TcpmigError):
    """No chaperone answers on its socket: it does not run, the path is another one, it was ended meanwhile, or it was
    busy for longer than the client waits."""

    code = "TM-0266"
    fix = "Start `tcpmig chaperone` as root (or its systemd unit); TCPMIG_CHAPERONE names another socket."


class ChaperoneRuns(TcpmigError):
    """Another chaperone answers on this socket already. This one did not start; what the other one holds is
    untouched."""

    code = "TM-0271"
    outcome = Outcome.REFUSED
    fix = "Use that one, end it, or give this one another path (--socket)."


class NoSuchUser(TcpmigError):
    """The user that the chaperone is to become is not known on this host. It did not start."""

    code = "TM-0273"
    outcome = Outcome.REFUSED
    fix = "Make the user (`useradd --system tcpmig`), or name another one (--user)."
