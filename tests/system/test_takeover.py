"""Addresses between three network namespaces on one bridge: taken, given back exactly, announced, refused."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from checkpoint.verdict import Status, refusals
from migrate.addresses import AddressRecord, read_configuration
from migrate.arrival import Arrival
from migrate.departure import Departure, DepartureRecord, give_back
from migrate.errors import AddressChangeFailed
from migrate.rtnetlink import Netlink
from migrate.takeover import AddressPolicy, control_addresses, plan
from tcpstate import codec
from tests.hosts.kernel import write_sysctl

_libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET = 0x40000000


def run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def _is_link_local(info: dict[str, object]) -> bool:
    return str(info["local"]).startswith("fe80") and "tentative" not in info


class Host:
    """A network namespace `tmg-<pid>-NAME` with eth0 on the bridge."""

    def __init__(self, name: str) -> None:
        self.name = f"tmg-{os.getpid()}-{name}"
        run("ip", "netns", "add", self.name)
        self.ip("link set lo up")

    def ip(self, words: str) -> str:
        return run("ip", "-n", self.name, *words.split())

    def batch(self, *commands: str) -> None:
        """Several commands of `ip`, in few processes: it takes options (-6) only once."""
        for family, some in itertools.groupby(commands, lambda words: words.split()[0] == "-6"):
            text = "".join(f"{words.removeprefix('-6 ')}\n" for words in some)
            options = ["-6"] if family else []
            subprocess.run(["ip", "-n", self.name, *options, "-batch", "-"], input=text, check=True, text=True)

    def settle(self) -> None:
        """Until the kernel has done, in its own time, what it does to interfaces that come up: its link-local address
        is the last of it."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            links = [link for link in json.loads(self.ip("-j addr show")) if link["ifname"] != "lo"]
            if all(any(map(_is_link_local, link["addr_info"])) for link in links):
                return
        raise AssertionError(f"no link-local address: {links}")

    def sysctl(self, key: str, value: int) -> None:
        with self.inside():
            write_sysctl(key.replace(".", "/"), value)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
        try:
            assert _libc.setns(there, CLONE_NEWNET) == 0
            yield
        finally:
            assert _libc.setns(home, CLONE_NEWNET) == 0
            os.close(home)
            os.close(there)

    def addresses(self) -> list[str]:
        """`ip -j addr` of eth0 and eth1 without the seconds of lifetimes, each address with its role."""
        found = []
        for link in json.loads(self.ip("-j addr show")):
            for info in link["addr_info"]:
                for key in ("valid_life_time", "preferred_life_time"):
                    info[key] = "forever" if info[key] == 2**32 - 1 else "limited"
                found.append(f"{link['ifname']} {json.dumps(info, sort_keys=True)}")
        return sorted(found)

    def routes(self) -> list[str]:
        found = []
        for family in ("-4", "-6"):
            for route in json.loads(self.ip(f"{family} -j route show table all")):
                route.pop("cache", None)
                found.append(f"{family} {json.dumps(route, sort_keys=True)}")
        return sorted(found)

    def reach(self, address: str) -> None:
        """A connection from here is answered: by a reset, as nobody listens."""
        with self.inside(), pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, 9), timeout=2)

    def mac(self) -> str:
        return str(json.loads(self.ip("-j link show eth0"))[0]["address"])

    def neighbour(self, address: str) -> str | None:
        for entry in json.loads(self.ip("-j neigh show dev eth0")):
            if entry["dst"] == address:
                return entry.get("lladdr")
        return None


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host, Host]]:
    made: list[Host] = []
    try:
        bridge = Host("br")
        made.append(bridge)
        # without snooping: its first solicitations would wait for a querier
        bridge.batch("link add br0 type bridge mcast_snooping 0", "link set br0 up")
        for number, name in enumerate("abc", 1):
            host = Host(name)
            made.append(host)
            # a host that has been up for long has done its duplicate detection
            host.sysctl("net.ipv6.conf.default.accept_dad", 0)
            host.batch(
                f"link add eth0 type veth peer name p{name} netns {bridge.name}",
                "link set eth0 up",
                f"addr add 10.94.0.{number}/24 dev eth0",
                f"addr add fd94::{number}/64 dev eth0 nodad",
            )
        bridge.batch(*(f"link set p{name} master br0 up" for name in "abc"))
        for host in made[1:]:
            host.settle()
        yield made[1], made[2], made[3]
    finally:
        for host in made:
            run("ip", "netns", "del", host.name)


