"""Is the file of that path the same here? What is compared, and what proves it.

*Files that are only read* (programs, libraries, data) have to have the same content: a mapped program whose code lies
elsewhere crashes. An ELF file is known by its build-id, made from the code itself by the linker: another build-id is
refused whatever size and time say, the same one passes whatever the time says. Any other file passes with equal size
and time of modification, else by a digest of its content.

*Files that are open for writing* have to be one and the same file, on a file system that both hosts share: an equal
copy would go its own way from then on. Equal inode numbers, sizes and times prove nothing (a cloned disk has them all),
so it is tried: the source puts an empty file with a random name, a *beacon*, into the file's directory, for the moment
of the check, and the target looks for it under the path that it would use.

Source: elf(5), NT_GNU_BUILD_ID of the System V ABI's note sections as GNU ld writes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import stat
import struct
from collections.abc import Iterable
from typing import Final

from tcpstate.slotted import dataclass

__all__ = ["BEACON", "Beacons", "Evidence", "build_id", "digest", "evidence_of", "same_folder", "shown"]

_log = logging.getLogger(__name__)

#: how the names of beacons, and of files on their way, begin
BEACON: Final = ".tcpmig-"

#: up to this size a digest is of all bytes, beyond it of samples: the ends, and places at equal distances between
_WHOLE: Final = 16 << 20
_SAMPLES: Final = 64
_SAMPLE: Final = 64 << 10
_DIGEST: Final = 32

_MAGIC: Final = b"\x7fELF"
_PT_NOTE: Final = 4
_NT_GNU_BUILD_ID: Final = 3
#: more are not looked at: a build-id is in the first notes, and a file may be hostile
_HEADERS_MAX: Final = 256
_NOTES_MAX: Final = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What tells the content of a file, besides its size.

    build_id  of an ELF file; empty: it has none
    digest    BLAKE2b of the content (of samples, if it is large); empty: there is a build-id, or nobody needed it
    """

    build_id: bytes = b""
    digest: bytes = b""

    def __post_init__(self) -> None:
        if len(self.build_id) > 64 or len(self.digest) not in (0, _DIGEST):
            raise ValueError("a build-id or digest of an impossible length")


def evidence_of(fd: int, size: int) -> Evidence:
    """Of an open regular file; its position does not matter, and is not changed. OSError."""
    found = build_id(fd)
    return Evidence(build_id=found) if found else Evidence(digest=digest(fd, size))


def digest(fd: int, size: int) -> bytes:
    """Of the first ``size`` bytes of a file: it may grow meanwhile. OSError."""
    state = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=_DIGEST)
    if size <= _WHOLE:
        at = 0
        while piece := os.pread(fd, min(1 << 20, size - at), at):
            state.update(piece)
            at += len(piece)
    else:
        for number in range(_SAMPLES):
            state.update(os.pread(fd, _SAMPLE, (size - _SAMPLE) * number // (_SAMPLES - 1)))
    return state.digest()


def build_id(fd: int) -> bytes:
    """The build-id of an ELF file; empty if the file has none, or is no ELF file. OSError."""
    head = os.pread(fd, 64, 0)
    if len(head) < 52 or head[:4] != _MAGIC or head[4] not in (1, 2) or head[5] not in (1, 2):
        return b""
    order, wide = "<" if head[5] == 1 else ">", head[4] == 2
    if wide and len(head) < 64:
        return b""
    (table,) = struct.unpack_from(order + ("Q" if wide else "I"), head, 32 if wide else 28)
    entry, count = struct.unpack_from(order + "HH", head, 54 if wide else 42)
    layout = struct.Struct(order + ("IIQQQQ" if wide else "IIIII"))
    if entry < layout.size or table >= 1 << 62:
        return b""
    headers = os.pread(fd, entry * min(count, _HEADERS_MAX), table)
    for start in range(0, len(headers) - layout.size + 1, entry):
        fields = layout.unpack_from(headers, start)
        offset, length = (fields[2], fields[5]) if wide else (fields[1], fields[4])
        if fields[0] == _PT_NOTE and offset < 1 << 62:
            found = _in_notes(os.pread(fd, min(length, _NOTES_MAX), offset), order)
            if found:
                return found
    return b""


def _in_notes(notes: bytes, order: str) -> bytes:
    header = struct.Struct(order + "III")  # struct elf32_note: lengths of name and description, type
    at = 0
    while at + header.size <= len(notes):
        name, length, kind = header.unpack_from(notes, at)
        start = at + header.size + (name + 3) // 4 * 4
        if start + length > len(notes):
            return b""
        if kind == _NT_GNU_BUILD_ID and notes[at + header.size : at + header.size + name] == b"GNU\0" and length <= 64:
            return notes[start : start + length]
        at = start + (length + 3) // 4 * 4
    return b""


def shown(size: int, mtime_ns: int, id: bytes = b"") -> str:
    """A file's marks, for messages: ``1234 bytes of 2026-11-26 03:20:26.123456 UTC``."""
    import datetime

    moment = datetime.datetime.fromtimestamp(mtime_ns // 10**9, datetime.UTC)
    text = f"{size} bytes of {moment:%Y-%m-%d %H:%M:%S}.{mtime_ns % 10**9 // 1000:06d} UTC"
    return f"{text}, build-id {id.hex()}" if id else text


class Beacons:
    """Empty files of random names in the directories of files that are open for writing, as long as the block lasts.

    names  directory -> name of the file in it; a directory that takes none has none
    way    below which the directories are (namespaces.ways); empty: they are ours
    """

    def __init__(self, folders: Iterable[str], way: str = "") -> None:
        self._way = way
        self._folders = sorted(set(folders))
        self.names: dict[str, str] = {}

    def __enter__(self) -> Beacons:
        for folder in self._folders:
            name = f"{BEACON}{secrets.token_hex(16)}"
            try:
                os.close(
                    os.open(f"{self._way}{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                )
            except OSError as error:
                # it was removed, or takes no files of ours: then nothing can be proven, and the target says so
                _log.debug("no beacon in %s: %s", folder, error)
                continue
            self.names[folder] = name
        return self

    def __exit__(self, *_: object) -> None:
        for folder, name in self.names.items():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self._way}{folder}/{name}")
        self.names.clear()


def same_folder(path: str, beacon: str) -> bool:
    """Whether the directory of the file at ``path`` has the beacon; what is not a beacon's name is not looked for."""
    if not beacon.startswith(BEACON) or "/" in beacon or "\0" in beacon:
        return False
    return _is_empty_file(os.path.join(os.path.dirname(os.path.realpath(path)), beacon))


def _is_empty_file(path: str) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == 0
