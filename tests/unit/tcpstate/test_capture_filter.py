"""The capture's filter, run by a small interpreter of classic BPF on packets."""

import pytest

from tcpstate.capture import _filter
from tcpstate.kernel.bpf import Ancillary, Op
from tcpstate.kernel.packet import ARPHRD_LOOPBACK, PACKET_OUTGOING
from tcpstate.segment import Flag, Segment, build

ETHERNET = 1


def run(program, packet, *, kind=0, hardware=ETHERNET):
    """What the kernel would return; 0 as soon as a load lies outside the packet."""
    a = x = at = 0
    while True:
        code, jt, jf, k = program[at]
        at += 1
        if code == Op.RETURN:
            return k
        if code in (Op.LOAD_WORD, Op.LOAD_HALF) and k in (Ancillary.PKTTYPE, Ancillary.HATYPE):
            a = kind if k == Ancillary.PKTTYPE else hardware
        elif code in (Op.LOAD_WORD, Op.LOAD_BYTE, Op.LOAD_BYTE_X, Op.LOAD_HALF_X):
            size = {Op.LOAD_WORD: 4, Op.LOAD_HALF_X: 2}.get(code, 1)
            start = k + (0 if code in (Op.LOAD_WORD, Op.LOAD_BYTE) else x)
            if start + size > len(packet):
                return 0
            a = int.from_bytes(packet[start : start + size], "big")
        elif code == Op.LOAD_X_HEADER:
            if k >= len(packet):
                return 0
            x = 4 * (packet[k] & 15)
        elif code == Op.SET_X:
            x = k
        elif code == Op.AND:
            a &= k
        elif code == Op.SHIFT_RIGHT:
            a >>= k
        elif code == Op.JUMP:
            at += k
        elif code == Op.JUMP_EQUAL:
            at += jt if a == k else jf
        else:
            raise AssertionError(f"operation {code:#x}")


def packet(v6=False, flags=Flag.ACK, port=7000):
    ends = ("fd00::9", "fd00::5") if v6 else ("10.0.0.9", "10.0.0.5")
    return build(
        Segment(
            source=ends[0], source_port=51514, destination=ends[1], destination_port=port, seq=1, ack=2,
            flags=int(flags), window=3,
        )
    )  # fmt: skip


@pytest.fixture(params=[False, True], ids=["IPv4", "IPv6"])
def v6(request):
    return request.param


def test_tcp_passes_and_nothing_else(v6):
    program = _filter(syn_only=False, ports=None)
    assert run(program, packet(v6))
    other = bytearray(packet(v6))
    other[6 if v6 else 9] = 17
    assert not run(program, bytes(other))
    assert not run(program, b"\0" * 40)
    assert not run(program, b"")


def test_what_we_send_and_loopback_are_left_out(v6):
    program = _filter(syn_only=False, ports=None)
    assert not run(program, packet(v6), kind=PACKET_OUTGOING)
    assert not run(program, packet(v6), hardware=ARPHRD_LOOPBACK)


def test_syn_only_takes_what_begins_a_connection(v6):
    program = _filter(syn_only=True, ports=None)
    assert run(program, packet(v6, Flag.SYN))
    assert run(program, packet(v6, Flag.SYN | Flag.ECE | Flag.CWR))
    assert not run(program, packet(v6, Flag.SYN | Flag.ACK))
    assert not run(program, packet(v6, Flag.ACK))


@pytest.mark.parametrize("syn_only", [False, True])
def test_frames_for_other_hosts_are_left_out(v6, syn_only):
    other_host = 3  # linux/if_packet.h PACKET_OTHERHOST
    program = _filter(syn_only=syn_only, ports=None)
    assert not run(program, packet(v6, Flag.SYN), kind=other_host)


def test_syn_only_takes_the_answers_that_leave(v6):
    program = _filter(syn_only=True, ports={51514})
    assert run(program, packet(v6, Flag.SYN | Flag.ACK), kind=PACKET_OUTGOING)
    assert not run(program, packet(v6, Flag.SYN), kind=PACKET_OUTGOING)


@pytest.mark.parametrize("syn_only", [False, True])
def test_only_the_wanted_ports(v6, syn_only):
    program = _filter(syn_only=syn_only, ports=set(range(6000, 6900)))
    assert run(program, packet(v6, Flag.SYN, 6899))
    assert not run(program, packet(v6, Flag.SYN, 7000))
    assert not run(_filter(syn_only=False, ports=()), packet(v6))


def test_more_ports_than_a_program_holds_take_all(v6):
    assert run(_filter(syn_only=False, ports=range(1, 3000)), packet(v6, port=60000))


def test_ip_options_move_the_header():
    plain = packet(flags=Flag.SYN)
    longer = bytes([0x47]) + plain[1:20] + b"\1" * 8 + plain[20:]
    assert run(_filter(syn_only=True, ports={7000}), longer)


NEAR = ["10.0.0.4", "10.0.0.6", "fd00::4", "fd00::6", "fd00::1:0:0:5", "fd00:0:0:1::5"]


def test_only_the_wanted_addresses(v6):
    mine = "fd00::5" if v6 else "10.0.0.5"
    for addresses in ([mine], [*NEAR, mine], [mine, *NEAR]):
        assert run(_filter(syn_only=False, ports={7000}, addresses=addresses), packet(v6))
        assert not run(_filter(syn_only=False, ports={7001}, addresses=addresses), packet(v6))
    for addresses in (NEAR, [], ["10.0.0.9", "fd00::9"], ["fd00::5"] if not v6 else ["10.0.0.5"]):
        assert not run(_filter(syn_only=False, ports={7000}, addresses=addresses), packet(v6))


def test_addresses_are_meant_without_scope_and_as_packets_have_them():
    assert run(_filter(syn_only=False, ports=None, addresses=["::ffff:10.0.0.5"]), packet())
    assert run(_filter(syn_only=False, ports=None, addresses=["fd00::5%eth0"]), packet(v6=True))


def test_of_what_leaves_the_source_is_judged(v6):
    near, far = ("fd00::9", "fd00::5") if v6 else ("10.0.0.9", "10.0.0.5")
    leaving = {"kind": PACKET_OUTGOING}
    assert run(_filter(syn_only=True, ports={51514}, addresses=[near]), packet(v6, Flag.SYN | Flag.ACK), **leaving)
    assert not run(_filter(syn_only=True, ports={51514}, addresses=[far]), packet(v6, Flag.SYN | Flag.ACK), **leaving)


def test_more_addresses_than_a_program_holds_take_all(v6):
    many = [f"192.0.2.{n}" for n in range(101)]
    assert run(_filter(syn_only=False, ports={7000}, addresses=many), packet(v6))
    assert not run(_filter(syn_only=False, ports={7000}, addresses=many[:100]), packet(v6))
