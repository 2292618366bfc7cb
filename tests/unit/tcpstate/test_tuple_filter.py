"""The filter for one connection's arriving packets, run in a little machine of our own."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from tcpstate.connid import ConnId
from tcpstate.kernel.bpf import Ancillary, Op
from tcpstate.kernel.packet import ARPHRD_LOOPBACK, PACKET_OUTGOING
from tcpstate.segment import Flag, Segment, build
from tcpstate.tuplefilter import FROM_LOOPBACK, arriving

NAMES = ["tcp:10.0.0.1:80-10.0.0.2:40000", "tcp:[fd00::1]:80-[fd00::2]:40000"]


def run(program, packet: bytes, *, outgoing: bool = False, loopback: bool = False) -> int:
    """What the program returns for a packet."""
    told = {Ancillary.PKTTYPE: PACKET_OUTGOING if outgoing else 0, Ancillary.HATYPE: ARPHRD_LOOPBACK if loopback else 1}
    accumulator = x = at = 0
    while True:
        code, yes, no, k = program[at]
        at += 1
        if code == Op.RETURN:
            return k
        if code in (Op.LOAD_WORD, Op.LOAD_HALF, Op.LOAD_BYTE, Op.LOAD_HALF_X):
            if k in told:
                accumulator = told[k]
                continue
            form = {Op.LOAD_WORD: "!I", Op.LOAD_BYTE: "!B"}.get(code, "!H")
            start = k + (x if code == Op.LOAD_HALF_X else 0)
            if start + struct.calcsize(form) > len(packet):
                return 0
            (accumulator,) = struct.unpack_from(form, packet, start)
        elif code == Op.SHIFT_RIGHT:
            accumulator >>= k
        elif code == Op.SET_X:
            x = k
        elif code == Op.LOAD_X_HEADER:
            x = 4 * (packet[k] & 15)
        elif code == Op.JUMP_EQUAL:
            at += yes if accumulator == k else no
        elif code == Op.JUMP_SET:
            at += yes if accumulator & k else no
        else:
            raise AssertionError(f"code {code:#x}")


def packet(name: ConnId, **changes: object) -> bytes:
    segment = Segment(
        source=name.peer, source_port=name.peer_port, destination=name.local, destination_port=name.local_port,
        seq=1, ack=2, flags=int(Flag.ACK), window=3, payload=b"data",
    )  # fmt: skip
    return build(dataclasses.replace(segment, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", NAMES)
def test_only_what_arrives_for_the_connection_passes(text: str) -> None:
    name = ConnId.parse(text)
    program = arriving(name, loopback=False, length=77)
    assert run(program, packet(name)) == 77
    other = "10.0.0.3" if not name.v6 else "fd00::3"
    for changes in (
        {"source": other}, {"destination": other}, {"source_port": 1}, {"destination_port": 1},
    ):  # fmt: skip
        assert run(program, packet(name, **changes)) == 0, changes
    assert run(program, packet(name), outgoing=True) == 0
    assert run(program, packet(name), loopback=True) == 0
    assert run(arriving(name, loopback=True), packet(name), loopback=True) != 0
    assert run(program, packet(name)[:20]) == 0
    assert all(run(program, packet(ConnId.parse(t))) == 0 for t in NAMES if t != text)


def test_a_fragment_is_left_out() -> None:
    name = ConnId.parse(NAMES[0])
    whole = bytearray(packet(name))
    whole[6:8] = (0x2000).to_bytes(2, "big")
    assert run(arriving(name, loopback=False), bytes(whole)) == 0


def test_only_what_we_inject_gets_in() -> None:
    assert run(FROM_LOOPBACK, b"", loopback=True)
    assert not run(FROM_LOOPBACK, b"")
