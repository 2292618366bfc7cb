import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstate import codec
from tcpstate.errors import BadRecord
from tcpstate.segment import Flag, Segment, before, build, checksum, intact, parse, split, timestamp_option

U16, U32 = st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF)
ENDS = st.sampled_from([("10.0.0.9", "10.0.0.5"), ("fd00::9", "fd00::5")])


@st.composite
def segments(draw, payload=300):
    source, destination = draw(ENDS)
    return Segment(
        source=source,
        source_port=draw(U16),
        destination=destination,
        destination_port=draw(U16),
        seq=draw(U32),
        ack=draw(U32),
        flags=draw(st.integers(0, 0xFF)),
        window=draw(U16),
        urgent=draw(U16),
        options=draw(st.sampled_from([b"", timestamp_option(5, 6), b"\1\1\5\12" + bytes(8)])),
        payload=draw(st.binary(max_size=payload)),
    )


@given(segments())
def test_what_is_built_parses_to_the_same(segment):
    assert parse(build(segment)) == segment


@given(segments())
def test_checksums_verify(segment):
    packet = build(segment)
    if segment.source == "10.0.0.9":
        assert checksum(packet[:20]) == 0
        head, body = packet[12:20] + struct.pack("!HH", 6, len(packet) - 20), packet[20:]
    else:
        head, body = packet[8:40] + struct.pack("!II", len(packet) - 40, 6), packet[40:]
    assert checksum(head + body) == 0


def test_checksum_of_the_example_in_rfc_1071():
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF ^ 0xDDF2


@given(st.binary(max_size=200))
def test_checksum_is_the_sum_of_words(data):
    padded = data + bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert checksum(data) == ~total & 0xFFFF


@given(st.binary(max_size=120))
def test_any_bytes_parse_or_do_not(data):
    parse(data)


@given(segments(), st.data())
def test_a_truncated_or_flipped_packet_never_raises(segment, data):
    packet = bytearray(build(segment))
    parse(bytes(packet[: data.draw(st.integers(0, len(packet)))]))
    packet[data.draw(st.integers(0, len(packet) - 1))] ^= data.draw(st.integers(1, 255))
    parse(bytes(packet))


@given(segments(), st.data())
def test_an_altered_packet_is_not_intact(segment, data):
    packet = bytearray(build(segment))
    assert intact(bytes(packet))
    assert intact(memoryview(bytes(packet) + bytes(6)))  # Ethernet pads short packets
    start = len(packet) - 20 - len(segment.options) - len(segment.payload)
    at = data.draw(st.integers(start, len(packet) - 1).filter(lambda at: at != start + 12))  # not the header's length
    packet[at] ^= data.draw(st.integers(1, 255))
    assert parse(bytes(packet)) is None or not intact(bytes(packet))


def test_fragments_and_other_protocols_are_not_ours():
    packet = bytearray(build(example()))
    packet[9] = 17
    assert parse(bytes(packet)) is None
    packet[9], packet[6] = 6, 0x20
    assert parse(bytes(packet)) is None


def example(**change):
    known = {
        "source": "10.0.0.9",
        "source_port": 1,
        "destination": "10.0.0.5",
        "destination_port": 2,
        "seq": 0xFFFFFFF0,
        "ack": 7,
        "flags": int(Flag.ACK | Flag.PSH | Flag.FIN),
        "window": 9,
        "payload": bytes(range(100)),
    }
    return Segment(**(known | change))


def test_merged_packet_with_length_zero_is_as_long_as_it_is():
    packet = bytearray(build(example()))
    packet[2:4] = b"\0\0"
    assert parse(bytes(packet)).payload == bytes(range(100))


@given(segments(payload=1000), st.integers(1, 400))
def test_parts_say_together_what_the_whole_says(segment, size):
    parts = split(segment, size)
    assert b"".join(p.payload for p in parts) == segment.payload
    assert all(len(p.payload) <= size for p in parts)
    at = segment.seq
    for part in parts:
        assert part.seq == at
        at = part.end
    assert at == segment.end
    flags = 0
    for part in parts:
        flags |= part.flags
    assert flags | Flag.URG == segment.flags | Flag.URG
    assert sum(bool(p.flags & Flag.FIN) for p in parts) == bool(segment.flags & Flag.FIN)


def test_sequence_numbers_compare_around_zero():
    assert before(0xFFFFFFF0, 0x10)
    assert not before(0x10, 0xFFFFFFF0)
    assert not before(5, 5)


@pytest.mark.parametrize(
    "change",
    [{"seq": 1 << 32}, {"options": b"123"}, {"options": bytes(44)}, {"source": "::1"}, {"flags": 256}, {"window": -1}],
)
def test_values_that_fit_no_header_are_refused(change):
    with pytest.raises(ValueError):  # noqa: PT011 - any message
        example(**change)


@given(segments())
def test_segments_travel(segment):
    assert codec.unpack(Segment, codec.pack(segment)) == segment


@given(st.binary(max_size=100))
def test_hostile_bytes_are_bad_records(data):
    with contextlib.suppress(BadRecord):
        codec.unpack(Segment, data)


def test_timestamps_are_found_behind_other_options():
    assert example(options=b"\4\2\1\1" + timestamp_option(11, 22)).timestamps == (11, 22)
    assert example(options=b"\1\1\1\0").timestamps is None
    assert example(options=b"\10\12\0\0").timestamps is None
