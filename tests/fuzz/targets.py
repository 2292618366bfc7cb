"""What is fuzzed: functions of bytes that raise only if something is wrong, and inputs that are right to begin with."""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from checkpoint.errors import ImageError
from checkpoint.files.base import OpenFile
from checkpoint.image import frames
from checkpoint.image.format import FrameReader, FrameWriter, Kind, PageRun, Space
from migrate import messages as migration
from migrate import wire
from migrate.addresses import AddressRecord
from migrate.errors import BadFrame
from tcpstate import codec
from tcpstate.chaperone import messages as chaperone
from tcpstate.chaperone.journal import Note
from tcpstate.chaperone.protocol import Received, ServerProtocol, encode
from tcpstate.connid import ConnId
from tcpstate.errors import BadChaperoneMessage, BadRecord
from tcpstate.freeze import Gate, QuietState
from tcpstate.record import (
    Buffers,
    ConnectionRecord,
    Family,
    LocalFin,
    Negotiated,
    SoftState,
    State,
    Timestamps,
    Windows,
)
from tcpstate.segment import Segment
from tcpstate.signing import Signed

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True, slots=True)
class Target:
    """One decoder.

    run      gives it the bytes; anything that it raises is a bug
    seeds    inputs that it takes
    tail     where msgpack begins in an input, so that it can be changed as values, too
    refit    puts checksums right after a change; None: there are none
    """

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    tail: int = 0
    refit: Callable[[bytes], bytes] | None = None


V4 = ConnId.parse("tcp:10.0.0.1:80-10.0.0.2:4000")
V6 = ConnId.parse("tcp:[fd00::1]:80-[fe80::2%eth0]:4000")
RECORD = ConnectionRecord(
    conn_id=V4,
    family=Family.IPV4,
    state=State.ESTABLISHED,
    snd_una=2**32 - 2,
    snd_nxt=1,
    send_queue=b"abcdef",
    rcv_nxt=7,
    receive_queue=b"xyz",
    windows=Windows(snd_wl1=1, snd_wnd=65535, max_window=65535, rcv_wnd=65535, rcv_wup=1),
    negotiated=Negotiated(mss=1460, snd_wscale=7, rcv_wscale=7, sack=True, timestamps=True),
    buffers=Buffers(send=87040, receive=131072, send_locked=False, receive_locked=True),
    congestion="cubic",
    timestamps=Timestamps(value=5, microseconds=False),
    options={"tcp.nodelay": (1,), "so.linger": (1, 5)},
    option_data={"so.bindtodevice": b"eth0"},
    filter=((6, 0, 0, 0xFFFFFFFF),),
    soft=SoftState(cwnd=10, ssthresh=20, srtt=1, rttvar=2, rto=200000, min_rtt=3),
)
HALF_CLOSED = replace(RECORD, conn_id=V6, family=Family.IPV6, state=State.LAST_ACK, local_fin=LocalFin.SENT)
RECORDS = (RECORD.to_bytes(), HALF_CLOSED.to_bytes())
QUIET = QuietState(
    filter=((6, 0, 0, 0),),
    filter_locked=False,
    mark=1,
    user_timeout=0,
    keepalive=True,
    reuse_address=True,
    minimum_ttl=0,
    minimum_hops=0,
    gate=Gate.FILTER,
)


def run_record(data: bytes) -> None:
    with contextlib.suppress(BadRecord):
        record = ConnectionRecord.from_bytes(data)
        again = ConnectionRecord.from_bytes(record.to_bytes())
        if again != record:
            raise AssertionError("a record changes when it is written and read")


#: one of each shape that the codec knows: families, unions, maps, tuples, enums, bytes
CLASSES: tuple[Any, ...] = (
    ConnectionRecord,
    QuietState,
    Note,
    Signed,
    chaperone.Message,
    migration.Message,
    frames.End,
    OpenFile,
    Segment,
    dict[str, tuple[int, ...] | None],
    frozenset[str],
    float,
)


def run_codec(data: bytes) -> None:
    for cls in CLASSES:
        with contextlib.suppress(BadRecord):
            codec.pack(codec.unpack(cls, data))


def run_chaperone(data: bytes) -> None:
    greeted = ServerProtocol(1000, chaperone.Limits())
    list(greeted.receive(encode(chaperone.Hello())))
    for protocol in (greeted, ServerProtocol(1000, chaperone.Limits())):
        middle = data[-1] % len(data) if data else 0
        with contextlib.suppress(BadChaperoneMessage):
            for piece, descriptors in ((data[:middle], [7]), (data[middle:], [])):
                for event in protocol.receive(piece, descriptors):
                    if not isinstance(event, Received | chaperone.Welcome):
                        raise AssertionError(f"what is a {type(event)}?")


