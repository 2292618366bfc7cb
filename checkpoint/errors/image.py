"""Errors of images and of the pages that a lazy restore brings later."""

from __future__ import annotations

from checkpoint.errors.tree import Refused
from tcpstate.errors import Outcome, TcpmigError

__all__ = [
    "BadImageRecord",
    "ForeignImage",
    "ImageDamaged",
    "ImageError",
    "ImageIncomplete",
    "ImageLimitExceeded",
    "ImageNotWritten",
    "ImageTruncated",
    "ImageUnreadable",
    "LazyImpossible",
    "OtherImageVersion",
    "ParentDiffers",
    "ParentMissing",
    "StillLazy",
    "UnknownFrameKind",
]


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
    fix = "Use the version of tcpmig that made the image."


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


class ParentMissing(ImageError):
    """An incremental image does not hold the pages that had not changed since an earlier one: it names the earlier
    ones, and one of them is not where it was."""

    code = "TM-0415"
    fix = "Put the earlier images where they were, or beside this one; `tcpmig inspect FILE` names them under PARENTS."


class ParentDiffers(ImageError):
    """The file that an incremental image names as an earlier one is another image: its root digest is not the one that
    was noted."""

    code = "TM-0416"
    fix = "Put the image that was meant in its place; `tcpmig inspect FILE` shows the root digests."


class StillLazy(Refused):
    """The process was restored, or moved here, with --lazy, and not all of its memory has come yet: what is missing
    cannot be copied."""

    code = "TM-0750"
    fix = "Wait until `tcpmig holds` does not show it any more; it is done in the background."


class LazyImpossible(TcpmigError):
    """The memory of a process cannot be filled while it runs (--lazy): the kernel has no userfaultfd(2) with its
    events, or does not let this program use it; or the image is from another kernel or CPU."""

    code = "TM-0751"
    fix = "Do without --lazy, or use a kernel with userfaultfd, as root with CAP_SYS_PTRACE."
