"""The error tree of the project, and the catalogue that ``tcpmig explain`` prints.

One class per code.  The class docstring is the long explanation (why it happens); ``fix`` says what to do.  The
packages above define their own subclasses in their own ``errors.py``; codes are unique over all of them (a unit test
says so).  Ranges: 01xx general, 02xx tcpstate, 03xx refused before a process is touched, 04xx image, 05xx process
engine, 06xx migration and protocol, 07xx addresses.
"""

from __future__ import annotations

import enum
from typing import ClassVar

__all__ = [
    "AddressInUse",
    "AlreadyFrozen",
    "BadRecord",
    "ConnIdSyntax",
    "ConnectionCallFailed",
    "FinNotRestored",
    "ForeignFilter",
    "KernelFeatureMissing",
    "ListenerFilterRefused",
    "MissingCapability",
    "NoSuchConnection",
    "NotFrozen",
    "NotPermitted",
    "Outcome",
    "QueueNotRestored",
    "StillMoving",
    "TcpmigError",
    "UnsupportedSocket",
    "UnsupportedState",
    "UrgentData",
    "catalogue",
]


class Outcome(enum.IntEnum):
    """Exit statuses of the command line; every error class names the one that it ends a command with."""

    DONE = 0
    FAILED = 1  # nothing lost: the process runs where it ran
    USAGE = 2
    REFUSED = 3  # before anything was stopped or built
    PARTIAL = 4  # done, but some connections were lost
    IN_DOUBT = 5  # both sides hold; `tcpmig recover` settles it


