"""Errors of held connections and of their handing over."""

from __future__ import annotations

from tcpstate.errors import Outcome, TcpmigError

__all__ = [
    "HandoverFailed",
    "HandoverUnknown",
    "HoldBusy",
    "HoldChanged",
    "HoldElsewhere",
    "HoldRecordDamaged",
    "HoldUnavailable",
    "HolderFailed",
    "NoSuchHold",
    "NotHeld",
]


class HoldUnavailable(TcpmigError):
    """A checkpoint that ends the processes holds their connections, and something that this takes is not to be had: the
    kernel has no nf_tables, the runtime directory cannot be written, or others may write into it. Nothing was
    stopped."""

    code = "TM-0620"
    outcome = Outcome.REFUSED
    fix = "Load nf_tables, mend TCPMIG_RUNTIME_DIR, or let the processes run on (-R)."


class HolderFailed(TcpmigError):
    """The process that keeps held sockets did not start, or the line to it broke."""

    code = "TM-0621"
    fix = "Read its log (*-hold-*.log in TCPMIG_STATE_DIR/log); `tcpmig holds` shows what stands."


class NoSuchHold(TcpmigError):
    """There is no hold of this ID: it was restored, released, or its time was up; or the beginning of an ID was given
    that several have."""

    code = "TM-0622"
    outcome = Outcome.REFUSED
    fix = "See `tcpmig holds`."


class HoldBusy(TcpmigError):
    """Another command is at work on this hold: its checkpoint, a restore, a release."""

    code = "TM-0623"
    outcome = Outcome.REFUSED
    fix = "Wait until it has ended; `tcpmig holds` tells."


class HoldRecordDamaged(TcpmigError):
    """A file in the runtime directory is no record of a hold, or belongs to another user."""

    code = "TM-0624"
    fix = "Look at the file; remove it if it is not ours. What the hold was shows in `nft list tables`."


class HoldChanged(TcpmigError):
    """The holder gave a socket that is not the one which the image names: the image is another one than that of the
    checkpoint, or one of the two was changed."""

    code = "TM-0625"
    outcome = Outcome.REFUSED
    fix = "Restore the image that the checkpoint wrote; `tcpmig holds` names its path."


class HoldElsewhere(TcpmigError):
    """The other host does not hold the connections of this image: they were restored or released there, their time was
    up, or HOST is not where the checkpoint was made. Nothing was built."""

    code = "TM-0626"
    outcome = Outcome.REFUSED
    fix = "If the addresses are free (`ping`), restore without --from; else see `tcpmig holds` on HOST."


class HandoverFailed(TcpmigError):
    """The other host could not give up the connections that it holds, or their addresses. It holds them as before."""

    code = "TM-0627"
    fix = "Read its message; nothing is left here, and the image can be restored again."


class HandoverUnknown(TcpmigError):
    """The line broke after the other host was told to give up the hold, and before it said that it had. Nothing runs
    here or there: the processes are in the image, and nobody answers their peers, who keep trying."""

    code = "TM-0628"
    fix = "Run the same command again; if HOST is gone for good, run it without --from."


class NotHeld(TcpmigError):
    """--from was given, and this image's connections were never held: its checkpoint let the processes run on, or they
    had none."""

    code = "TM-0630"
    outcome = Outcome.USAGE
    fix = "Run `tcpmig restore FILE`."
