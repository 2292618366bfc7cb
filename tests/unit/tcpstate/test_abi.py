"""Structs and tables of the kernel's ABI, from bytes alone."""

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstate.kernel import bpf
from tcpstate.kernel.netlink import attribute, attributes
from tcpstate.kernel.sockets import pack_address, unpack_address
from tcpstate.kernel.tcp import InfoOption, RepairWindow, TcpInfo, repair_options
from tcpstate.options import EXCLUDED, TABLE, Format, Option


@pytest.mark.parametrize("length", [104, 232, 248, 280])
def test_tcp_info_of_each_kernel(length):
    data = bytearray(length)
    data[0], data[5], data[6] = 1, 7, 9 | 10 << 4
    for i in range(24):
        struct.pack_into("I", data, 8 + 4 * i, 1000 + i)
    if length >= 236:
        struct.pack_into("II", data, 228, 77, 88)
    info = TcpInfo.unpack(bytes(data))
    assert (info.state, info.snd_wscale, info.rcv_wscale) == (1, 9, 10)
    assert info.options == InfoOption.TIMESTAMPS | InfoOption.SACK | InfoOption.WSCALE
    assert (info.rto, info.snd_mss, info.pmtu, info.rtt, info.snd_cwnd, info.total_retrans) == (
        1000, 1002, 1013, 1015, 1018, 1023,
    )  # fmt: skip
    assert info.rcv_wnd == (88 if length >= 236 else None)
    assert (info.min_rtt is None) == (length == 104)


def test_tcp_info_that_is_too_short():
    with pytest.raises(ValueError, match="103"):
        TcpInfo.unpack(bytes(103))


def test_repair_structs_have_the_kernels_layout():
    window = RepairWindow(snd_wl1=1, snd_wnd=2, max_window=3, rcv_wnd=4, rcv_wup=5)
    assert window.pack() == struct.pack("5I", 1, 2, 3, 4, 5)
    assert RepairWindow.unpack(window.pack()) == window
    assert repair_options(1460, wscale=(7, 10), sack=True, timestamps=True) == struct.pack(
        "8I", 4, 0, 3, 7 | 10 << 16, 8, 0, 2, 1460
    )
    assert repair_options(536, wscale=None, sack=False, timestamps=False) == struct.pack("2I", 2, 536)


@pytest.mark.parametrize(
    ("family", "address", "back"),
    [
        (socket.AF_INET, "10.0.0.5", "10.0.0.5"),
        (socket.AF_INET6, "fd00::5", "fd00::5"),
        (socket.AF_INET6, "10.0.0.5", "10.0.0.5"),
    ],
)
def test_addresses_come_back(family, address, back):
    packed = pack_address(address, 7000, family=family, flow_info=3 if family == socket.AF_INET6 else 0, scope=0)
    assert unpack_address(packed)[:2] == (back, 7000)
    assert len(packed) == (16 if family == socket.AF_INET else 28)


@given(st.lists(st.tuples(st.integers(1, 0x3FFF), st.binary(max_size=40))))
def test_netlink_attributes_come_back(pairs):
    assert list(attributes(b"".join(attribute(*pair) for pair in pairs))) == pairs


@given(st.binary(max_size=60))
def test_any_bytes_as_attributes_come_to_an_end(data):
    list(attributes(data))


def test_filters_come_back():
    code = ((0x30, 0, 0, 13), (0x15, 1, 2, 0xFFFFFFFF), (6, 0, 0, 0))
    assert bpf.unpack(bpf.pack(code)) == code
    with pytest.raises(ValueError, match="whole"):
        bpf.unpack(bytes(9))


def test_options_table_has_no_doubles_and_every_exclusion_a_reason():
    assert len({o.keyword for o in TABLE}) == len(TABLE)
    assert len({(o.level, o.number) for o in TABLE}) == len(TABLE)
    assert not {(o.level, o.number) for o in TABLE} & set(EXCLUDED)
    assert all(EXCLUDED.values())


@pytest.mark.parametrize("option", [o for o in TABLE if o.format is not Format.BYTES], ids=lambda o: o.keyword)
def test_option_values_come_back(option: Option):
    value = (1, 2)[: len(option.format.value)]
    assert option.decode(option.encode(value)) == value
    with pytest.raises(ValueError, match=option.keyword):
        option.encode((1, 2, 3))