@contextlib.contextmanager
def departure(host: Host, *addresses: str) -> Iterator[Departure]:
    with host.inside(), Netlink() as netlink:
        yield Departure(netlink, addresses)


LAYOUTS = {
    "secondary": (["addr add 10.94.0.100/24 dev eth0"], ["10.94.0.100"]),
    "single": (["addr add 10.94.0.100/32 dev eth0"], ["10.94.0.100"]),
    "primary with secondaries": (
        [
            "addr add 10.95.0.1/24 broadcast + dev eth0",
            "addr add 10.95.0.2/24 dev eth0 label eth0:two",
            "addr add 10.95.0.3/24 dev eth0",
            "route add 10.96.0.0/16 via 10.95.0.254",
            "route add 10.97.0.0/16 via 10.95.0.254 src 10.95.0.2 metric 7 mtu 1300",
            "route add 10.98.0.0/16 dev eth0 src 10.95.0.1 table 77",
        ],
        ["10.95.0.1"],
    ),
    "primary and its last secondary": (
        ["addr add 10.95.0.1/24 dev eth0", "addr add 10.95.0.2/24 dev eth0", "addr add 10.95.0.3/24 dev eth0"],
        ["10.95.0.1", "10.95.0.3"],
    ),
    "only address of its link": (
        [
            "link add eth1 type veth peer name eth1x",
            "link set eth1x up",
            "link set eth1 up",
            "addr add 10.95.0.1/24 dev eth1",
            "route add default via 10.95.0.254 metric 50",
            "route add 10.99.0.0/16 via 10.95.0.254",
            "route add 10.99.7.0/24 dev eth1 scope link",
        ],
        ["10.95.0.1"],
    ),
    "point to point": (["addr add 10.95.0.1 peer 10.95.9.9/32 dev eth0"], ["10.95.0.1"]),
    "limited": (["addr add 10.94.0.100/24 dev eth0 valid_lft 9000 preferred_lft 8000 metric 33"], ["10.94.0.100"]),
    "ipv6": (
        [
            "addr add fd94::100/64 dev eth0 nodad",
            "-6 route add fd95::/48 via fd94::fe src fd94::100",
            "-6 route add fd96::/48 via fd94::fe",
        ],
        ["fd94::100"],
    ),
    "ipv6 alone in its subnet": (
        ["addr add fd97::100/64 dev eth0 nodad", "-6 route add fd95::/48 via fd97::fe metric 9"],
        ["fd97::100"],
    ),
    "ipv6 single": (["addr add fd97::100/128 dev eth0 nodad"], ["fd97::100"]),
    "both families": (
        ["addr add 10.94.0.100/24 dev eth0", "addr add fd94::100/64 dev eth0 nodad"],
        ["10.94.0.100", "fd94::100"],
    ),
}


