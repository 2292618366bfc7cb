"""Verdicts: what a check says of one thing, before anything is stopped.

Every room that can refuse something offers a function that reads /proc only and returns verdicts; ``tcpmig check``
prints them, and a dump or a migration starts only if none of them refuses.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from tcpstate.errors import TcpmigError
from tcpstate.slotted import dataclass

__all__ = ["Status", "Verdict", "refusals"]


class Status(enum.Enum):
    """What a verdict says."""

    OK = "ok"
    WARN = "warn"  # it will be done, but something will differ; the text says what
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One item and what will become of it.

    subject  the object: ``pid 12``, ``pid 12 fd 5``, ``pid 12 map 7f..``, an address
    kind     what it is, in the field's words: ``eventfd``, ``tcp connection``, ``seccomp``
    status   ok, warn or refuse
    code     the error code of a refusal, else empty
    text     one sentence; empty for what needs none
    fix      what the user can do about a refusal or warning
    """

    subject: str
    kind: str
    status: Status = Status.OK
    code: str = ""
    text: str = ""
    fix: str = ""

    @classmethod
    def refuse(cls, error: TcpmigError, kind: str) -> Verdict:
        """The verdict that ``error`` would be, had it been raised."""
        return cls(
            subject=error.object, kind=kind, status=Status.REFUSE, code=error.code, text=error.message, fix=error.fix
        )


def refusals(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Those that refuse."""
    return [v for v in verdicts if v.status is Status.REFUSE]
