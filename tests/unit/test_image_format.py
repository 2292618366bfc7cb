"""The image container: round trips in any chunks, and every way in which bytes can be wrong."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import xxhash
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.errors import (
    BadImageRecord,
    ForeignImage,
    ImageDamaged,
    ImageError,
    ImageLimitExceeded,
    ImageTruncated,
    OtherImageVersion,
    UnknownFrameKind,
)
from checkpoint.image import frames
from checkpoint.image.format import (
    DATA_MAX,
    Frame,
    FrameReader,
    FrameWriter,
    Kind,
    PageRun,
    Runs,
    Space,
    page_frames,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    text: str
    number: int = 0


def run(start: int, data: bytes, pid: int = 7) -> PageRun:
    return PageRun(space=Space.MEMORY, id=pid, runs=((start, len(data)),), data=memoryview(data))


def join(*parts: list[frames.Buffer]) -> bytes:
    return b"".join(bytes(b) for part in parts for b in part)


def small_image(*, stream: bool = False) -> bytes:
    writer = FrameWriter(stream=stream)
    return join(
        writer.begin(),
        writer.frame(Kind.TREE, Note(text="tree", number=5)),
        writer.pages(run(0x1000, b"p" * 4096)),
        writer.frame(Kind.FILES_DELTA, Note(text="late")),
        writer.end(),
    )


def read(data: bytes, **options: object) -> list[Frame]:
    reader = FrameReader(**options)  # type: ignore[arg-type]
    found = reader.feed(data)
    reader.close()
    return found


def resigned(*parts: tuple[str, int, bytes, bytes]) -> bytes:
    """An image with right digests made of (kind, flags, packed record, data)."""
    out = bytearray(frames.pack_preamble())
    root, offsets = frames.root_state(), []
    for kind, flags, record, data in parts:
        raw = frames.pack_header(kind, flags, len(record), len(data), len(out))
        digest = frames.digest(raw, record, data)
        offsets.append(len(out))
        root.update(digest)
        padding = frames.parse_header(raw + digest, len(out)).padding
        out += raw + digest + record + bytes(padding) + data
    record = frames.codec.pack(frames.End(index=struct.pack(f"<{len(offsets)}Q", *offsets), root=root.digest()))
    raw = frames.pack_header(Kind.END, 0, len(record), 0, len(out))
    place = len(out)
    out += raw + frames.digest(raw, record, b"") + record + frames.pack_trailer(place)
    return bytes(out)


def test_round_trip() -> None:
    found = read(small_image())
    assert [f.kind for f in found] == [Kind.TREE, Kind.PAGES, Kind.FILES_DELTA, Kind.END]
    assert found[0].decode(Note) == Note(text="tree", number=5)
    pages = found[1].pages()
    assert (pages.space, pages.id, pages.runs) == (Space.MEMORY, 7, ((0x1000, 4096),))
    assert bytes(pages.data) == b"p" * 4096


def test_page_data_begin_on_a_page_boundary_and_are_not_copied() -> None:
    writer = FrameWriter()
    data = bytearray(b"x" * 8192)
    page = PageRun(space=Space.CONTENT, id=0, runs=((0, 8192),), data=memoryview(data))
    before = join(writer.begin(), writer.frame(Kind.FILES, Note(text="f" * 5000)))
    buffers = writer.pages(page)
    assert isinstance(buffers[-1], memoryview)
    assert buffers[-1].obj is data
    assert (len(before) + sum(len(b) for b in buffers[:-1])) % 4096 == 0


@pytest.mark.parametrize("stream", [False, True])
def test_every_flipped_byte_is_an_image_error(stream: bool) -> None:
    image = bytearray(small_image(stream=stream))
    for i in range(len(image)):
        for flip in (0x01, 0x80) if i % 16 else (0x01, 0x20, 0x80, 0xFF):
            image[i] ^= flip
            with pytest.raises(ImageError):
                read(bytes(image), stream=stream)
            image[i] ^= flip
    read(bytes(image), stream=stream)


def test_a_stream_has_checksums_and_a_file_has_not() -> None:
    image = small_image(stream=True)
    assert [f.kind for f in read(image, stream=True)] == [f.kind for f in read(small_image(), stream=True)]
    with pytest.raises(OtherImageVersion, match="flags 0x2"):
        read(image)
    record, data = b"r" * 100, b"d" * 4096
    with_checksums = frames.pack_header("PAGES", frames.Flag.CHECKSUM, len(record), len(data), 0)
    plain = frames.pack_header("PAGES", 0, len(record), len(data), 0)
    sums = struct.pack("<QQ", xxhash.xxh3_64_intdigest(record), xxhash.xxh3_64_intdigest(data))
    context = "tcpmig 2026-11-27 image version 3: digest of a frame"
    expected = [
        blake3(text, derive_key_context=context).digest() for text in (with_checksums + sums, plain + record + data)
    ]
    assert [frames.digest(with_checksums, record, data), frames.digest(plain, record, data)] == expected


def test_every_truncation_is_named() -> None:
    image = small_image()
    for length in range(len(image)):
        with pytest.raises(ImageTruncated):
            read(image[:length])


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(max_size=40), max_size=4),
    pages=st.lists(st.integers(1, 3), max_size=4),
    cuts=st.lists(st.integers(1, 6000), max_size=60),
    direct=st.booleans(),
)
def test_any_chunks_give_the_same_frames(texts: list[str], pages: list[int], cuts: list[int], direct: bool) -> None:
    writer = FrameWriter()
    parts = [writer.begin()]
    parts += [writer.frame(Kind.TREE, Note(text=t)) for t in texts]
    parts += [writer.pages(run(0x10000 * (i + 1), bytes([i]) * 4096 * n)) for i, n in enumerate(pages)]
    parts.append(writer.end())
    image = join(*parts)
    assert len(image) == writer.offset
    reader = FrameReader()
    seen: list[tuple[str, bytes, bytes]] = []
    at = 0
    for cut in [*cuts, *[4096] * (len(image) // 4096 + 1), len(image)]:
        if direct:
            into = reader.buffer()
            piece = image[at : at + min(cut, len(into))]
            into[: len(piece)] = piece
            found = reader.received(len(piece)) if piece else []
        else:
            piece = image[at : at + cut]
            found = reader.feed(piece)
        at += len(piece)
        for frame in found:
            seen.append((frame.kind, bytes(frame.record), bytes(frame.data)))
            frame.release()
    while at < len(image):
        piece = image[at : at + len(reader.buffer())]
        reader.buffer()[: len(piece)] = piece
        seen += [(f.kind, bytes(f.record), bytes(f.data)) for f in reader.received(len(piece))]
        at += len(piece)
    reader.close()
    assert seen == [(f.kind, bytes(f.record), bytes(f.data)) for f in read(image)]
    assert len(seen) == len(texts) + len(pages) + 1


@settings(max_examples=200, deadline=None)
@given(noise=st.binary(max_size=300), keep=st.integers(0, 120))
def test_noise_gives_image_errors_only(noise: bytes, keep: int) -> None:
    with pytest.raises(ImageError):
        read(small_image()[:keep] + noise)


def test_bytes_behind_the_image_are_kept_for_the_caller() -> None:
    reader = FrameReader()
    reader.feed(small_image() + b"next")
    reader.close()
    assert reader.rest == b"next"
    assert reader.end is not None


def test_foreign_and_other_version_are_named() -> None:
    with pytest.raises(ForeignImage):
        read(b"bash: warning: setlocale: cannot change locale\n")
    image = bytearray(small_image())
    image[8] = frames.VERSION + 1
    with pytest.raises(OtherImageVersion, match=f"version {frames.VERSION + 1}"):
        read(bytes(image))


def test_unknown_kinds_are_skipped_if_optional_and_else_refused_by_name() -> None:
    note = frames.codec.pack(Note(text="n"))
    assert [f.kind for f in read(resigned(("LATER", 1, note, b"x" * 100), ("TREE", 0, note, b"")))] == ["TREE", "END"]
    with pytest.raises(UnknownFrameKind, match="LATER"):
        read(resigned(("LATER", 0, note, b"")))
    assert [f.kind for f in read(resigned(("LATER", 0, note, b"")), known=frozenset({"LATER"}))] == ["LATER", "END"]


def test_unknown_flags_are_of_another_version() -> None:
    with pytest.raises(OtherImageVersion, match="flags"):
        read(frames.pack_preamble() + struct.pack("<16sIIII32s", b"TREE", 4, 0, 0, 0, b""))


@pytest.mark.parametrize(
    ("record", "data", "error"),
    [
        (frames.RECORD_MAX + 1, 0, ImageLimitExceeded),
        (0xFFFFFFFF, 0, ImageLimitExceeded),
        (0, DATA_MAX + 1, ImageLimitExceeded),
        (0, 0xFFFFFFFF, ImageLimitExceeded),
        (0, 1, ImageDamaged),
    ],
)
def test_hostile_lengths_are_refused_before_they_are_used(record: int, data: int, error: type[ImageError]) -> None:
    with pytest.raises(error):
        read(frames.pack_preamble() + struct.pack("<16sIIII32s", b"TREE", 0, record, 0, data, b""))


def test_an_announced_record_takes_no_memory_before_it_comes() -> None:
    reader = FrameReader()
    reader.feed(frames.pack_preamble() + struct.pack("<16sIIII32s", b"TREE", 0, frames.RECORD_MAX, 0, 0, b""))
    assert reader.feed(b"x" * 100) == []
    assert reader._piece.__sizeof__() < 4096
    with pytest.raises(ImageTruncated):
        reader.close()


@pytest.mark.parametrize("kind", [b"", b"tree", b"TREE TREE", b"TR\0EE", b"1TREE", b"\xc3\x84", b"A" * 15 + b"\xff"])
def test_names_of_kinds_are_checked(kind: bytes) -> None:
    with pytest.raises(ImageDamaged):
        read(frames.pack_preamble() + struct.pack("<16sIIII32s", kind, 0, 0, 0, 0, b""))


def test_frames_left_out_doubled_or_swapped_are_found() -> None:
    note = frames.codec.pack(Note(text="n"))
    whole = resigned(("TREE", 0, note, b""), ("FILES", 0, note, b""))
    size = frames.HEADER.size + len(note)
    first, second, rest = whole[16 : 16 + size], whole[16 + size : 16 + 2 * size], whole[16 + 2 * size :]
    for frames_ in (first + first, second + first, first, first + second + second):
        with pytest.raises(ImageDamaged):
            read(whole[:16] + frames_ + rest)


@pytest.mark.parametrize(
    "runs",
    [
        ((0x1000, 0),),
        ((0x1000, -4096),),
        ((0x1001, 4096),),
        ((0x1000, 4095),),
        ((-4096, 4096),),
        ((0x2000, 4096), (0x1000, 4096)),
        ((0x1000, 8192), (0x2000, 4096)),
        (((1 << 63) - 4096, 8192),),
    ],
)
def test_hostile_runs_are_bad_records(runs: tuple[tuple[int, int], ...]) -> None:
    record = frames.codec.pack({"space": "memory", "id": 1, "runs": runs})
    frame = read(resigned(("PAGES", 0, record, b"x" * 4096)))[0]
    with pytest.raises(BadImageRecord):
        frame.pages()


@pytest.mark.parametrize(
    "record",
    [
        {"space": "memory", "id": True, "runs": ((0, 4096),)},
        {"space": "memory", "id": 1, "runs": ((0, 4096.0),)},
        {"space": "memory", "id": 1, "runs": ((0,), (4096,))},
        {"space": "memory", "id": 1, "runs": ("ab",)},
        {"space": "memory", "id": 1, "runs": {0: 4096}},
        {"space": "memory", "id": 1, "runs": 5},
        {"space": "other", "id": 1, "runs": ()},
        {"space": ["memory"], "id": 1, "runs": ()},
        {"space": "memory", "id": 1},
        [1, 2, 3],
        7,
    ],
)
def test_what_is_no_record_of_runs(record: object) -> None:
    frame = read(resigned(("PAGES", 0, frames.codec.pack(record), b"x" * 4096)))[0]
    with pytest.raises(BadImageRecord):
        frame.pages()


def test_runs_are_written_as_the_codec_writes_them() -> None:
    runs = Runs(space=Space.CONTENT, id=3, runs=((0, 5), (4096, 1 << 40)))
    assert runs.pack() == frames.codec.pack(runs)
    assert Runs.unpack(runs.pack()) == runs == frames.codec.unpack(Runs, runs.pack())


def test_runs_must_tell_of_exactly_the_data() -> None:
    record = frames.codec.pack(Runs(space=Space.MEMORY, id=1, runs=((0x1000, 8192),)))
    frame = read(resigned(("PAGES", 0, record, b"x" * 4096)))[0]
    with pytest.raises(BadImageRecord, match="8192"):
        frame.pages()
    with pytest.raises(ValueError, match="8192"):
        FrameWriter().pages(PageRun(space=Space.MEMORY, id=1, runs=((0, 8192),), data=memoryview(b"x" * 4096)))


def test_a_page_record_of_great_length_is_not_decoded() -> None:
    frame = read(resigned(("PAGES", 0, b"\xc0" * (frames.PAGE_RECORD_MAX + 1), b"x" * 4096)))[0]
    with pytest.raises(ImageLimitExceeded):
        frame.pages()


def test_a_record_that_does_not_fit_is_an_image_error() -> None:
    with pytest.raises(BadImageRecord, match="TREE"):
        read(resigned(("TREE", 0, frames.codec.pack({"text": 5}), b"")))[0].decode(Note)


def test_after_an_error_the_reader_only_repeats_it() -> None:
    reader = FrameReader()
    with pytest.raises(ForeignImage):
        reader.feed(b"x" * 16)
    with pytest.raises(ForeignImage):
        reader.feed(small_image())
    with pytest.raises(ForeignImage):
        reader.close()


def test_digests_by_other_threads_give_the_same_image_and_find_damage_before_end() -> None:
    blocks = [bytes([i]) * (1 << 16) for i in range(40)]
    with ThreadPoolExecutor(2) as pool:
        writer = FrameWriter()
        runs = [run((i + 1) << 20, block) for i, block in enumerate(blocks)]
        image = bytearray(join(writer.begin(), *page_frames(writer, runs, pool), writer.end()))
        plain = FrameWriter()
        same = join(plain.begin(), *page_frames(plain, runs), plain.end())
        assert image == same
        seen = []
        reader = FrameReader(executor=pool)
        for at in range(0, len(image), 50000):
            for frame in reader.feed(image[at : at + 50000]):
                if frame.kind == Kind.PAGES:
                    seen.append(bytes(frame.data))
                    frame.release()
        reader.close()
        assert seen == blocks
        image[-200000] ^= 1
        reader = FrameReader(executor=pool)
        with pytest.raises(ImageDamaged):
            reader.feed(image)


def test_the_signature_is_of_the_root_and_stands_in_end() -> None:
    writer = FrameWriter()
    signed: list[bytes] = []
    image = join(writer.begin(), writer.end(lambda root: (signed.append(root), b"s" * 64)[1]))
    reader = FrameReader()
    reader.feed(image)
    assert reader.end is not None
    assert (reader.end.root, reader.end.signature) == (signed[0], b"s" * 64)


def test_the_writer_keeps_the_order_of_its_calls() -> None:
    writer = FrameWriter()
    with pytest.raises(RuntimeError):
        writer.frame(Kind.TREE, Note(text=""))
    writer.begin()
    with pytest.raises(RuntimeError):
        writer.begin()
    with pytest.raises(ValueError, match="kind"):
        writer.frame("lower case", Note(text=""))
