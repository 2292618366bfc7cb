"""What moving an address does: every kind of address and of what hangs on it, moved, rolled back, moved and moved back.

Compared is all that `ip -j addr`, `ip -j route show table all` and `ip -j rule` print, in both hosts, but for the
seconds of lifetimes.  What was seen is the table in docs/reference/addresses.md: each test looks for its own line.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from checkpoint.verdict import Status, refusals
from migrate import brought
from migrate.arrival import Arrival
from migrate.departure import Departure
from migrate.rtnetlink import Netlink
from migrate.takeover import AddressPlan, AddressPolicy, plan, prefix_lengths, select
from tests.system.test_takeover import Host, hosts

__all__ = ["hosts"]

Hosts = tuple[Host, Host, Host]
PAGE = Path(__file__).parents[2] / "docs/reference/addresses.md"


@dataclass(frozen=True, kw_only=True)
class Case:
    """source, target  commands of `ip` in either host; ``both`` before them in both, with # for the host's number
    moves           the addresses
    map_dev         as --map-dev
    policy          allow: with --address-policy allow, after it was refused without
    promote         net.ipv4.conf.eth0.promote_secondaries at the source
    differs         what differs after it moved and moved back, in words; the lines of `ip -j addr` may then differ
    """

    moves: list[str]
    source: list[str] = field(default_factory=list)
    target: list[str] = field(default_factory=list)
    both: list[str] = field(default_factory=list)
    map_dev: dict[str, str] = field(default_factory=dict)
    policy: AddressPolicy = AddressPolicy.REFUSE
    promote: int = 0
    differs: str = ""


# an address that is alone in its subnet is not found back by it
ETH0 = {"eth0": "eth0"}
SERVICE = "addr add 10.94.0.100/24 dev eth0"
SERVICE6 = "addr add fd94::100/64 dev eth0 nodad"
SUBNET7 = "addr add 10.98.0.#/24 dev br7"
ETH1 = ["link add eth1 type veth peer name eth1x", "link set eth1x up", "link set eth1 up"]
PRIMARY = ["addr add 10.95.0.101/24 dev eth0", "addr add 10.95.0.102/24 dev eth0 label eth0:two"]
SUBNET = ["addr add 10.95.0.2/24 dev eth0"]

CASES = {
    "secondary": Case(source=[SERVICE], moves=["10.94.0.100"]),
    "primary, `promote_secondaries=0`": Case(
        source=PRIMARY, target=SUBNET, moves=["10.95.0.101"], differs="it comes back as a secondary"
    ),
    "primary, `promote_secondaries=1`": Case(
        source=PRIMARY, target=SUBNET, moves=["10.95.0.101"], promote=1, differs="it comes back as a secondary"
    ),
    "primary with its secondary": Case(
        source=PRIMARY, target=SUBNET, moves=["10.95.0.101", "10.95.0.102"], map_dev=ETH0
    ),
    "alone in its subnet": Case(source=PRIMARY[:1], target=SUBNET, moves=["10.95.0.101"], map_dev=ETH0),
    "/32": Case(source=["addr add 10.94.0.100/32 dev eth0"], moves=["10.94.0.100"]),
    "IPv6": Case(source=[SERVICE6], moves=["fd94::100"]),
    "IPv6 /128": Case(source=["addr add fd94::100/128 dev eth0 nodad"], moves=["fd94::100"]),
    "IPv6, alone in its subnet": Case(
        source=["addr add fd97::100/64 dev eth0 nodad"],
        target=["addr add fd97::2/64 dev eth0 nodad"],
        moves=["fd97::100"],
        map_dev=ETH0,
    ),
    "label, broadcast, scope link": Case(
        source=["addr add 10.95.0.101/24 broadcast 10.95.0.250 dev eth0 label eth0:svc scope link"],
        map_dev=ETH0,
        moves=["10.95.0.101"],
    ),
    "noprefixroute": Case(
        source=[
            "addr add 10.95.0.101/24 dev eth0 noprefixroute",
            "addr add fd97::100/64 dev eth0 nodad noprefixroute",
        ],
        target=[*SUBNET, "addr add fd97::2/64 dev eth0 nodad"],
        moves=["10.95.0.101", "fd97::100"],
        map_dev=ETH0,
    ),
    "home, mngtmpaddr": Case(
        source=["addr add fd94::100/64 dev eth0 nodad home", "addr add fd94::101/64 dev eth0 nodad mngtmpaddr"],
        moves=["fd94::100", "fd94::101"],
    ),
    "a metric of its subnet": Case(
        source=[f"{SERVICE} metric 33", "addr add fd94::100/64 dev eth0 nodad metric 77"],
        moves=["10.94.0.100", "fd94::100"],
    ),
    "lifetimes": Case(
        source=[
            f"{SERVICE} valid_lft 9000 preferred_lft 8000",
            "addr add fd94::100/64 dev eth0 nodad valid_lft 9000 preferred_lft 0",
        ],
        moves=["10.94.0.100", "fd94::100"],
    ),
    "point to point": Case(
        source=["addr add 10.95.0.101 peer 10.95.9.9/32 dev eth0"], moves=["10.95.0.101"], map_dev=ETH0
    ),
    "a gateway route through it": Case(
        source=[*PRIMARY[:1], "route add 10.96.0.0/16 via 10.95.0.254 mtu 1300 initcwnd 20"],
        target=SUBNET,
        moves=["10.95.0.101"],
        map_dev=ETH0,
    ),
    "a gateway route through it, the last address of its interface": Case(
        both=[*ETH1],
        source=["addr add 10.95.0.101/24 dev eth1", "route add 10.96.0.0/16 via 10.95.0.254"],
        target=["addr add 10.95.0.2/24 dev eth1"],
        moves=["10.95.0.101"],
        map_dev={"eth1": "eth1"},
    ),
    "a gateway route beside it": Case(
        source=[SERVICE, "route add 10.96.0.0/16 via 10.94.0.254"], moves=["10.94.0.100"]
    ),
    "IPv6, a gateway route through it": Case(
        source=["addr add fd97::100/64 dev eth0 nodad", "-6 route add fd95::/48 via fd97::fe metric 9"],
        target=["addr add fd97::2/64 dev eth0 nodad"],
        moves=["fd97::100"],
        map_dev=ETH0,
    ),
    "routes of the host with it as their source": Case(
        source=[
            SERVICE,
            "route add 10.96.0.0/16 via 10.94.0.254 src 10.94.0.100 metric 7",
            "route add 10.97.0.0/16 via 10.94.0.254 dev eth0 onlink src 10.94.0.100 table 78",
        ],
        moves=["10.94.0.100"],
        policy=AddressPolicy.ALLOW,
    ),
    "IPv6, a route of the host with it as its source": Case(
        source=[SERVICE6, "-6 route add fd95::/48 via fd94::fe src fd94::100"],
        moves=["fd94::100"],
        policy=AddressPolicy.ALLOW,
    ),
    "a rule that names it, and its table": Case(
        source=[
            SERVICE,
            "rule add from 10.94.0.100 lookup 77 priority 1000",
            "rule add to 10.94.0.100 fwmark 0x10/0xf0 lookup 77 priority 1001",
            "route add default via 10.94.0.254 table 77",
        ],
        moves=["10.94.0.100"],
    ),
    "IPv6, a rule that names it, and its table": Case(
        source=[
            SERVICE6,
            "-6 rule add from fd94::100 lookup 77 priority 1000",
            "-6 route add default via fd94::fe src fd94::100 table 77",
        ],
        moves=["fd94::100"],
    ),
    "on one interface, its routes through another": Case(
        both=ETH1,
        source=[
            "addr add 10.200.0.5/32 dev eth1",
            "rule add from 10.200.0.5 lookup 77 priority 1000",
            "route add default via 10.94.0.254 dev eth0 src 10.200.0.5 table 77",
        ],
        map_dev={"eth1": "eth1"},
        moves=["10.200.0.5"],
    ),
    "several, on several interfaces": Case(
        both=ETH1,
        source=[SERVICE, SERVICE6, "addr add 10.98.0.100/24 dev eth1", "route add 10.99.0.0/16 via 10.98.0.254"],
        target=["addr add 10.98.0.2/24 dev eth1"],
        moves=["10.94.0.100", "fd94::100", "10.98.0.100"],
        map_dev={"eth1": "eth1"},
    ),
    "on a macvlan": Case(
        both=["link add link eth0 name mv7 type macvlan", "link set mv7 up", "addr add 10.98.0.#/24 dev mv7"],
        source=["addr add 10.98.0.100/24 dev mv7"],
        moves=["10.98.0.100"],
    ),
    "on a bridge": Case(
        both=[
            "link add br7 type bridge",
            *ETH1,
            "link set eth1x master br7",
            "link set br7 up",
            "addr add 10.98.0.#/24 dev br7",
        ],
        source=["addr add 10.98.0.100/24 dev br7"],
        moves=["10.98.0.100"],
    ),
    "on an interface without ARP": Case(
        both=[*ETH1, "link set eth1 arp off", "addr add 10.98.0.#/24 dev eth1"],
        source=["addr add 10.98.0.100/24 dev eth1"],
        moves=["10.98.0.100"],
    ),
}


def view(host: Host) -> dict[str, Any]:
    """All of a host; addresses in their order (it says which is the primary), routes sorted."""
    (links,) = printed(host, [], "addr show")
    for link in links:
        for info in link["addr_info"]:
            for key in ("valid_life_time", "preferred_life_time"):
                info[key] = info[key] if info[key] in (0, 2**32 - 1) else "limited"
    found: dict[str, Any] = {"addr": [f"{link['ifname']}: {json.dumps(link['addr_info'])}" for link in links]}
    for family in ("-4", "-6"):
        routes, rules = printed(host, [family, "-d"], "route show table all", "rule")
        found[f"route {family}"] = sorted(json.dumps(route) for route in routes)
        found[f"rule {family}"] = sorted(json.dumps(rule) for rule in rules)
    return found


def printed(host: Host, options: list[str], *commands: str) -> list[list[Any]]:
    """What `ip -j` prints for each of the commands, in one process."""
    words = ["ip", "-n", host.name, "-j", *options, "-batch", "-"]
    done = subprocess.run(words, input="\n".join(commands) + "\n", capture_output=True, check=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) == len(commands), done.stdout
    return found


def differences(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    """What is no more, and what is new, in each host."""
    return [
        f"{host}: {key} {sign}{text}"
        for host, was, now in zip("ab", before, after, strict=True)
        for key in sorted({*was, *now})
        for sign, these, those in (("-", was, now), ("+", now, was))
        for text in these.get(key, [])
        if text not in those.get(key, [])
    ] or ([] if before == after else ["the order differs"])


def lines(seen: dict[str, Any]) -> set[str]:
    """Routes and rules that somebody configured, as `ip` would write them."""
    found = set()
    for family in ("-4", "-6"):
        for text in seen[f"route {family}"]:
            route = json.loads(text)
            if route["protocol"] != "kernel":
                words = [route["dst"]]
                for key, word in (("gateway", "via"), ("prefsrc", "src"), ("table", "table")):
                    words += [word, str(route[key])] if key in route and route[key] != "main" else []
                found.add(" ".join(words))
        found |= {_rule(json.loads(text)) for text in seen[f"rule {family}"]}
    return found


def _rule(rule: dict[str, Any]) -> str:
    ends = [
        f"{'from' if end == 'src' else 'to'} {rule[end]}" for end in ("src", "dst") if rule.get(end, "all") != "all"
    ]
    return " ".join(["rule", *(ends or ["from all"]), f"lookup {rule['table']}"])


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCPMIG_RUNTIME_DIR", str(tmp_path))


def planned(host: Host, case: Case, policy: AddressPolicy) -> AddressPlan:
    with host.inside(), Netlink() as netlink:
        return plan(netlink, case.moves, pids=(), control={}, policy=policy)


@contextlib.contextmanager
def moving(here: Host, there: Host, case: Case) -> Iterator[tuple[Departure, Arrival]]:
    """Both halves, with the addresses gone here and come there."""
    made = planned(here, case, case.policy)
    assert not refusals(made.verdicts), made.verdicts
    with (
        here.inside(),
        Netlink() as netlink,
        there.inside(),
        Arrival(made.records, map_dev=case.map_dev) as coming,
    ):
        verdicts = coming.check(made.macs, wait=0.01)
        assert not [v for v in verdicts if v.status is not Status.OK], verdicts
        coming.prepare()
        leaving = Departure(netlink, case.moves)
        leaving.remove()
        coming.add()
        coming.announce(0.0)
        yield leaving, coming


def table_line(name: str, case: Case, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    """The line of the table that is true."""

    def cell(values: set[str]) -> str:
        return "; ".join(f"`{value}`" for value in sorted(values)) or "-"

    title = f"{name} (`--address-policy allow`)" if case.policy is AddressPolicy.ALLOW else name
    gone = lines(before[0]) - lines(after[0])
    come = lines(after[1]) - lines(before[1])
    rest = lines(after[0]) - lines(before[0])
    leaves = f"{cell(gone)}, which stays as {cell(rest)}" if rest else cell(gone)
    return f"| {title} | {leaves} | {cell(come)} | the same | {case.differs or 'the same'} |"


@pytest.mark.parametrize("name", CASES)
def test_an_address_moves_is_rolled_back_and_moves_back(hosts: Hosts, name: str) -> None:
    case, (a, b, _) = CASES[name], hosts
    a.sysctl("net.ipv4.conf.eth0.promote_secondaries", case.promote)
    for number, (host, own) in enumerate(((a, case.source), (b, case.target)), 1):
        host.batch(*(command.replace("#", str(number)) for command in (*case.both, *own)))
        host.settle()
    before = [view(a), view(b)]
    if case.policy is AddressPolicy.ALLOW:
        assert {v.code for v in refusals(planned(a, case, AddressPolicy.REFUSE).verdicts)} == {"TM-0713"}

    with moving(a, b, case) as (leaving, coming):
        assert view(a) != before[0]
        assert view(b) != before[1]
        coming.remove()
        leaving.restore()
    assert not differences(before, [view(a), view(b)]), "rolled back"

    with moving(a, b, case) as (leaving, coming):
        leaving.settle()
        coming.settle()
    there = [view(a), view(b)]
    for address in case.moves:
        assert f'"{address}"' not in "".join(there[0]["addr"])
        assert f'"{address}"' in "".join(there[1]["addr"])
    for what, was in (("label", "eth0:svc"), ("flags", '"noprefixroute": true'), ("flags", '"home": true')):
        assert (was in "".join(before[0]["addr"])) == (was in "".join(there[1]["addr"])), what

    with moving(b, a, case) as (leaving, coming):
        leaving.settle()
        coming.settle()
    back = [view(a), view(b)]
    if case.differs:
        assert back[0].pop("addr") != before[0].pop("addr"), "the table says that it differs"
        for seen in (back[0], before[0]):
            # and so does the source address of the subnet's own route
            seen["route -4"] = sorted(r for r in seen["route -4"] if '"kernel"' not in r)
    assert not differences(before, back), "forth and back"
    with b.inside(), Netlink() as netlink:
        assert not [address for address in case.moves if brought.recall(netlink, address)], "remembered for ever"

    line = table_line(name, case, before, there)
    assert line in PAGE.read_text().splitlines(), f"{PAGE.name} lacks\n{line}"


def test_the_page_has_no_other_lines() -> None:
    _, _, table = PAGE.read_text().partition("| what moves | leaves the source |")
    assert len(table.splitlines()) - 2 == len(CASES)


@pytest.mark.parametrize("policy", AddressPolicy)
def test_a_listener_of_others_is_refused_or_told(hosts: Hosts, policy: AddressPolicy) -> None:
    a = hosts[0]
    a.ip(SERVICE)
    script = (
        "import socket, sys; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('10.94.0.100', 5353)); "
        "print('up', flush=True); sys.stdin.read()"
    )
    with a.inside():
        other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdin is not None
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == b"up\n"
        (verdict,) = planned(a, CASES["secondary"], policy).verdicts
        assert "udp 10.94.0.100:5353" in verdict.text
        assert str(other.pid) in verdict.text
        assert verdict.status is (Status.WARN if policy is AddressPolicy.ALLOW else Status.REFUSE)
    finally:
        other.communicate()


REFUSED = {
    "configured twice": ([SERVICE, "addr add 10.94.0.100/32 dev lo"], "10.94.0.100", "TM-0714"),
    "the end of a tunnel": (
        [SERVICE, "link add vx7 type vxlan id 7 dstport 4789 local 10.94.0.100"],
        "10.94.0.100",
        "TM-0713",
    ),
    "of a prefix length that it has not": ([SERVICE], "10.94.0.100/32", "TM-0701"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused(hosts: Hosts, why: str) -> None:
    commands, option, code = REFUSED[why]
    hosts[0].batch(*commands)
    with hosts[0].inside(), Netlink() as netlink:
        made = plan(netlink, select(option, ()), pids=(), control={}, lengths=prefix_lengths(option))
    assert [v.code for v in made.verdicts] == [code], made.verdicts


def test_link_local_and_temporary_addresses_stay(hosts: Hosts) -> None:
    a = hosts[0]
    a.sysctl("net.ipv6.conf.eth0.use_tempaddr", 2)
    a.ip("addr add fd98::100/64 dev eth0 nodad mngtmpaddr")
    with a.inside(), Netlink() as netlink:
        shown = json.loads(a.ip("-j addr show dev eth0"))[0]["addr_info"]
        temporary = next(i["local"] for i in shown if i.get("temporary"))
        local = next(i["local"] for i in shown if i["local"].startswith("fe80"))
        made = plan(netlink, [temporary, local, "fd98::100"], pids=(), control={})
    assert [v.code for v in made.verdicts] == ["TM-0710"] * 3
    assert ["temporary" in v.text for v in made.verdicts] == [True, False, True]


def test_a_reachable_entry_of_a_peer_is_changed_at_once(hosts: Hosts) -> None:
    a, b, c = hosts
    a.batch(SERVICE, SERVICE6)
    case = Case(moves=["10.94.0.100", "fd94::100"])
    for address in case.moves:
        c.reach(address)
        # as if it had just been confirmed, and for an hour
        c.ip(f"neigh replace {address} lladdr {a.mac()} dev eth0 nud reachable")
    with moving(a, b, case) as (leaving, _):
        deadline = time.monotonic() + 5
        while any(c.neighbour(address) != b.mac() for address in case.moves) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [c.neighbour(address) for address in case.moves] == [b.mac()] * 2
        leaving.settle()
    for address in case.moves:
        c.reach(address)