@pytest.mark.parametrize("promote", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_removed_is_given_back_exactly(hosts: tuple[Host, Host, Host], layout: str, promote: int) -> None:
    a, _, _ = hosts
    a.sysctl("net.ipv4.conf.eth0.promote_secondaries", promote)
    commands, moved = LAYOUTS[layout]
    for command in commands:
        a.ip(command)
    before = a.addresses(), a.routes()
    with departure(a, *moved) as leaving:
        leaving.remove()
        during = a.addresses()
        leaving.settle()
        assert len(during) == len(before[0]) - len(moved), "exactly the moved addresses are gone"
        leaving.restore()
    assert (a.addresses(), a.routes()) == before


def test_the_journal_alone_gives_back(hosts: tuple[Host, Host, Host]) -> None:
    a, _, _ = hosts
    for command in LAYOUTS["primary with secondaries"][0]:
        a.ip(command)
    before = a.addresses(), a.routes()
    with departure(a, "10.95.0.1") as leaving:
        journalled = codec.pack(leaving.record)
        leaving.remove()
    with a.inside(), Netlink() as netlink:
        give_back(netlink, codec.unpack(DepartureRecord, journalled))
    assert (a.addresses(), a.routes()) == before


@pytest.mark.parametrize("promote", [0, 1])
def test_addresses_and_routes_that_stay_survive_the_primary(hosts: tuple[Host, Host, Host], promote: int) -> None:
    a, _, _ = hosts
    a.sysctl("net.ipv4.conf.eth0.promote_secondaries", promote)
    for command in LAYOUTS["primary with secondaries"][0]:
        a.ip(command)
    with departure(a, "10.95.0.1") as leaving:
        leaving.remove()
        leaving.settle()
    assert "10.95.0.2" in a.ip("addr show dev eth0")
    assert "10.95.0.3" in a.ip("addr show dev eth0")
    assert "10.97.0.0/16 via 10.95.0.254" in a.ip("route")
    assert "10.96.0.0/16 via 10.95.0.254" in a.ip("route")


def test_an_address_goes_and_comes_again_and_again(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    a.ip("addr add 10.94.0.100/24 dev eth0")
    record, macs = _planned(a, "10.94.0.100")
    times = []
    for _ in range(5):
        with departure(a, "10.94.0.100") as leaving, b.inside(), Arrival(record) as coming:
            assert all(v.status is Status.OK for v in coming.check(macs, wait=0.02))
            coming.prepare()
            start = time.perf_counter()
            leaving.remove()
            coming.add()
            times.append(time.perf_counter() - start)
            assert ("10.94.0.100/24" in a.ip("addr"), "10.94.0.100/24" in b.ip("addr")) == (False, True)
            coming.remove()
            leaving.restore()
            assert ("10.94.0.100/24" in a.ip("addr"), "10.94.0.100/24" in b.ip("addr")) == (True, False)
    print(f"remove and add: {min(times) * 1e6:.0f} us at best, {sorted(times)[2] * 1e6:.0f} us in the median")


def _planned(
    host: Host, *addresses: str, policy: AddressPolicy = AddressPolicy.REFUSE
) -> tuple[tuple[AddressRecord, ...], tuple[str, ...]]:
    with host.inside(), Netlink() as netlink:
        made = plan(netlink, addresses, pids=(), control={}, policy=policy)
    assert not refusals(made.verdicts), made.verdicts
    return made.records, made.macs


@pytest.mark.parametrize("address", ["10.94.0.100/24", "10.94.0.100/32", "fd94::100/64", "fd94::100/128"])
def test_a_third_host_learns_the_new_place(hosts: tuple[Host, Host, Host], address: str) -> None:
    a, b, c = hosts
    plain = address.partition("/")[0]
    a.ip(f"addr add {address} dev eth0" + (" nodad" if ":" in address else ""))
    c.reach(plain)
    assert c.neighbour(plain) == a.mac()
    records, macs = _planned(a, plain)
    with departure(a, plain) as leaving, b.inside(), Arrival(records) as coming:
        assert [v.status for v in coming.check(macs, wait=0.2)] == [Status.OK], "the source's own answer is no conflict"
        coming.prepare(["10.94.0.3", "fd94::3"])
        leaving.remove()
        coming.add()
        coming.announce(time.monotonic())
        deadline = time.monotonic() + 2
        while c.neighbour(plain) != b.mac() and time.monotonic() < deadline:
            time.sleep(0.002)
        assert c.neighbour(plain) == b.mac()
        coming.settle()
    (made,) = (x for x in json.loads(b.ip("-j addr show dev eth0"))[0]["addr_info"] if x["local"] == plain)
    assert made["prefixlen"] == int(address.partition("/")[2])
    assert not made.get("tentative")
    c.reach(plain)


def test_announcements_are_repeated(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    a.ip("addr add 10.94.0.100/24 dev eth0")
    records, macs = _planned(a, "10.94.0.100")
    with b.inside(), Arrival(records) as coming, a.inside():
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806)) as ears:
            ears.setblocking(False)
            with b.inside():
                coming.check(macs, wait=0.01)
                coming.prepare()
            coming.announce(100.0)
            assert coming.repeat(100.0) == pytest.approx(0.001)
            now, repeats = 100.0, 0
            while (wait := coming.repeat(now)) is not None:
                now += wait
                repeats += 1
            assert repeats == 5
            frames = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    frames += b"\x0a\x5e\x00\x64" in ears.recv(100)[28:32]
    # each time a request and a reply
    assert frames == 2 * 6


def test_neighbours_are_resolved_before_the_address_is_there(hosts: tuple[Host, Host, Host]) -> None:
    a, b, c = hosts
    a.ip("addr add 10.94.0.100/24 dev eth0")
    records, macs = _planned(a, "10.94.0.100")
    with b.inside(), Arrival(records) as coming:
        coming.check(macs, wait=0.01)
        coming.prepare(["10.94.0.3", "fd94::3", "10.200.0.1"])
    deadline = time.monotonic() + 2
    while not (b.neighbour("10.94.0.3") and b.neighbour("fd94::3")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert b.neighbour("10.94.0.3") == b.neighbour("fd94::3") == c.mac()


@pytest.mark.parametrize("address", ["10.94.0.100", "fd94::100"])
def test_an_address_that_a_third_machine_has_is_refused(hosts: tuple[Host, Host, Host], address: str) -> None:
    a, b, c = hosts
    length = "64 nodad" if ":" in address else "24"
    a.ip(f"addr add {address}/{length} dev eth0".replace("64 nodad dev eth0", "64 dev eth0 nodad"))
    records, macs = _planned(a, address)
    with b.inside(), Arrival(records) as coming:
        assert [v.status for v in coming.check(macs)] == [Status.OK]
    c.ip(f"addr add {address}/{length} dev eth0".replace("64 nodad dev eth0", "64 dev eth0 nodad"))
    with b.inside(), Arrival(records) as coming:
        (verdict,) = coming.check(macs)
    assert (verdict.status, verdict.code) == (Status.REFUSE, "TM-0704")
    assert c.mac() in verdict.text


def test_an_address_that_the_target_has_itself_is_refused(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    a.ip("addr add 10.94.0.100/24 dev eth0")
    records, macs = _planned(a, "10.94.0.100")
    b.ip("addr add 10.94.0.100/32 dev lo")
    with b.inside(), Arrival(records) as coming:
        (verdict,) = coming.check(macs)
    assert (verdict.status, verdict.code) == (Status.REFUSE, "TM-0704")


def test_the_interface_is_that_of_the_subnet_or_the_mapped_one(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    a.ip("link add eth1 type veth peer name eth1x")
    a.ip("link set eth1 up")
    a.ip("addr add 10.95.0.1/24 dev eth1")
    records, macs = _planned(a, "10.95.0.1")
    with b.inside(), Arrival(records) as coming:
        (verdict,) = coming.check(macs, wait=0.01)
    assert (verdict.status, verdict.code) == (Status.REFUSE, "TM-0705")
    b.ip("link add data7 type veth peer name data7x")
    b.ip("link set data7 up")
    with b.inside(), Arrival(records, map_dev={"eth1": "data7"}) as coming:
        assert [v.status for v in coming.check(macs, wait=0.01)] == [Status.OK]
        coming.prepare()
        coming.add()
    assert "10.95.0.1/24 scope global data7" in b.ip("addr show dev data7")
    b.ip("addr del 10.95.0.1/24 dev data7")
    b.ip("addr add 10.95.0.77/16 dev data7")
    with b.inside(), Arrival(records) as coming:
        (verdict,) = coming.check(macs, wait=0.01)
    assert verdict.text == "lands on data7"


def test_routes_that_depend_on_the_address_come_along_and_go_again(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    for command in ("addr add 10.94.0.100/24 dev eth0", "route add 10.99.0.0/16 via 10.94.0.254 src 10.94.0.100"):
        a.ip(command)
    b.ip("route add 10.99.0.0/16 via 10.94.0.253 metric 5")
    before = b.addresses(), b.routes()
    records, macs = _planned(a, "10.94.0.100", policy=AddressPolicy.ALLOW)
    with b.inside(), Arrival(records) as coming:
        coming.check(macs, wait=0.01)
        coming.prepare()
        coming.add()
        assert "10.99.0.0/16 via 10.94.0.254 dev eth0 src 10.94.0.100" in b.ip("route")
        coming.remove()
    assert (b.addresses(), b.routes()) == before


def test_a_half_done_arrival_leaves_nothing_of_ours_and_all_of_others(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    for number in (100, 101):
        a.ip(f"addr add 10.94.0.{number}/24 dev eth0")
    records, macs = _planned(a, "10.94.0.100", "10.94.0.101")
    with b.inside(), Arrival(records) as coming:
        coming.check(macs, wait=0.01)
        coming.prepare()
        b.ip("addr add 10.94.0.101/24 dev eth0")
        before = b.addresses()
        with pytest.raises(AddressChangeFailed):
            coming.add()
    assert b.addresses() == before


def test_other_processes_and_the_channel_keep_their_address(hosts: tuple[Host, Host, Host]) -> None:
    a, _, _ = hosts
    a.ip("addr add 10.94.0.100/24 dev eth0")
    with a.inside():
        ours = socket.create_server(("10.94.0.100", 0))
        other = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"],
            stdin=subprocess.PIPE,
            pass_fds=[ours.fileno()],
            close_fds=True,
        )
        peer = socket.create_connection(("10.94.0.100", ours.getsockname()[1]), source_address=("10.94.0.1", 0))
        try:
            with Netlink() as netlink:
                asked = {"pids": {other.pid}, "control": {}}
                assert [v.status for v in plan(netlink, ["10.94.0.100"], **asked).verdicts] == [Status.OK]
                asked["pids"] = set()
                (verdict,) = plan(netlink, ["10.94.0.100"], **asked).verdicts
                assert (verdict.status, verdict.code) == (Status.REFUSE, "TM-0703")
                assert str(other.pid) in verdict.text
                allowed = plan(netlink, ["10.94.0.100"], **asked, policy=AddressPolicy.ALLOW)
                assert [v.status for v in allowed.verdicts] == [Status.WARN]
                channel = control_addresses(netlink, os.getpid(), "no-such-host.invalid")
                assert "10.94.0.1" in channel
                (verdict,) = plan(netlink, ["10.94.0.1"], pids={other.pid}, control=channel).verdicts
                assert (verdict.status, verdict.code) == (Status.REFUSE, "TM-0702")
                route = control_addresses(netlink, 2**22, "root@10.94.0.2")
                assert route == {"10.94.0.1": "the route to root@10.94.0.2"}
                (verdict,) = plan(netlink, ["10.94.0.55"], **asked).verdicts
                assert (verdict.status, verdict.code) == (Status.REFUSE, "TM-0701")
        finally:
            peer.close()
            ours.close()
            other.stdin.close()
            other.wait()


def test_the_configuration_is_what_ip_shows(hosts: tuple[Host, Host, Host]) -> None:
    a, _, _ = hosts
    a.ip("addr add 10.95.0.1 peer 10.95.9.9/32 dev eth0 label eth0:p")
    with a.inside(), Netlink() as netlink:
        found = read_configuration(netlink).find("10.95.0.1")
    assert found is not None
    interface, record = found
    assert interface.mac == a.mac()
    assert (record.peer, record.prefixlen, record.label, record.interface) == ("10.95.9.9", 32, "eth0:p", "eth0")
