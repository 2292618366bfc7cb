"""May an address move? The verdicts on its kind, the channel, and others that use it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from checkpoint.verdict import Status
from migrate.addresses import AddressRecord, Configuration, InterfaceRecord
from migrate.dependents import Dependents
from migrate.judge import AddressPolicy, judge
from migrate.routes import RouteRecord
from migrate.usage import AddressUser
from tcpstate.kernel.rtnetlink import AddressFlag, AddressOrigin

V4 = AddressRecord(address="10.0.0.5", prefixlen=24, interface="eth0")
V6 = AddressRecord(address="fd00::5", prefixlen=64, interface="eth0")
TEMPORARY = replace(V6, address="fd00::abcd", flags=int(AddressFlag.SECONDARY))
USER = AddressUser("udp", "10.0.0.5", 53, "", 77, (12,))
ROUTE = RouteRecord(destination="10.9.0.0/16", gateway="10.0.0.254", source="10.0.0.5")


def host(*records: AddressRecord) -> Configuration:
    return Configuration(
        interfaces=tuple(
            InterfaceRecord(index=number, name=f"eth{number}", mac="", flags=1, addresses=(record,))
            for number, record in enumerate(records)
        )
    )


@pytest.mark.parametrize(
    ("record", "others", "code", "word"),
    [
        (V4, (V4,), "TM-0714", "eth0 and eth1"),
        (replace(V6, address="fe80::5"), (), "TM-0710", "interface"),
        (TEMPORARY, (), "TM-0710", "temporary"),
        (replace(V6, protocol=int(AddressOrigin.KERNEL_RA)), (), "TM-0710", "router"),
    ],
)
@pytest.mark.parametrize("policy", AddressPolicy)
def test_what_no_policy_moves(
    record: AddressRecord, others: tuple[AddressRecord, ...], code: str, word: str, policy: AddressPolicy
) -> None:
    (verdict,) = judge(record, host(record, *others), {}, (), Dependents(), (), policy)
    assert (verdict.status, verdict.code) == (Status.REFUSE, code)
    assert word in verdict.text


def test_the_origin_of_temporary_addresses() -> None:
    origin = replace(V6, flags=int(AddressFlag.MANAGETEMPADDR))
    alone = InterfaceRecord(index=1, name="eth0", mac="", flags=1, addresses=(origin,))
    verdicts = [
        judge(origin, Configuration(interfaces=(interface,)), {}, (), Dependents(), (), AddressPolicy.ALLOW)
        for interface in (alone, replace(alone, addresses=(TEMPORARY, origin)))
    ]
    assert [[v.code for v in found] for found in verdicts] == [[""], ["TM-0710"]]


def test_the_channel_is_never_allowed() -> None:
    control = {"10.0.0.5": "the channel"}
    (verdict,) = judge(V4, host(V4), control, [USER], Dependents(), (), AddressPolicy.ALLOW)
    assert verdict.code == "TM-0702"


def test_others_are_refused_or_told() -> None:
    depend = Dependents(routes=(ROUTE,), hosts=(ROUTE,))
    refused = judge(V4, host(V4), {}, [USER] * 5, depend, ["vx7"], AddressPolicy.REFUSE)
    assert [v.code for v in refused] == ["TM-0703", "TM-0713", "TM-0713"]
    assert "pid 12" in refused[0].text
    assert "and 2 more" in refused[0].text
    told = judge(V4, host(V4), {}, [USER] * 5, depend, ["vx7"], AddressPolicy.ALLOW)
    assert [v.status for v in told] == [Status.WARN] * 3


def test_what_goes_along_stays_or_expires_is_told() -> None:
    limited = replace(V4, valid=100)
    depend = Dependents(routes=(replace(ROUTE, source=""),), left=("a rule",))
    found = judge(limited, host(limited), {}, (), depend, (), AddressPolicy.REFUSE)
    assert [v.status for v in found] == [Status.WARN] * 3
    for verdict, word in zip(found, ("10.9.0.0/16", "a rule stays", "expires"), strict=True):
        assert word in verdict.text
    (fine,) = judge(V4, host(V4), {}, (), Dependents(), (), AddressPolicy.REFUSE)
    assert (fine.status, fine.text) == (Status.OK, "")
