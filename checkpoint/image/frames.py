"""One frame of an image: its layout, its limits, its digest. No files, no sockets.

All numbers are little endian.  An image is a preamble, frames, and a trailer::

    preamble, 16 bytes     0 magic (8)     8 version (4)    12 zero (4)
    frame header, 64       0 kind (16)    16 flags (4)      20 record length (4)   24 padding (4)   28 data length (4)
                          32 digest (32)
    frame body             record | padding: zero bytes | data
    trailer, 16            0 offset of the END frame (8)     8 closing magic (8)

The kind is a name of capital letters, digits and underscores, padded with zero bytes.  The data of a frame, if any,
begin at a multiple of 4096 bytes from the start of the image, so that a file can be mapped; the padding gets it there.
The digest is BLAKE3 (256 bits) over the first 32 bytes of the header, the record and the data, in the mode that derives
keys, so that digests of frames and of images are of two kinds whatever their bytes are.  In a stream, whose channel
guards against forgery and of which nothing is kept, frames may have the flag CHECKSUM: the digest is then over those 32
bytes and the XXH3 hashes (64 bits, 8 bytes each) of the record and of the data: pages are hashed in the stop as well,
and of 1 MiB XXH3 takes 0.02 ms here, BLAKE3 0.17.  A file has no such frames.
"""

from __future__ import annotations

import enum
import itertools
import mmap
import re
import struct
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import msgpack
import xxhash
from blake3 import blake3

from checkpoint.errors import (
    BadImageRecord,
    ForeignImage,
    ImageDamaged,
    ImageLimitExceeded,
    OtherImageVersion,
)
from tcpstate import codec
from tcpstate.errors import BadRecord
from tcpstate.slotted import dataclass

__all__ = [
    "ALIGNMENT",
    "DATA_MAX",
    "HEADER",
    "PREAMBLE",
    "RECORD_MAX",
    "TRAILER",
    "VERSION",
    "Buffer",
    "End",
    "Flag",
    "Frame",
    "Header",
    "Kind",
    "PageRun",
    "Runs",
    "Space",
    "aligned_buffer",
]

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview

MAGIC = b"\x89TCPMIG\n"
CLOSING_MAGIC = b"\nGIMPCT\x89"
VERSION = 3
PREAMBLE = struct.Struct("<8sII")
HEADER = struct.Struct("<16sIIII32s")
TRAILER = struct.Struct("<Q8s")
_CHECKSUMS = struct.Struct("<QQ")
HEADER_DIGESTED = 32  # bytes of the header that the digest covers: all but the digest
ALIGNMENT = 4096
DIGEST_SIZE = 32
#: contexts are to be unique among all programs (BLAKE3 paper, 6.2)
_FRAME_CONTEXT = "tcpmig 2026-11-27 image version 3: digest of a frame"
_ROOT_CONTEXT = "tcpmig 2026-11-27 image version 3: root digest"
SIGNATURE_SIZE = 64  # Ed25519

#: the longest record and the most data that a frame may announce, bytes
RECORD_MAX = 256 << 20
DATA_MAX = 1 << 20
#: the longest record of a frame that carries pages: 256 runs of one page take less than 6 KiB
PAGE_RECORD_MAX = 64 << 10
#: addresses and file offsets end here: an off_t is signed, user addresses of every machine are below it
ADDRESS_MAX = 1 << 63

_KIND_NAME = re.compile(rb"[A-Z][A-Z0-9_]{0,15}\Z")