class TcpmigError(Exception):
    """Something went wrong that has no more exact code. The message and the log say what.

    message  what happened, one sentence without a full stop
    object   to which object it happened: ``pid 12``, ``pid 12 fd 5``, a conn-ID, a path
    fix      what the user can do, in place of the class's general advice
    """

    code: ClassVar[str] = "TM-0100"
    outcome: ClassVar[Outcome] = Outcome.FAILED
    fix: str = "Read the detail with -v; if it is not clear, report it with the log."

    def __init__(self, message: str, *, object: str = "", fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.object = object
        if fix is not None:
            self.fix = fix

    def __str__(self) -> str:
        where = f" ({self.object})" if self.object else ""
        return f"{self.code}: {self.message}{where}. {self.fix}"

    def as_dict(self) -> dict[str, str]:
        """The fields of the JSON failure object (``design/CLI.md``)."""
        return {"code": self.code, "message": self.message, "object": self.object, "fix": self.fix}


class MissingCapability(TcpmigError):
    """The tool stops other processes, reads their memory and puts sockets in repair mode. That takes CAP_SYS_PTRACE,
    CAP_NET_ADMIN (in the user namespace that owns the network namespace) and CAP_SYS_ADMIN or
    CAP_CHECKPOINT_RESTORE. One of them is missing from the effective set."""

    code = "TM-0101"
    outcome = Outcome.REFUSED
    fix = "Run as root, or give the named capability to the program that runs tcpmig."


class NotPermitted(TcpmigError):
    """The kernel refused an operation although the capability is there: another user namespace, a security module, a
    tracer already attached."""

    code = "TM-0102"
    outcome = Outcome.REFUSED
    fix = "Run tcpmig in the user namespace that owns the object; check the security module's log."


class KernelFeatureMissing(TcpmigError):
    """This kernel lacks an interface that the operation needs. Features are probed, versions are never compared."""

    code = "TM-0103"
    outcome = Outcome.REFUSED
    fix = "Use a kernel with the named feature (see docs/reference/kernel.md)."


class ConnIdSyntax(TcpmigError):
    """A conn-ID is written ``tcp:LOCAL:PORT-PEER:PORT``, IPv6 addresses in brackets:
    ``tcp:10.0.0.5:6379-10.0.0.9:51514``, ``tcp:[fd00::5]:6379-[fd00::9]:51514``."""

    code = "TM-0201"
    outcome = Outcome.USAGE
    fix = "Copy a conn-ID from `tcpmig conns`."


class NoSuchConnection(TcpmigError):
    """No socket of this network namespace has this conn-ID, or its owner is hidden from this PID namespace."""

    code = "TM-0202"
    outcome = Outcome.REFUSED
    fix = "List the connections with `tcpmig conns`; run it in the network namespace of the connection."


class BadRecord(TcpmigError):
    """A portable record (of a connection, or inside an image or a message) is truncated, malformed, of an unknown
    version, or holds a value outside its range. Nothing was changed."""

    code = "TM-0203"
    outcome = Outcome.REFUSED
    fix = "Make the record again; do not edit it by hand."


class ForeignFilter(TcpmigError):
    """The application attached an eBPF program as a filter of this socket (SO_ATTACH_BPF). The kernel does not give
    such a program back: it could neither be restored after a freeze nor rebuilt elsewhere. Nothing was changed."""

    code = "TM-0210"
    outcome = Outcome.REFUSED
    fix = "Let the application detach its eBPF filter, or use a classic one (SO_ATTACH_FILTER)."


class UnsupportedState(TcpmigError):
    """The connection is in a TCP state that cannot be exported and rebuilt. Nothing was changed."""

    code = "TM-0211"
    outcome = Outcome.REFUSED
    fix = "Wait until the connection is established or closed, and try again."


class UnsupportedSocket(TcpmigError):
    """The socket carries state that the kernel does not give out: an upper-layer protocol (kTLS), Multipath TCP, TCP-AO
    or MD5 keys, or it is not a TCP socket. Nothing was changed."""

    code = "TM-0212"
    outcome = Outcome.REFUSED
    fix = "Close this connection before, or leave its process where it is."


class UrgentData(TcpmigError):
    """The receive queue holds urgent data (TCP's out-of-band byte). Reading the queue from outside stops at the urgent
    mark; what is behind it would be lost."""

    code = "TM-0213"
    fix = "Let the application read the urgent byte and try again."


class ConnectionCallFailed(TcpmigError):
    """A system call on a connection's socket failed. The message names the call and the kernel's reason. What had been
    changed on the sockets of the same batch was undone."""

    code = "TM-0214"
    fix = "See the named call; CAP_NET_ADMIN is needed in the user namespace that owns the network namespace."


class AddressInUse(TcpmigError):
    """A connection with the same addresses and ports exists in this network namespace already, or something else keeps
    the local port."""

    code = "TM-0215"
    fix = "Discard or close the other connection first; list it with `tcpmig conns`."


class ListenerFilterRefused(TcpmigError):
    """A listening socket does not take a filter (Multipath TCP listeners refuse them, SO_LOCK_FILTER forbids them), so
    that new connections cannot be held back at it."""

    code = "TM-0216"
    outcome = Outcome.REFUSED
    fix = "Start the server with plain TCP listeners (Go: GODEBUG=multipathtcp=0), or without SO_LOCK_FILTER."


class StillMoving(TcpmigError):
    """A frozen connection's queues or sequence numbers changed while they were read, several times over: something
    still uses the socket, probably a process that shares it and was not stopped."""

    code = "TM-0217"
    fix = "Stop every process that holds this socket (see `tcpmig conns`) and try again."


class QueueNotRestored(TcpmigError):
    """The kernel did not take the whole send or receive queue of a connection that was being rebuilt."""

    code = "TM-0218"
    fix = "Give the host more memory for TCP (net.ipv4.tcp_mem) and try again."


class AlreadyFrozen(TcpmigError):
    """The connection is frozen already: by an earlier `tcpmig freeze`, or by a checkpoint or migration under way.
    Nothing was changed."""

    code = "TM-0280"
    outcome = Outcome.REFUSED
    fix = "Let it flow again with `tcpmig resume CONN`, or wait until the migration is done."


class NotFrozen(TcpmigError):
    """No `tcpmig freeze` in this boot and network namespace has frozen this connection, or it is resumed already, or
    the freeze kept its record in another runtime directory."""

    code = "TM-0281"
    outcome = Outcome.REFUSED
    fix = "List what is frozen with `tcpmig conns`; TCPMIG_RUNTIME_DIR must be the one of the freeze."


class FinNotRestored(TcpmigError):
    """A half-closed connection was rebuilt, but a FIN could not be put back into its place: the application would wait
    for an end that has come already, or the peer for one that was promised."""

    code = "TM-0219"
    fix = "Report it with the log; the connection can be closed by its application."


def catalogue() -> dict[str, type[TcpmigError]]:
    """Every error class that has been imported, by code."""
    found: dict[str, type[TcpmigError]] = {}
    todo: list[type[TcpmigError]] = [TcpmigError]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if "code" in vars(cls):
            if cls.code in found:
                raise RuntimeError(f"{cls.code} is the code of both {found[cls.code].__name__} and {cls.__name__}")
            found[cls.code] = cls
    return dict(sorted(found.items()))
