"""Errors of the journal and of recovery out of it."""

from __future__ import annotations

from tcpstate.errors import Outcome, TcpmigError

__all__ = [
    "JournalDamaged",
    "JournalInUse",
    "JournalUnusable",
    "NotInDoubt",
    "NothingToRecover",
    "RecoverIncomplete",
    "Unsettled",
]


class JournalUnusable(TcpmigError):
    """The journal, which must survive a crash, cannot be created or written in the state directory."""

    code = "TM-0613"
    outcome = Outcome.REFUSED
    fix = "Make the directory writable, free some space, or name another one in TCPMIG_STATE_DIR."


class JournalDamaged(TcpmigError):
    """A journal has a record in its middle whose checksum is wrong (a torn last record is normal after a crash, and
    tolerated)."""

    code = "TM-0614"
    fix = "Look at the disk; settle the migration by hand with `tcpmig recover ID --assume here|there`."


class Unsettled(TcpmigError):
    """`tcpmig recover` left something as it is: the other host could not be asked, does not know, or holds the
    processes itself and could not go on with them. The original, if it is on this host, stays stopped and silent, so
    that there are never two running copies."""

    code = "TM-0636"
    outcome = Outcome.IN_DOUBT
    fix = (
        "Run it again when the other host can be reached, or run `tcpmig recover` there. If that host is gone for "
        "good, decide: `tcpmig recover ID --assume here` or `--assume there`."
    )


class NothingToRecover(TcpmigError):
    """No journal of this host that is not settled yet has this name, or several begin with it."""

    code = "TM-0637"
    outcome = Outcome.REFUSED
    fix = "See `tcpmig recover --dry-run` for what is not settled on this host."


class NotInDoubt(TcpmigError):
    """--assume decides what nobody knows. Of this one it is known where the processes are, so that nothing is to be
    decided."""

    code = "TM-0638"
    outcome = Outcome.REFUSED
    fix = "Run `tcpmig recover ID` without --assume."


class RecoverIncomplete(TcpmigError):
    """A step of `tcpmig recover` failed; all others were made. What is left to be done stays in the journal."""

    code = "TM-0639"
    fix = "Mend what is named, and run `tcpmig recover` again."


class JournalInUse(TcpmigError):
    """The program that writes this journal is still at work, or another `tcpmig recover` is settling it."""

    code = "TM-0641"
    outcome = Outcome.REFUSED
    fix = "Wait until it has ended, or end it, and run `tcpmig recover` again."