class Kind(enum.StrEnum):
    """The kinds of frames of this version. Frames of other kinds are refused by name, or skipped if optional.

    Records that come more than once supersede: a reader that applies frames in their order ends with the right state.

    MANIFEST     what a host must check before it builds anything (host, kernel, machine, options)
    LIVE         the processes while they run, in a round of pre-copy: their memory alone is built from it
    AHEAD        idle connections of the processes, while they run: built before the stop, the first files of FILES
    CONTENTS     shared memory of the processes, while they run: contents whose bytes follow in the space ``staged``;
                 FILES says which of its own go on from there
    TREE         the processes
    FILES        the table of open files of the tree
    MAPPINGS     the memory layout of one process; a later one of the same process replaces it
    STATES       all of the processes that is neither memory nor files; it comes after MAPPINGS, before PAGES; or in
                 several, each of some processes, when all bytes of memory and contents have come (a migration)
    PAGES        bytes of memory (by process) or of file contents (by index in FILES): the later bytes of an address win
    PAGES_DROP   pages that are as in a fresh mapping again (a hole, for contents): earlier PAGES of them are void
    COPIED       no more bytes of memory or contents come: the processes can be completed, while connections are frozen
    PAGES_LATER  pages of a process's memory that come when they are asked for, after it runs: what is there is void
    PAGE_INDEX   where the pages of processes' memory are (checkpoint.image.lazypages): so they can be known without
                 walking over their frames; of an image in a file, the last before END
    MAPS_DELTA   memory of a process that was told in LIVE and was made anew since: what is left there is void
    FILES_DELTA  entries of FILES that came or changed; sockets, as frozen at the end
    ENDED        connections that were closed before the stop, and whose last ACKs have not come; of a migration
    ADDRESSES    addresses that the connections need, of an image in a file; of a migration the protocol tells them
    PARENTS      earlier images that this one takes pages from (checkpoint.image.chain); of an image in a file
    INHERITED    pages of memory that are in one of them
    HOLD         where the connections are held that the checkpoint did not end; of an image in a file
    END          index, root digest and, optionally, a signature; always the last
    """

    MANIFEST = "MANIFEST"
    LIVE = "LIVE"
    AHEAD = "AHEAD"
    CONTENTS = "CONTENTS"
    TREE = "TREE"
    FILES = "FILES"
    MAPPINGS = "MAPPINGS"
    STATES = "STATES"
    PAGES = "PAGES"
    PAGES_DROP = "PAGES_DROP"
    PAGES_LATER = "PAGES_LATER"
    PAGE_INDEX = "PAGE_INDEX"
    COPIED = "COPIED"
    MAPS_DELTA = "MAPS_DELTA"
    FILES_DELTA = "FILES_DELTA"
    ENDED = "ENDED"
    ADDRESSES = "ADDRESSES"
    PARENTS = "PARENTS"
    INHERITED = "INHERITED"
    HOLD = "HOLD"
    END = "END"


class Flag(enum.IntFlag):
    """Flags of a frame.

    OPTIONAL  a reader that does not know the kind may skip it
    CHECKSUM  record and data have an XXH3 hash each, and the digest covers these: in streams only
    """

    OPTIONAL = 1
    CHECKSUM = 2


_FLAGS_AT = 16  # in the header
_FILE_FLAGS = int(Flag.OPTIONAL)
_STREAM_FLAGS = int(Flag.OPTIONAL | Flag.CHECKSUM)


