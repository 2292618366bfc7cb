"""Errors of the process engine, the image and the checks before the stop. See :mod:`tcpstate.errors` for the tree."""

from __future__ import annotations

from tcpstate.errors import Outcome, TcpmigError

__all__ = [
    "BacklogNotDrained",
    "BadImageRecord",
    "ForeignImage",
    "ImageDamaged",
    "ImageError",
    "ImageIncomplete",
    "ImageLimitExceeded",
    "ImageNotWritten",
    "ImageTruncated",
    "ImageUnreadable",
    "OtherImageVersion",
    "PidTaken",
    "RebuildDiffers",
    "Refused",
    "TreeChanged",
    "UnknownFrameKind",
    "UnsupportedSession",
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


class ImageError(TcpmigError):
    """An image, a file or a stream, is not usable. Nothing was built from it; every kind of failure has a class of its
    own below this one."""

    code = "TM-0401"
    outcome = Outcome.REFUSED
    fix = "Make the image again."


class ImageTruncated(ImageError):
    """The image ends before its END frame and trailer: it was copied in part, the writer ran out of space, or the
    stream was cut."""

    code = "TM-0402"
    fix = "Copy the image again and compare its size; if it came through a stream, run the command again."


class ImageDamaged(ImageError):
    """A digest, the index or a field of the layout is wrong: bytes of the image were changed after it was made."""

    code = "TM-0403"
    fix = "Copy the image again from where it was made; if it is damaged there too, make it again."


class ForeignImage(ImageError):
    """The file or stream does not begin as an image does: it is something else, or the remote command printed
    something before it."""

    code = "TM-0404"
    fix = "Check the path; for a stream, check that the remote shell prints nothing when it starts."


class OtherImageVersion(ImageError):
    """The image was made in a version of the format that this tcpmig does not read."""

    code = "TM-0405"
    fix = "Use the tcpmig that made the image, or a later one."


class UnknownFrameKind(ImageError):
    """The image has a part that this tcpmig does not know and that may not be left out: it was made by a later
    version. Without that part the processes would come back incomplete."""

    code = "TM-0406"
    fix = "Use the tcpmig that made the image, or a later one."


class ImageLimitExceeded(ImageError):
    """A length in the image is beyond the limits of the format. Such a length is never used: an image that has one is
    damaged, or made to do harm."""

    code = "TM-0407"
    fix = "Do not use the image; make it again from the processes."


class BadImageRecord(ImageError):
    """A part of the image is whole, its digest is right, and yet what it says cannot be: it was made by a defective or
    hostile writer, or by another version."""

    code = "TM-0408"
    fix = "Make the image again with this version of tcpmig."


class ImageUnreadable(ImageError):
    """The image file cannot be opened or read: it does not exist, permission is missing, it is no regular file, or the
    disk failed."""

    code = "TM-0409"
    fix = "Check the path and its permissions."


class ImageNotWritten(ImageError):
    """The image file could not be written: the directory does not exist, permission is missing, the disk is full or
    failed. The incomplete file was removed; a file that had the name before is unchanged."""

    code = "TM-0410"
    outcome = Outcome.FAILED
    fix = "Make room or choose another place with -o, then try again."
