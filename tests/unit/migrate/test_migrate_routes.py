"""Routes and rules that travel: their messages, what has no portable form, what hangs on an address, what is told."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.verdict import Status
from migrate.addresses import AddressRecord, Configuration, InterfaceRecord
from migrate.dependents import dependents
from migrate.errors import AddressSyntax
from migrate.routes import RouteRecord, RuleRecord, portable_route, portable_rule, route_body, rule_body
from migrate.takeover import prefix_lengths, remarks
from tcpstate import codec
from tcpstate.errors import BadRecord
from tcpstate.kernel.rtnetlink import INFINITE, RouteAttribute, attribute

NUMBER = st.integers(0, INFINITE)
BYTE = st.integers(0, 255)


@st.composite
def networks(draw: st.DrawFn, version: int) -> str:
    size = 32 if version == 4 else 128
    address = (ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address)(draw(st.integers(0, 2**size - 1)))
    return str(ipaddress.ip_network(f"{address}/{draw(st.integers(0, size))}", strict=False))


@st.composite
def routes(draw: st.DrawFn) -> RouteRecord:
    version = draw(st.sampled_from((4, 6)))
    end = (st.ip_addresses(v=4) if version == 4 else st.ip_addresses(v=6)).map(str)
    return RouteRecord(
        destination=draw(networks(version)),
        gateway=draw(st.just("") | end),
        source=draw(st.just("") | end),
        table=draw(NUMBER),
        priority=draw(NUMBER),
        scope=draw(BYTE),
        protocol=draw(BYTE),
        onlink=draw(st.booleans()),
        metrics=tuple(sorted(draw(st.dictionaries(st.integers(1, 15), NUMBER, max_size=3)).items())),
    )


@given(routes(), st.integers(1, INFINITE))
def test_a_route_reads_back_as_it_was_written(route: RouteRecord, index: int) -> None:
    found = portable_route(route_body(route, index), {index: "eth7"})
    assert found is not None
    assert (found.interface, found.index) == ("eth7", 0)
    assert route_body(found, index) == route_body(route, index)
    assert codec.unpack(RouteRecord, codec.pack(route)) == route


@st.composite
def rules(draw: st.DrawFn) -> RuleRecord:
    version = draw(st.sampled_from((4, 6)))
    end = networks(version).filter(lambda text: not text.endswith("/0"))
    source = draw(st.just("") | end)
    mark = draw(NUMBER)
    return RuleRecord(
        source=source,
        destination=draw(end if not source else st.just("") | end),
        table=draw(NUMBER),
        priority=draw(NUMBER),
        mark=mark,
        mask=draw(NUMBER),
        protocol=draw(BYTE),
    )


@given(rules())
def test_a_rule_reads_back_as_it_was_written(rule: RuleRecord) -> None:
    assert portable_rule(rule_body(rule)) == rule
    assert codec.unpack(RuleRecord, codec.pack(rule)) == rule


@pytest.mark.parametrize(
    "number", [RouteAttribute.MULTIPATH, RouteAttribute.VIA, RouteAttribute.ENCAP, RouteAttribute.NH_ID]
)
def test_what_has_no_portable_form(number: RouteAttribute) -> None:
    body = route_body(RouteRecord(destination="10.0.0.0/8"), 1)
    assert portable_route(body) is not None
    assert portable_route(body + attribute(number, bytes(8))) is None


@pytest.mark.parametrize(
    "extra",
    [attribute(3, b"eth0\0"), attribute(14, struct.pack("=I", 8)), attribute(22, b"\6")],
    ids=["iif", "len", "tcp"],
)
def test_rules_that_look_at_more(extra: bytes) -> None:
    body = rule_body(RuleRecord(source="10.0.0.1/32", table=7))
    assert portable_rule(body) is not None
    assert portable_rule(body + extra) is None


@pytest.mark.parametrize(
    ("record", "field", "value"),
    [
        (RouteRecord(destination="10.0.0.0/8"), "gateway", "fd00::1"),
        (RouteRecord(destination="10.0.0.0/8"), "metrics", [[16, 1]]),
        (RouteRecord(destination="10.0.0.0/8"), "table", 1 << 32),
        (RuleRecord(source="10.0.0.1/32"), "destination", "fd00::/8"),
        (RuleRecord(source="10.0.0.1/32"), "source", ""),
        (RuleRecord(source="10.0.0.1/32"), "protocol", 256),
    ],
)
def test_records_of_another_host_are_checked(record: RouteRecord | RuleRecord, field: str, value: object) -> None:
    plain = codec.to_plain(record)
    assert isinstance(plain, dict)
    plain[field] = value
    with pytest.raises(BadRecord):
        codec.from_plain(type(record), plain)


ADDRESS = AddressRecord(address="10.1.0.5", prefixlen=24, interface="eth0")
OTHER = AddressRecord(address="10.2.0.5", prefixlen=24, interface="eth0")


def host(*routes: RouteRecord, rules: tuple[RuleRecord, ...] = ()) -> Configuration:
    interface = InterfaceRecord(index=2, name="eth0", mac="", flags=1, addresses=(ADDRESS, OTHER))
    return Configuration(
        interfaces=(interface,),
        routes=tuple(route_body(r, 2) for r in routes),
        rules=tuple(rule_body(r) for r in rules),
    )


def test_what_depends_on_an_address() -> None:
    through = RouteRecord(destination="10.8.0.0/16", gateway="10.1.0.254", protocol=4)
    beside = RouteRecord(destination="10.9.0.0/16", gateway="10.2.0.254", protocol=4)
    spoken = RouteRecord(destination="10.7.0.0/16", gateway="10.2.0.254", source="10.1.0.5", protocol=4)
    kernels = RouteRecord(destination="10.1.0.0/24", source="10.1.0.5", protocol=2)
    in_table = RouteRecord(destination="0.0.0.0/0", gateway="10.2.0.254", table=77, protocol=4)
    shared = RouteRecord(destination="0.0.0.0/0", gateway="10.2.0.254", table=78, protocol=4)
    mine = (RuleRecord(source="10.1.0.5/32", table=77), RuleRecord(source="10.1.0.5/32", table=78))
    others = (RuleRecord(source="10.3.0.0/16", table=78), RuleRecord(source="10.1.0.0/24", table=79))
    here = host(through, beside, spoken, kernels, in_table, shared, rules=(*mine, *others))
    found = dependents(here, {"10.1.0.5"}, ADDRESS)
    assert [r.destination for r in found.routes] == ["10.8.0.0/16", "10.7.0.0/16", "0.0.0.0/0"]
    assert [r.destination for r in found.hosts] == ["10.7.0.0/16"]
    assert found.rules == mine
    assert {r.table for r in found.routes} == {254, 77}
    # what it has brought along goes with it, though anybody could use it
    came = AddressRecord(address="10.1.0.5", prefixlen=24, interface="eth0", routes=(beside,))
    assert "10.9.0.0/16" in [r.destination for r in dependents(here, {"10.1.0.5"}, ADDRESS, came).routes]


def test_life_goes_on() -> None:
    assert ADDRESS.aged(5) == ADDRESS
    limited = AddressRecord(address="10.1.0.5", prefixlen=24, interface="eth0", valid=100, preferred=50)
    later = limited.aged(60.9)
    assert (later.valid, later.preferred) == (40, 0)
    assert limited.aged(1000).valid == 1, "0 would be refused"
    forever = AddressRecord(address="10.1.0.5", prefixlen=24, interface="eth0", preferred=50)
    assert (forever.aged(60).valid, forever.aged(60).preferred) == (INFINITE, 0)


def test_lengths_of_the_option() -> None:
    assert prefix_lengths("10.0.0.5/24, fd00::5") == {"10.0.0.5": 24}
    assert prefix_lengths("auto") == prefix_lengths("none") == {}
    with pytest.raises(AddressSyntax):
        prefix_lengths("somewhere/24")


def test_what_is_said_of_addresses_that_stay() -> None:
    (said,) = remarks("auto", [], [], ["tcp port 80"])
    assert (said.status, said.subject, said.kind) == (Status.WARN, "tcp port 80", "listener")
    assert remarks("auto", ["10.0.0.5"], ["10.0.0.5"], ["tcp port 80"]) == []
    assert [v.subject for v in remarks("none", ["10.0.0.5", "127.0.0.1"], [], ["tcp port 80"])] == ["10.0.0.5"]
    assert [v.subject for v in remarks("10.0.0.6", ["10.0.0.5", "10.0.0.6"], ["10.0.0.6"], [])] == ["10.0.0.5"]
