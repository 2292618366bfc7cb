"""The hosts that all system tests stand on: are they really different machines, and do they leave nothing behind?"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hosts import CommandFailed, Host, Net, ThreeHosts, three_hosts
from tests.hosts.host import ROOT
from tests.hosts.tcpmig import RSH

KINDS = ("net", "pid", "mnt", "uts", "ipc", "time")
DAY = 86400


def namespaces(host: Host) -> dict[str, str]:
    return {kind: os.readlink(f"/proc/{host.init}/ns/{kind}") for kind in KINDS}


def test_namespaces_differ(hosts: ThreeHosts) -> None:
    machine = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in KINDS}
    all_of_them = [machine, *map(namespaces, (hosts.source, hosts.target, hosts.client))]
    for kind in KINDS:
        assert len({one[kind] for one in all_of_them}) == 4, kind


def test_uptimes_differ_by_days_both_ways(hosts: ThreeHosts) -> None:
    source, target, client = (h.uptime() for h in (hosts.source, hosts.target, hosts.client))
    assert abs(source - target - DAY) < 5
    assert abs(client - source - DAY) < 5
    monotonic = [
        float(h.run([sys.executable, "-IS", "-c", "import time; print(time.monotonic())"]).stdout)
        for h in (hosts.source, hosts.target)
    ]
    assert abs(monotonic[0] - monotonic[1] - DAY) < 5


def test_ranges_of_pids_differ_and_init_is_1(hosts: ThreeHosts) -> None:
    for host, first in ((hosts.source, 1000), (hosts.target, 11000), (hosts.client, 21000)):
        pid = int(host.sh("echo $$"))
        assert first <= pid < first + 1000
        assert host.processes()[1] == "python"
        assert all(p == 1 or p >= first for p in host.processes())


def test_proc_run_var_and_shm_are_private_and_the_rest_is_shared(hosts: ThreeHosts, tmp_path: Path) -> None:
    for place in ("/run/tcpmig/mark", "/var/lib/tcpmig/mark", "/dev/shm/mark"):
        hosts.source.sh(f"echo here >{place}")
        assert hosts.target.run(["test", "-e", place], check=False).returncode == 1
        assert not Path(place).exists()
    hosts.source.sh(f"echo shared >{tmp_path}/file")
    assert hosts.target.sh(f"cat {tmp_path}/file") == "shared\n"
    assert hosts.source.sh("hostname") == "source\n"
    assert hosts.target.sh("ls /sys/class/net").split() == ["eth0", "lo"]


@pytest.mark.parametrize("family", [4, 6])
def test_hosts_reach_each_other_and_the_service_address(hosts: ThreeHosts, family: int) -> None:
    kind = socket.AF_INET6 if family == 6 else socket.AF_INET
    with hosts.source.netns_entered():
        listener = socket.create_server((hosts.net.service(family), 7000), family=kind)
    with hosts.client.netns_entered():
        peer = socket.create_connection((hosts.net.service(family), 7000), timeout=3)
    with listener, peer:
        accepted, address = listener.accept()
        with accepted:
            assert address[0] == (hosts.client.ip6 if family == 6 else hosts.client.ip4)


def test_service_address_can_move(hosts: ThreeHosts) -> None:
    address = f"{hosts.net.service6}/64"
    assert address in hosts.source.addresses()
    hosts.source.remove_address(address)
    hosts.target.add_address(address)
    assert address not in hosts.source.addresses()
    assert address in hosts.target.addresses()


def test_loss_drops_each_way_and_is_taken_back(hosts: ThreeHosts) -> None:
    with hosts.client.loss(2, port=7000):
        rules = hosts.client.sh("nft list ruleset")
        assert rules.count("tcp sport 7000 numgen random mod 100 < 2 drop") == 2
        assert rules.count("tcp dport 7000 numgen random mod 100 < 2 drop") == 2
    assert hosts.client.sh("nft list ruleset") == ""


def test_run_passes_everything(source: Host, tmp_path: Path) -> None:
    odd = "a b'c\"d$e\n*"
    script = "import os, sys; print(sys.argv[1:], os.environ['X'], os.getcwd(), sys.stdin.read()); sys.exit(3)"
    done = source.run([sys.executable, "-c", script, odd], data="in", cwd=tmp_path, env={"X": odd}, check=False)
    assert done.stdout == f"{[odd]} {odd} {tmp_path} in\n"
    assert done.returncode == 3
    with pytest.raises(CommandFailed, match="ended with 3"):
        source.sh("echo out; exit 3")
    with pytest.raises(FileNotFoundError):
        source.run(["no-such-program"])


def test_popen_pids_signals_and_big_output(source: Host) -> None:
    with source.popen(["sleep", "60"]) as process:
        wait_for(lambda: source.processes()[process.pid] == "sleep")  # exec names it a little after it succeeds
        assert Path(f"/proc/{process.outer_pid}/comm").read_text() == "sleep\n"
        assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        assert process.wait(5) == -signal.SIGUSR1
    megabytes = source.run(["head", "-c", 3 << 20, "/dev/zero"]).stdout
    assert len(megabytes) == 3 << 20


def test_popen_passes_descriptors_under_their_numbers(source: Host) -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as end:
        with source.popen(["bash", "-c", f"echo through >&{write}"], pass_fds=[write]) as process:
            assert process.wait(5) == 0
        os.close(write)
        assert end.read() == b"through\n"


def test_init_reaps_orphans(source: Host) -> None:
    source.sh("(sleep 0.05 &) ; exit 0")
    deadline = time.monotonic() + 5
    while "sleep" in source.processes().values():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("relay", [[], ["--relay"]])
def test_rsh_passes_streams_and_exit_status(source: Host, relay: list[str]) -> None:
    done = source.run(
        [*RSH, *relay, "root@target", "sh", "-c", "'cat; hostname; echo bad >&2; exit 7'"], data="in\n", check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("in\ntarget\n", "bad\n", 7)


def test_rsh_names_what_is_missing(source: Host) -> None:
    unknown = source.run([*RSH, "nowhere", "true"], check=False)
    assert unknown.returncode == 255
    assert "nowhere cannot be reached" in unknown.stderr
    assert source.run([*RSH, "target", "no-such-program"], check=False).returncode == 127
    assert source.run([*RSH, "target", "sh", "-c", "'kill -9 $$'"], check=False).returncode == 128 + signal.SIGKILL


def test_cut_line_ends_the_command_s_input(source: Host, target: Host) -> None:
    with source.popen([*RSH, "--relay", "target", "sh", "-c", "'cat; sleep 60'"], stdin=subprocess.PIPE) as rsh:
        wait_for(lambda: "cat" in target.processes().values())
        rsh.kill()
        wait_for(lambda: "sleep" in target.processes().values())


def test_nothing_is_left_after_close() -> None:
    with three_hosts() as hosts:
        with hosts.source.popen(["sleep", "61"]) as process:
            hosts.source.sh("setsid -f sleep 62 >/dev/null 2>&1")
            outer = [process.outer_pid, hosts.source.init, hosts.target.init, hosts.client.init]
            directory = hosts.net.directory
            hosts.net.close()
            assert process.wait(5) == -signal.SIGKILL
    assert not directory.exists()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in outer))


def test_nothing_is_left_when_the_harness_is_killed() -> None:
    program = (
        "import sys, time\n"
        "from tests.hosts import three_hosts\n"
        "with three_hosts() as hosts:\n"
        "    process = hosts.source.popen(['sleep', '63'])\n"
        "    print(hosts.net.directory, process.outer_pid, hosts.source.init, hosts.target.init, flush=True)\n"
        "    time.sleep(60)\n"
    )
    harness = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert harness.stdout is not None
    with harness.stdout:
        directory, *pids = harness.stdout.readline().split()
    assert all(Path("/proc", pid).exists() for pid in pids)
    harness.kill()
    harness.wait(5)
    wait_for(lambda: not any(Path("/proc", pid).exists() for pid in pids))
    wait_for(lambda: not list(Path(directory).glob("*.sock")))
    with Net():  # the next one sweeps up the log files
        assert not Path(directory).exists()


def wait_for(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "not within 10 s"
        time.sleep(0.01)
