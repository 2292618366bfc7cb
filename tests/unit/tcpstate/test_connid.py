import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstate.connid import ConnId
from tcpstate.errors import ConnIdSyntax

PORTS = st.integers(0, 65535)
V4 = st.ip_addresses(v=4).map(str)
V6 = st.ip_addresses(v=6).map(str)


@pytest.mark.parametrize(
    "text",
    [
        "tcp:10.0.0.5:6379-10.0.0.9:51514",
        "tcp:[fd00::5]:6379-[fd00::9]:51514",
        "tcp:[fe80::1%eth0]:1-[fe80::2%eth0]:2",
    ],
)
def test_text_comes_back(text):
    assert str(ConnId.parse(text)) == text


@given(st.one_of(st.tuples(V4, PORTS, V4, PORTS), st.tuples(V6, PORTS, V6, PORTS)))
def test_every_conn_id_parses(ends):
    try:
        made = ConnId.tcp(*ends)
    except ValueError:
        # two IPv6 addresses of which one is a v4-mapped one
        assert "::ffff:" in ends[0] + ends[2]
        return
    assert ConnId.parse(str(made)) == made
    assert made.reversed().reversed() == made


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp:",
        "udp:10.0.0.5:1-10.0.0.9:2",
        "tcp:10.0.0.5:1",
        "tcp:10.0.0.256:1-10.0.0.9:2",
        "tcp:10.0.0.5:65536-10.0.0.9:2",
        "tcp:10.0.0.5:-1-10.0.0.9:2",
        "tcp:[10.0.0.5]:1-10.0.0.9:2",
        "tcp:fd00::5:1-fd00::9:2",
        "tcp:[fd00::5]:1-10.0.0.9:2",
        "tcp:10.0.0.5:1-10.0.0.9:2x",
        "tcp:10.0.0.5:1-10.0.0.9:\u0662",
    ],
)
def test_what_is_no_conn_id_is_refused_by_name(text):
    with pytest.raises(ConnIdSyntax) as caught:
        ConnId.parse(text)
    assert caught.value.object == text


@given(st.text())
def test_any_text_gives_a_conn_id_or_that_error(text):
    with contextlib.suppress(ConnIdSyntax):
        ConnId.parse(text)


def test_mapped_and_spelled_out_addresses_have_one_form():
    assert ConnId.tcp("::ffff:10.0.0.5", 1, "::ffff:10.0.0.9", 2) == ConnId.parse("tcp:10.0.0.5:1-10.0.0.9:2")
    assert ConnId.tcp("FD00:0::5", 1, "fd00::9", 2).local == "fd00::5"
