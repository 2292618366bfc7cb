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
    "BadRecord",
    "ConnIdSyntax",
    "KernelFeatureMissing",
    "MissingCapability",
    "NoSuchConnection",
    "NotPermitted",
    "Outcome",
    "TcpmigError",
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