def run_image(data: bytes) -> None:
    for stream in (False, True):
        reader = FrameReader(stream=stream)
        with contextlib.suppress(ImageError):
            for frame in reader.feed(data):
                if frame.kind == Kind.PAGES:
                    frame.pages()
                frame.release()


def refit_image(data: bytes) -> bytes:
    """With the digests of all frames as far as they can be found, so that what is behind them is reached."""
    fitted, place = bytearray(data), frames.PREAMBLE.size
    while place + frames.HEADER.size <= len(fitted):
        raw = bytes(fitted[place : place + frames.HEADER.size])
        try:
            header = frames.parse_header(raw, place, stream=True)
        except ImageError:
            break
        body = place + frames.HEADER.size
        record = fitted[body : body + header.record_length]
        begin = body + header.record_length + header.padding
        digest = frames.digest(raw, bytes(record), bytes(fitted[begin : header.end]))
        fitted[place + frames.HEADER_DIGESTED : body] = digest
        place = header.end
    return bytes(fitted)


def image(*, stream: bool) -> bytes:
    writer = FrameWriter(stream=stream)
    pages = PageRun(space=Space.MEMORY, id=7, runs=((0x1000, 4096),), data=memoryview(bytes(4096)))
    parts = (
        writer.begin(),
        writer.frame(Kind.TREE, QUIET),
        writer.pages(pages),
        writer.frame(Kind.FILES_DELTA, RECORD),
        writer.end(),
    )
    return b"".join(bytes(buffer) for part in parts for buffer in part)


def run_message(data: bytes) -> None:
    with contextlib.suppress(BadFrame):
        wire.decode(data, zlib.crc32(data))
    with contextlib.suppress(BadFrame):
        wire.parse_header(data[: wire.HEADER.size].ljust(wire.HEADER.size, b"\0"))


def _migration_seeds() -> tuple[bytes, ...]:
    facts = migration.HostFacts(
        boot_id="b", network=1, pids=2, kernel="6", page_size=4096, cpu=migration.CpuState(machine="m")
    )
    needs = migration.Needs(
        trees=(migration.TreeNeed(root=5, pids=(5, 6), tids=(5, 6, 7)),),
        addresses=(
            AddressRecord(
                address="10.0.0.1", prefixlen=24, interface="eth0", scope=0, flags=128, label="eth0", broadcast=""
            ),
        ),
        features=frozenset({"avx"}),
    )
    failure = migration.Failure(code="TM-0600", message="m", object="o", fix="f")
    lost = (migration.Lost(connection=str(V6), reason="r"),)
    return tuple(
        codec.pack(message)
        for message in (
            migration.Hello(lowest=1, highest=2, host=facts),
            migration.Check(migration="m", needs=needs, map_dev={"a": "b"}),
            migration.Captured(segments=(b"segment",)),
            migration.Running(migration="m", token=bytes(16), released_ns=5, pids={5: 6}, lost=lost),
            migration.Abort(migration="m", failure=failure),
        )
    )


CHAPERONE_MESSAGES = (
    chaperone.Hello(),
    chaperone.Get(number=1, conn=str(V4), keywords=("tcp.nodelay",)),
    chaperone.Freeze(number=2),
    chaperone.Rebuild(number=3, record=RECORDS[0], elapsed=1.5),
    chaperone.Discard(number=4, conn=str(V6), anyway=True),
    chaperone.Failed(number=5, code="TM-0261", message="m"),
)


def refit_length(data: bytes) -> bytes:
    """With the length that the frame has."""
    return struct.pack("!I", max(0, len(data) - 4)) + data[4:]


TARGETS: dict[str, Target] = {
    "record": Target(run_record, RECORDS),
    "codec": Target(
        run_codec,
        (
            *RECORDS,
            codec.pack(QUIET),
            codec.pack(Note(conn_id=V4, uid=1, cookie=2, state=QUIET, rules={2: 5}, host="h")),
            *map(codec.pack, CHAPERONE_MESSAGES),
            *_migration_seeds(),
        ),
    ),
    "chaperone": Target(run_chaperone, tuple(map(encode, CHAPERONE_MESSAGES)), tail=4, refit=refit_length),
    "image": Target(run_image, (image(stream=False), image(stream=True)), refit=refit_image),
    "message": Target(run_message, _migration_seeds()),
}
