"""Records of ours in the runtime directory: who may write there, how one is replaced, and whose is believed.

Holds, forwardings and lazy memories each have a directory of their own, with a file for each.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tcpstate.errors import BadRecord, TcpmigError
from tcpstate.frozen import runtime_dir

__all__ = ["private_directory", "read_own", "replace"]


def private_directory(name: str, what: str, failed: Callable[..., TcpmigError]) -> Path:
    """The directory of this name, made if it is not there.

    what    it, in words
    failed  the error, if it cannot be made, or others may write into it
    """
    path = runtime_dir() / name
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise failed(f"{what} cannot be made: {error.strerror}", object=str(path)) from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise failed(f"others may write into {what}", object=str(path))
    return path


def replace(path: Path, data: bytes) -> None:
    """Write a record, the owner's alone, in place of what was there: whole, or not at all. OSError."""
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    fresh.rename(path)


def read_own(path: Path) -> bytes:
    """A record. BadRecord if it is not ours; FileNotFoundError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(file.fileno()).st_uid != os.geteuid():
            raise BadRecord("it belongs to somebody else", object=str(path))
        return file.read()
