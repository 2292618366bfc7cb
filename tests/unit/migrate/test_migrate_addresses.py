"""Frames of ARP and neighbour discovery, address records, the choice of an interface, the clock, the command line."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate import hostfacts
from migrate.addresses import AddressRecord, Configuration, InterfaceRecord, parse_address
from migrate.announce import Claim, announcement, claim, probe
from migrate.arrival import choose_interface
from migrate.clock import Offset, elapsed_since
from migrate.errors import AddressSyntax, NoInterfaceForAddress, RshSyntax, from_remote
from migrate.hostfacts import judge_host, without
from migrate.messages import CpuState, HostFacts, Needs, TreeNeed
from migrate.takeover import select
from migrate.transport import remote_words
from migrate.usage import parse_socket_table
from tcpstate import codec
from tcpstate.errors import BadRecord, NoSuchConnection, Outcome
from tcpstate.kernel.rtnetlink import LinkFlag

MAC = "02:00:00:00:00:01"


def test_gratuitous_arp_is_a_request_and_a_reply() -> None:
    request, reply = announcement("10.0.0.5", MAC)
    for frame, operation in ((request, 1), (reply, 2)):
        assert frame[:6] == b"\xff" * 6
        assert frame[6:14] == bytes.fromhex("020000000001") + b"\x08\x06"
        assert struct.unpack("!HHBBH", frame[14:22]) == (1, 0x0800, 6, 4, operation)
        # sender and target protocol address are both the address
        assert frame[28:32] == frame[38:42] == bytes([10, 0, 0, 5])
        assert claim(frame) == Claim("10.0.0.5", MAC)


def test_unsolicited_advertisement() -> None:
    (frame,) = announcement("fd00::5", MAC)
    assert frame[:6] == bytes.fromhex("333300000001")
    assert frame[12:14] == b"\x86\xdd"
    assert frame[20:22] == bytes([58, 255])
    assert (frame[54], frame[58]) == (136, 0x20), "override, neither router nor solicited"
    assert _sum(frame) == 0xFFFF
    assert claim(frame) == Claim("fd00::5", MAC)


def test_probes_claim_nothing() -> None:
    arp = probe("10.0.0.5", MAC)
    assert arp[28:32] == bytes(4)
    assert claim(arp) is None
    solicitation = probe("fd00::12:3456", MAC)
    assert solicitation[:6] == bytes.fromhex("3333ff123456")
    assert solicitation[22:38] == bytes(16)
    assert _sum(solicitation) == 0xFFFF
    assert claim(solicitation) is None


def _sum(frame: bytes) -> int:
    length = struct.unpack("!H", frame[18:20])[0]
    data = frame[22:54] + struct.pack("!II", length, 58) + frame[54:]
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(total)


@given(st.binary(max_size=120))
def test_no_frame_upsets_the_reader(frame: bytes) -> None:
    claim(frame)
    claim(announcement("fd00::1", MAC)[0][:60] + frame)
    claim(announcement("10.0.0.1", MAC)[0][:20] + frame)


@pytest.mark.parametrize(
    "change",
    [
        {"address": "10.0.0.300"},
        {"address": "010.0.0.1"},
        {"address": "fd00:0::1", "prefixlen": 64},
        {"prefixlen": 33},
        {"broadcast": "fd00::1"},
        {"flags": -1},
        {"scope": 256},
        {"label": "a" * 16},
        {"valid": 2**32},
        {"routes": [{"destination": "10.0.0.1/24"}]},
        {"routes": [{"destination": "0.0.0.0/0", "gateway": "x"}]},
    ],
)
def test_hostile_address_records_are_refused(change: dict[str, object]) -> None:
    plain = {"address": "10.0.0.1", "prefixlen": 24, "interface": "eth0"}
    codec.from_plain(AddressRecord, plain)
    with pytest.raises(BadRecord):
        codec.from_plain(AddressRecord, plain | change)


def link(index: int, name: str, *addresses: str, flags: int = LinkFlag.UP) -> InterfaceRecord:
    return InterfaceRecord(
        index=index,
        name=name,
        mac=MAC,
        flags=flags,
        addresses=tuple(
            AddressRecord(address=a.partition("/")[0], prefixlen=int(a.partition("/")[2]), interface=name)
            for a in addresses
        ),
    )


def test_the_interface_is_the_one_with_the_longest_subnet() -> None:
    here = Configuration(
        interfaces=(
            link(1, "lo", "127.0.0.1/8", flags=LinkFlag.UP | LinkFlag.LOOPBACK),
            link(2, "wide", "10.0.0.1/8", "fe80::1/64"),
            link(3, "near", "10.1.2.3/24"),
            link(4, "eth0", "10.1.2.4/24"),
            link(5, "down", "10.1.2.5/25", flags=0),
            link(6, "six", "fd00::1/64"),
        )
    )

    def at(address: str, length: int, **map_dev: str) -> str:
        record = AddressRecord(address=address, prefixlen=length, interface="eth0")
        return choose_interface(record, here, map_dev).name

    assert at("10.1.2.99", 24) == at("10.1.2.99", 32) == "eth0", "among equals the one of the same name"
    assert at("10.9.9.9", 32) == "wide"
    assert at("10.1.0.1", 16) == "eth0", "our address is in its subnet"
    assert at("fd00::7", 128) == "six"
    assert at("10.1.2.99", 24, eth0="near") == "near"
    for address, length in (("192.0.2.1", 24), ("fd01::1", 64), ("fe80::7", 64)):
        with pytest.raises(NoInterfaceForAddress):
            at(address, length)
    for name in ("down", "absent"):
        with pytest.raises(NoInterfaceForAddress):
            at("10.1.2.99", 24, eth0=name)


def test_the_choice_of_addresses() -> None:
    used = ["10.0.0.1", "127.0.0.1", "::1", "::ffff:10.0.0.1", "fd00::1", "0.0.0.0"]
    assert select("auto", used) == ("10.0.0.1", "fd00::1")
    assert select("none", used) == ()
    assert select("10.0.0.9/24, fd00::0009", used) == ("10.0.0.9", "fd00::9")
    for wrong in ("10.0.0", "10.0.0.1/40", "127.0.0.1", "", "host"):
        with pytest.raises(AddressSyntax):
            select(wrong, used)
    assert parse_address("10.0.0.5/24") == ("10.0.0.5", 24)
    assert parse_address("fd00::5") == ("fd00::5", None)


def test_offset_between_two_clocks() -> None:
    offset = Offset()
    assert not offset.known
    offset.exchange(1_000, 501_500, 2_000)
    assert (offset.offset_ns, offset.error_ns) == (500_000, 500)
    # a slower exchange says less
    offset.exchange(3_000, 900_000, 9_000)
    assert offset.offset_ns == 500_000
    offset.exchange(10_000, 510_110, 10_200)
    assert (offset.offset_ns, offset.error_ns) == (500_010, 100)
    assert offset.here(offset.there(77)) == 77
    # but a fresh one says more than one from before
    offset.exchange(10**9, 10**9 + 600_500, 10**9 + 1_000)
    assert offset.offset_ns == 600_000
    with pytest.raises(ValueError, match="before"):
        offset.exchange(5, 5, 4)


@given(st.integers(0, 10**18), st.integers(0, 10**18))
def test_elapsed_time_is_never_negative(then: int, now: int) -> None:
    assert elapsed_since(then, now) >= 0.0


@given(st.integers(-(10**17), 10**17), st.integers(0, 10**9), st.integers(0, 10**9))
def test_the_error_bound_holds(shift: int, there: int, back: int) -> None:
    """Whatever the two directions take, the offset is wrong by the error at most."""
    offset = Offset()
    offset.exchange(10**6, 10**6 + there + shift, 10**6 + there + back)
    assert abs(offset.offset_ns - shift) <= offset.error_ns + 1


def test_the_command_line_of_the_remote_shell() -> None:
    assert remote_words("ssh", "b", "tcpmig receive") == ["ssh", "b", "tcpmig", "receive"]
    assert remote_words("ssh -o 'X Y'", "root@b", "sudo 'my tcpmig' receive") == [
        "ssh", "-o", "X Y", "root@b", "sudo", "'my", "tcpmig'", "receive",
    ]  # fmt: skip
    for rsh, host, remote in (
        ("ssh 'x", "b", "r"),
        ("", "b", "r"),
        ("ssh", "b", " "),
        ("ssh", "-oProxy", "r"),
        ("ssh", "", "r"),
    ):
        with pytest.raises(RshSyntax):
            remote_words(rsh, host, remote)


def test_socket_tables() -> None:
    head = "  sl  local_address rem_address st tx_queue rx_queue tr tm->when retrnsmt uid timeout inode\n"
    table = head + (
        "   0: 0500000A:18EB 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 77 1 0 100 0 0 10 0\n"
        "   1: 0500000A:18EB 0900000A:C93A 01 00000000:00000000 00:00000000 00000000 0 0 78 1 0 100 0 0 10 0\n"
        "   2: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 79 1 0 100 0 0 10 0\n"
        "   3: 0500000A:18EB 0A00000A:C93A 06 00000000:00000000 03:00000000 00000000 0 0 0 3 0 0 0 0 0 0\n"
    )
    listener, connection = parse_socket_table("tcp", table)
    assert (listener.address, listener.port, listener.peer, listener.inode) == ("10.0.0.5", 6379, "", 77)
    assert str(connection) == "tcp 10.0.0.5:6379 to 10.0.0.9:51514"
    mapped = head + (
        "   0: 0000000000000000FFFF00000500000A:18EB 0000000000000000FFFF00000900000A:C93A 01 0:0 0:0 0 0 0 80 1 0\n"
        "   1: 000000FD000000000000000005000000:18EB 000000FD000000000000000009000000:C93A 01 0:0 0:0 0 0 0 81 1 0\n"
    )
    four, six = parse_socket_table("tcp6", mapped)
    assert (four.protocol, four.address) == ("tcp", "10.0.0.5")
    assert str(six) == "tcp [fd00::5]:6379 to [fd00::9]:51514"
    with pytest.raises(ValueError, match="fields"):
        parse_socket_table("tcp", head + " 0: 1 2\n")


def test_another_machine() -> None:
    def host(machine: str = "x86_64", page: int = 4096, flags: str = "sse2 avx2 nopl") -> HostFacts:
        cpu = CpuState(machine=machine, flags=frozenset(flags.split()))
        return HostFacts(boot_id="b", network=1, pids=1, kernel="6", page_size=page, cpu=cpu)

    needs = Needs(trees=(TreeNeed(root=1, pids=(1,), tids=(1,)),))
    assert judge_host(needs, host(), host()) == []
    assert judge_host(needs, host(), host(flags="sse2 avx2 ssse3")) == [], "what the kernel uses does not matter"
    (verdict,) = judge_host(needs, host(), host(flags="sse2"))
    assert (verdict.code, verdict.subject) == ("TM-0616", "cpu")
    assert "avx2" in verdict.text
    assert [v.subject for v in judge_host(needs, host(), host("aarch64", 65536))] == ["machine", "page size"]


def test_features_that_are_not_used_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = CpuState(machine="x86_64", flags=frozenset({"sse2", "avx512f", "avx512vl", "sha_ni"}))
    ours = HostFacts(boot_id="b", network=1, pids=1, kernel="6", page_size=4096, cpu=cpu)
    monkeypatch.setattr(hostfacts, "host_facts", lambda: ours)
    needs = Needs(trees=(TreeNeed(root=1, pids=(1,), tids=(1,)),))
    lesser = replace(ours, cpu=replace(cpu, flags=frozenset({"sse2"})))
    assert without(needs, ()) is needs
    (verdict,) = judge_host(without(needs, ["avx512*"]), ours, lesser)
    assert verdict.text.split()[-1] == "sha_ni"
    assert judge_host(without(needs, ["avx512?*", "sha_ni"]), ours, lesser) == []


def test_errors_of_the_other_host_keep_their_code() -> None:
    known = from_remote("TM-0202", "gone", "tcp:x", "look", otherwise=RshSyntax)
    assert isinstance(known, NoSuchConnection)
    assert (known.message, known.object, known.fix) == ("target: gone", "tcp:x", "look")
    unknown = from_remote("TM-9999", "odd", "", "", otherwise=RshSyntax)
    assert (type(unknown), unknown.outcome) == (RshSyntax, Outcome.USAGE)
    assert unknown.fix == RshSyntax.fix