class Space(enum.StrEnum):
    """What the runs of a PAGES frame are places of: the memory of a process, the content of a file, the same while the
    processes still run, or a queue of a connection: what has arrived and was not read, what was written and is not
    acknowledged."""

    MEMORY = "memory"
    CONTENT = "content"
    STAGED = "staged"
    RECEIVED = "received"
    SENT = "sent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """The record of a PAGES or PAGES_DROP frame: where its bytes belong.

    space  memory of a process, content of a file, or queue of a connection
    id     pid (as in TREE), index of a content, its number in CONTENTS, or index in FILES
    runs   (start, length) in bytes, ascending, not overlapping; whole pages in memory
    """

    space: Space
    id: int
    runs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if self.id < 0:
            raise ValueError(f"{self.space} {self.id} cannot be")
        end = 0
        for start, length in self.runs:
            if start < end or length <= 0 or start + length > ADDRESS_MAX:
                raise ValueError(f"run {start:#x}+{length:#x} is empty, out of order or out of range")
            if self.space is Space.MEMORY and (start | length) % ALIGNMENT:
                raise ValueError(f"run {start:#x}+{length:#x} is not of whole pages")
            end = start + length

    @property
    def length(self) -> int:
        """Bytes in all runs."""
        return sum(length for _, length in self.runs)

    # What the codec reads and writes, made directly: with hundreds of runs in each MiB the codec's checks of every
    # number, made one call deep each, take longer than the digest.

    def pack(self) -> bytes:
        """msgpack bytes, the same as the codec's."""
        packed: bytes = msgpack.packb({"space": self.space.value, "id": self.id, "runs": self.runs})
        return packed

    @classmethod
    def unpack(cls, data: Buffer) -> Runs:
        """The runs in ``data``. ValueError if it is not such a record."""
        try:
            plain = msgpack.unpackb(data, use_list=False)
            space, number, runs = Space(plain["space"]), plain["id"], plain["runs"]
            numbers = [number, *itertools.chain.from_iterable(runs)]
        except (KeyError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
            raise ValueError(f"not a record of runs: {error}") from None
        if type(runs) is not tuple or set(map(type, runs)) - {tuple} or set(map(type, numbers)) != {int}:
            raise ValueError("not a record of runs: something else where numbers should be")
        if set(map(len, runs)) - {2}:
            raise ValueError("not a record of runs: a run is a start and a length")
        return cls(space=space, id=number, runs=runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRun:
    """Bytes and where they belong: what memory and contents are read into, sent as, and written from.

    data  the bytes of the runs, one after the other, at most DATA_MAX. The view is valid only as long as its producer
          says (buffers are reused).
    """

    space: Space
    id: int
    runs: tuple[tuple[int, int], ...]
    data: memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The record of the END frame.

    index      the offset of each frame before this one, 8 bytes each
    root       BLAKE3 over the preamble and the digests of all frames before this one
    signature  Ed25519 signature of ``root``, or None
    """

    index: bytes
    root: bytes
    signature: bytes | None = None

    def __post_init__(self) -> None:
        if len(self.root) != DIGEST_SIZE or len(self.index) % 8:
            raise ValueError("root or index has an impossible length")
        if self.signature is not None and len(self.signature) != SIGNATURE_SIZE:
            raise ValueError(f"a signature has {SIGNATURE_SIZE} bytes")


@dataclass(frozen=True, slots=True)
class Header:
    """A frame header that passed its checks. ``raw``: the digested part of it."""

    kind: str
    flags: int
    record_length: int
    padding: int
    data_length: int
    digest: bytes
    raw: bytes
    offset: int

    @property
    def optional(self) -> bool:
        """Whether a reader that does not know the kind may skip the frame."""
        return bool(self.flags & Flag.OPTIONAL)

    @property
    def end(self) -> int:
        """The offset behind the frame."""
        return self.offset + HEADER.size + self.record_length + self.padding + self.data_length


class Frame:
    """A complete frame as read.

    kind, flags, offset  as in the header
    record               the packed record
    data                 the data; a view of the reader's buffer or of the mapped file
    """

    __slots__ = ("_check", "_recycle", "data", "digest", "flags", "kind", "offset", "record")

    def __init__(
        self, header: Header, record: Buffer, data: memoryview, recycle: Callable[[memoryview], None] | None = None
    ) -> None:
        self.kind = header.kind
        self.flags = header.flags
        self.offset = header.offset
        self.digest = header.digest
        self.record = record
        self.data = data
        self._recycle = recycle
        self._check: Future[bytes] | None = None

    def __repr__(self) -> str:
        return f"<{self.kind} at {self.offset}: record {len(self.record)}, data {len(self.data)} bytes>"

    def decode(self, cls: type[T]) -> T:
        """The record as a value of ``cls``. BadImageRecord if it is not one."""
        try:
            return codec.unpack(cls, self.record if isinstance(self.record, memoryview) else bytes(self.record))
        except BadRecord as error:
            raise BadImageRecord(f"{self.kind}: {error.message}", object=f"frame at offset {self.offset}") from error

    def runs(self) -> Runs:
        """The record of a PAGES or PAGES_DROP frame, checked. ImageLimitExceeded, BadImageRecord."""
        if len(self.record) > PAGE_RECORD_MAX:
            raise ImageLimitExceeded(
                f"{self.kind}: a record of {len(self.record)} bytes for at most {DATA_MAX} bytes of pages",
                object=f"frame at offset {self.offset}",
            )
        try:
            return Runs.unpack(self.record)
        except ValueError as error:
            raise BadImageRecord(f"{self.kind}: {error}", object=f"frame at offset {self.offset}") from None

    def pages(self) -> PageRun:
        """What a PAGES frame carries. ImageError if record and data do not fit together."""
        runs = self.runs()
        if runs.length != len(self.data):
            raise BadImageRecord(
                f"{self.kind}: runs of {runs.length} bytes with {len(self.data)} bytes of data",
                object=f"frame at offset {self.offset}",
            )
        return PageRun(space=runs.space, id=runs.id, runs=runs.runs, data=self.data)

    def checked_by(self, future: Future[bytes]) -> None:
        """The digest is being computed by another thread, which reads the data until ``future`` is done."""
        self._check = future

    def release(self) -> None:
        """Give the data's buffer back to the stream reader, which will overwrite it. Without it, it is only freed."""
        recycle, self._recycle = self._recycle, None
        if recycle is None:
            return
        data, self.data = self.data, memoryview(b"")
        if self._check is None:
            recycle(data)
        else:
            # the digest may still be reading the buffer
            self._check.add_done_callback(lambda _: recycle(data))


def aligned_buffer(size: int) -> memoryview:
    """Zeroed bytes for page data to be copied into, on a page boundary.

    malloc gives blocks of this size 16 bytes behind one. Copying whole pages to there is a known bad case of ``rep
    movsb`` on AMD's Zen processors: measured 2.2 instead of 7 GB/s for process_vm_readv, 2.6 instead of 12 with huge
    pages.
    """
    return memoryview(mmap.mmap(-1, size))


def pack_header(kind: str, flags: int, record_length: int, data_length: int, offset: int) -> bytes:
    """The digested part of the header of a frame at ``offset``. ValueError, ImageLimitExceeded if it cannot be."""
    name = kind.encode("ascii", "replace")
    if not _KIND_NAME.match(name):
        raise ValueError(f"{kind!r} is not the name of a kind of frame")
    if record_length > RECORD_MAX or data_length > DATA_MAX:
        raise ImageLimitExceeded(f"a {kind} frame with a record of {record_length} and data of {data_length} bytes")
    padding = _padding(offset, record_length, data_length)
    return HEADER.pack(name, flags, record_length, padding, data_length, b"")[:HEADER_DIGESTED]


def parse_header(data: Buffer, offset: int, *, stream: bool = False) -> Header:
    """The header in the 64 bytes ``data``, which stood at ``offset``. ImageError if a field is out of its range.

    stream  frames with CHECKSUM are allowed
    """
    name, flags, record_length, padding, data_length, digest = HEADER.unpack(data)
    where = f"frame at offset {offset}"
    kind = name.rstrip(b"\0")
    if not _KIND_NAME.match(kind):
        raise ImageDamaged("what should be a frame header is not one", object=where)
    if record_length > RECORD_MAX:
        raise ImageLimitExceeded(f"a record of {record_length} bytes, at most {RECORD_MAX} are allowed", object=where)
    if data_length > DATA_MAX:
        raise ImageLimitExceeded(f"data of {data_length} bytes, at most {DATA_MAX} are allowed", object=where)
    if flags & ~(_STREAM_FLAGS if stream else _FILE_FLAGS):
        raise OtherImageVersion(f"{kind.decode()} has flags {flags:#x} that this version does not know", object=where)
    if padding != _padding(offset, record_length, data_length):
        raise ImageDamaged("the data of a frame do not begin on a page boundary", object=where)
    raw = bytes(data[:HEADER_DIGESTED])
    return Header(kind.decode("ascii"), flags, record_length, padding, data_length, digest, raw, offset)


def _padding(offset: int, record_length: int, data_length: int) -> int:
    return -(offset + HEADER.size + record_length) % ALIGNMENT if data_length else 0


def check_padding(data: Buffer, header: Header) -> None:
    """ImageDamaged unless the padding is all zeros."""
    if bytes(data) != bytes(header.padding):
        raise ImageDamaged("padding that must be zero is not", object=f"frame at offset {header.offset}")


def pack_preamble() -> bytes:
    """The first bytes of an image."""
    return PREAMBLE.pack(MAGIC, VERSION, 0)


def check_preamble(data: Buffer) -> None:
    """ForeignImage, OtherImageVersion or ImageDamaged unless the 16 bytes ``data`` are the preamble of this version."""
    magic, version, zero = PREAMBLE.unpack(data)
    if magic != MAGIC:
        raise ForeignImage("this does not begin as an image of tcpmig does")
    if version != VERSION:
        raise OtherImageVersion(f"the image has version {version}, this tcpmig reads version {VERSION}")
    if zero:
        raise ImageDamaged("a field of the preamble that must be zero is not")


def digest(raw_header: bytes, record: Buffer, data: Buffer) -> bytes:
    """The digest of a frame. Releases the interpreter lock while it reads the data."""
    state = blake3(raw_header, derive_key_context=_FRAME_CONTEXT)
    if raw_header[_FLAGS_AT] & Flag.CHECKSUM:
        state.update(_CHECKSUMS.pack(xxhash.xxh3_64_intdigest(record), xxhash.xxh3_64_intdigest(data)))
    else:
        state.update(record)
        state.update(data)
    return state.digest()


def check_digest(found: bytes, frame: Frame) -> None:
    """ImageDamaged unless the frame has the digest that its header tells."""
    if found != frame.digest:
        raise ImageDamaged(f"the digest of {frame.kind} is wrong", object=f"frame at offset {frame.offset}")


def root_state() -> Any:
    """The running root digest of an image; feed it the digest of each frame."""
    return blake3(pack_preamble(), derive_key_context=_ROOT_CONTEXT)


def check_end(frame: Frame, offsets: list[int], root: bytes) -> End:
    """The END record. ImageDamaged if it does not tell of exactly the frames that came."""
    end = frame.decode(End)
    if end.root != root:
        raise ImageDamaged("the root digest is wrong: frames are missing, doubled or out of order")
    if end.index != struct.pack(f"<{len(offsets)}Q", *offsets):
        raise ImageDamaged("the index does not tell where the frames are")
    return end


def pack_trailer(end_offset: int) -> bytes:
    """The last bytes of an image, whose END frame stands at ``end_offset``."""
    return TRAILER.pack(end_offset, CLOSING_MAGIC)


def has_trailer(data: Buffer) -> bool:
    """Whether the 16 bytes ``data`` look like a trailer: a file without one is not complete."""
    return bool(TRAILER.unpack(data)[1] == CLOSING_MAGIC)


def check_trailer(data: Buffer, end_offset: int) -> None:
    """ImageDamaged unless the 16 bytes ``data`` are the trailer of an image whose END frame is at ``end_offset``."""
    if bytes(data) != pack_trailer(end_offset):
        raise ImageDamaged("the trailer is not one")
