"""The root of the error tree, and its catalogue."""

from __future__ import annotations

import enum
from typing import ClassVar

__all__ = ["Outcome", "TcpmigError", "catalogue"]


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
    told     the program that asked for it has been told, and tells its user
    """

    code: ClassVar[str] = "TM-0100"
    outcome: ClassVar[Outcome] = Outcome.FAILED
    fix: str = "Read the detail with -v; if it is not clear, report it with the log."
    told: bool = False

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
