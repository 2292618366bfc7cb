"""``migrate --all-matching``: several servers at the same time, each for itself, but those of one address together."""

import contextlib
import shlex
from pathlib import Path

import pytest

from tests.hosts import ThreeHosts
from tests.hosts.tcpmig import RSH, TCPMIG, tcpmig
from tests.workloads import servers
from tests.workloads.load import Load, ask_all

PATTERN = "tests.workloads.echo_server"


def _migrate(hosts: ThreeHosts, *arguments: object):
    line = ["--rsh", shlex.join(RSH), "--remote-command", shlex.join([*TCPMIG, "receive"])]
    return tcpmig(hosts.source, "migrate", *line, *arguments, hosts.target.name, timeout=120)


def judged(loads: list[Load]) -> list[str]:
    ask_all(loads, "mark")
    ask_all(loads, "finish")
    return [text for load in loads for text in load.news()]


def test_all_that_match_move_for_themselves(hosts: ThreeHosts, tmp_path: Path) -> None:
    both, others = [hosts.net.service4, hosts.net.service6], [hosts.net.address4(101), hosts.net.address4(102)]
    places = [(both, 7000), (both, 7001), ([others[0]], 7000), ([others[1]], 7000)]
    for address in others:
        hosts.source.add_address(f"{address}/24")
    with contextlib.ExitStack() as ends:
        pids, loads = [], []
        for number, (addresses, port) in enumerate(places):
            folder = tmp_path / str(number)
            folder.mkdir()
            pids.append(servers.echo_server(hosts.source, folder, addresses, port=port).pid)
            loads.append(Load(hosts.client, f"echo {number}", "echo_client", port, *addresses))
            ends.callback(loads[-1].close)
        ask_all(loads, "mark")
        status, summary, log = _migrate(hosts, "--all-matching", PATTERN)
        assert status == 0, (summary, log)
        assert [sorted(move["pids"]) for move in summary["moves"]] == [sorted(pids[:2]), [pids[2]], [pids[3]]]
        assert summary["moved"] == 3
        assert summary["connections"] == sum(move["connections"] for move in summary["moves"]) == 6
        assert all(hosts.target.state(pid) in ("R", "S") for pid in pids)
        assert all(hosts.source.state(pid) in ("", "Z") for pid in pids)
        assert judged(loads) == []


@pytest.mark.long
def test_one_that_is_refused_stays_and_the_others_move(hosts: ThreeHosts, tmp_path: Path) -> None:
    other = hosts.net.address4(101)
    hosts.source.add_address(f"{other}/24")
    with contextlib.ExitStack() as ends:
        server = servers.echo_server(hosts.source, tmp_path, [hosts.net.service4], port=7000)
        (tmp_path / "held").mkdir()
        taken = servers.echo_server(hosts.source, tmp_path / "held", [other], port=7000)
        loads = [Load(hosts.client, "moves", "echo_client", 7000, hosts.net.service4)]
        loads.append(Load(hosts.client, "stays", "echo_client", 7000, other))
        for load in loads:
            ends.callback(load.close)
        # an address that is at the target already cannot go there
        hosts.target.add_address(f"{other}/24")
        status, summary, log = _migrate(hosts, "--all-matching", PATTERN)
        assert status == 1, (summary, log)
        outcomes = {move["pids"][0]: move["outcome"] for move in summary["moves"]}
        assert outcomes == {server.pid: "done", taken.pid: "refused"}, log
        assert f"pid {taken.pid}: TM-" in log
        assert hosts.target.state(server.pid) in ("R", "S")
        assert hosts.source.state(taken.pid) in ("R", "S")
        assert judged(loads) == []


def test_nothing_that_matches(hosts: ThreeHosts) -> None:
    status, summary, _ = _migrate(hosts, "--all-matching", "no such program anywhere")
    assert (status, summary["code"]) == (3, "TM-0651")
    status, summary, _ = _migrate(hosts, "--all-matching", "[")
    assert (status, summary["code"]) == (2, "TM-0110")
