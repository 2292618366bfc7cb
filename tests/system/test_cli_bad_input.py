"""What cannot be moved, and what is asked wrongly: a clear error, the exit status of CLI.md, and nothing changed."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from checkpoint.files.abi import pidfd_getfd
from tests.hosts import Host, Net, ThreeHosts
from tests.hosts.process import HostProcess
from tests.hosts.tcpmig import RSH, TCPMIG, tcpmig

PORT = 7009
SERVER = f"""
import socket, sys
listener = socket.create_server((sys.argv[1], {PORT}))
kept = open(sys.argv[2]) if len(sys.argv) > 2 else None
connection, _ = listener.accept()
while data := connection.recv(65536):
    connection.sendall(data)
"""
REFUSED, FAILED, USAGE = 3, 1, 2


def rsh_options() -> list[str]:
    return ["--rsh", shlex.join(RSH), "--remote-command", shlex.join([*TCPMIG, "receive"])]


@dataclass(frozen=True, slots=True)
class Service:
    """A server in the source's host with a client, and how to see that nothing has happened to it."""

    hosts: ThreeHosts
    server: HostProcess
    sock: socket.socket

    def migrate(self, *options: object, host: str = "target") -> tuple[int, dict[str, Any], str]:
        return tcpmig(self.hosts.source, "migrate", self.server.pid, host, *(options or rsh_options()))

    def assert_untouched(self, before: tuple[set[str], set[str], set[int]]) -> None:
        assert self.picture() == before
        self.assert_still_there(before[0])

    def assert_still_there(self, addresses: set[str]) -> None:
        """It runs, with these addresses, and answers."""
        assert self.hosts.source.addresses() == addresses
        assert self.hosts.source.state(self.server.pid) in ("S", "R")
        status = self.hosts.source.path(f"/proc/{self.server.pid}/status").read_text()
        assert "TracerPid:\t0\n" in status
        self.sock.settimeout(5)
        self.sock.sendall(b"still there?")
        assert self.sock.recv(12, socket.MSG_WAITALL) == b"still there?"

    def picture(self) -> tuple[set[str], set[str], set[int]]:
        """Addresses of both hosts, processes at the target."""
        source, target = self.hosts.source, self.hosts.target
        return source.addresses(), target.addresses(), set(target.processes())


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """A file that the server has open for reading."""
    path = tmp_path / "data"
    path.write_text("data")
    return path


def connected(address: tuple[str, int]) -> socket.socket:
    """A connection, as soon as somebody listens there."""
    end = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(address, timeout=5)
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


@pytest.fixture
def service(hosts: ThreeHosts, net: Net, shipped: Path) -> Iterator[Service]:
    argv = [sys.executable, "-IS", "-c", SERVER, net.service4, shipped]
    null = subprocess.DEVNULL
    with hosts.source.popen(argv, stdin=null, stdout=null, stderr=null) as server:
        with hosts.client.netns_entered():
            sock = connected((net.service4, PORT))
        with sock:
            # accepted, and the server at rest
            sock.sendall(b"hello")
            assert sock.recv(5, socket.MSG_WAITALL) == b"hello"
            yield Service(hosts, server, sock)
        server.kill()


def assert_told(done: tuple[int, dict[str, Any], str], status: int, code: str) -> dict[str, Any]:
    """One JSON object with all its fields, and one line on stderr that says the same."""
    found, printed = done[1], done[2]
    assert (done[0], found.get("code")) == (status, code), done
    assert found["outcome"] == {1: "failed", 2: "usage", 3: "refused"}[status]
    assert found["message"]
    assert found["fix"].endswith(".")
    assert "Traceback" not in printed
    return found


# --- processes


@pytest.fixture(params=["check", "migrate"])
def about(request: pytest.FixtureRequest) -> Callable[[Host, object], tuple[int, dict[str, Any], str]]:
    """A command about a process that cannot be moved."""

    def run(host: Host, pid: object) -> tuple[int, dict[str, Any], str]:
        more = ["target", *rsh_options()] if request.param == "migrate" else []
        return tcpmig(host, request.param, pid, *more)

    return run


def test_no_such_process(hosts: ThreeHosts, about: Any) -> None:
    found = assert_told(about(hosts.source, 999999), REFUSED, "TM-0301")
    assert found["object"] == "pid 999999"


def test_the_init_of_the_host(hosts: ThreeHosts, about: Any) -> None:
    assert_told(about(hosts.source, 1), REFUSED, "TM-0303")


def test_a_zombie(hosts: ThreeHosts, about: Any) -> None:
    script = "import os, time\nif os.fork():\n    print('up', flush=True); time.sleep(60)\n"
    with hosts.source.popen([sys.executable, "-IS", "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        children = hosts.source.path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        pid = int(children.read_text())
        while hosts.source.state(pid) != "Z":
            time.sleep(0.01)
        assert_told(about(hosts.source, pid), REFUSED, "TM-0305")
        parent.kill()


@pytest.mark.parametrize("text", ["0", "-1", "one", "1.5", ""])
def test_what_is_no_process_number(source: Host, about: Any, text: str) -> None:
    # "-1" begins like an option: it must not become one
    assert_told(about(source, text), USAGE, "TM-0110")


@pytest.mark.parametrize("command", ["exec {tcpmig} {verb} $$ {more}", "{tcpmig} {verb} $$ {more}; exit $?"])
@pytest.mark.parametrize("verb", ["check", "migrate"])
def test_ourselves_and_our_ancestors(hosts: ThreeHosts, command: str, verb: str) -> None:
    more = shlex.join(["target", *rsh_options()] if verb == "migrate" else [])
    script = command.format(tcpmig=shlex.join(TCPMIG), verb=verb, more=f"{more} --json")
    done = hosts.source.run(["/bin/sh", "-c", script], check=False)
    assert_told((done.returncode, json.loads(done.stdout), done.stderr), REFUSED, "TM-0304")


def test_a_kernel_thread(tmp_path: Path) -> None:
    # test hosts have none: their PID namespaces are their own
    environment = os.environ | {"TCPMIG_STATE_DIR": str(tmp_path)}
    done = subprocess.run(
        [*TCPMIG, "check", "2", "--json"], capture_output=True, text=True, env=environment, check=False
    )
    assert_told((done.returncode, json.loads(done.stdout), done.stderr), REFUSED, "TM-0302")


def test_a_process_that_is_traced(service: Service, about: Any) -> None:
    tracer = (
        "import ctypes, sys, time; libc = ctypes.CDLL(None)\n"
        "if libc.ptrace(0x4206, int(sys.argv[1]), 0, 0): sys.exit('no')\n"
        "print('traced', flush=True); time.sleep(60)"
    )
    argv = [sys.executable, "-IS", "-c", tracer, service.server.pid]
    with service.hosts.source.popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"traced\n"
        assert_told(about(service.hosts.source, service.server.pid), REFUSED, "TM-0306")
        process.kill()


def test_without_capabilities_each_one_missing_is_named(service: Service) -> None:
    # root without capabilities: it may still read what is root's (this Python may lie in root's home)
    drop = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"]
    done = service.hosts.source.run([*drop, *TCPMIG, "check", service.server.pid, "--json"], check=False)
    found = json.loads(done.stdout)
    assert (done.returncode, found["outcome"], found["code"]) == (REFUSED, "refused", "TM-0101")
    refused = [v for v in found["verdicts"] if v["status"] == "refuse"]
    assert {"CAP_SYS_PTRACE", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_SYS_ADMIN"} <= {v["subject"] for v in refused}
    assert [v["code"] for v in refused if v["subject"] == f"pid {service.server.pid}"] == ["TM-0307"]


# --- targets


def test_a_host_that_is_not_there(service: Service) -> None:
    before = service.picture()
    found = assert_told(service.migrate(*rsh_options(), host="nowhere"), REFUSED, "TM-0607")
    assert "nowhere cannot be reached" in found["message"]
    service.assert_untouched(before)


@pytest.mark.parametrize(
    ("rsh", "code", "status"),
    [
        ("/nonexistent/ssh", "TM-0607", REFUSED),
        ("'unbalanced", "TM-0617", USAGE),
        ("", "TM-0617", USAGE),
        ("echo Welcome to", "TM-0603", REFUSED),
        ("false", "TM-0607", REFUSED),
    ],
)
def test_a_remote_shell_that_does_not_do(service: Service, rsh: str, code: str, status: int) -> None:
    before = service.picture()
    assert_told(service.migrate("--rsh", rsh), status, code)
    service.assert_untouched(before)


def test_a_target_where_a_pid_is_taken(service: Service) -> None:
    target, pid = service.hosts.target, service.server.pid
    # the next process there gets the server's number
    target.run(["sh", "-c", f"echo {pid - 1} >/proc/sys/kernel/ns_last_pid"])
    with target.popen(["sleep", "60"]) as sleeper:
        assert sleeper.pid == pid
        before = service.picture()
        found = assert_told(service.migrate(), REFUSED, "TM-0381")
        assert found["object"] == f"pid {pid}"
        assert "sleep" in found["message"]
        service.assert_untouched(before)
        sleeper.kill()


def test_a_target_without_a_file(service: Service, shipped: Path) -> None:
    before = service.picture()
    # a mount hides it there and nowhere else: the hosts' mount namespaces are their own
    service.hosts.target.sh(f"mount -t tmpfs none {shipped.parent}")
    found = assert_told(service.migrate(), REFUSED, "TM-0345")
    assert found["object"] == str(shipped)
    service.assert_untouched(before)


def test_a_target_with_another_file(service: Service, shipped: Path) -> None:
    before = service.picture()
    service.hosts.target.sh(f"mount -t tmpfs none {shipped.parent}; echo other data >{shipped}")
    found = assert_told(service.migrate(), REFUSED, "TM-0346")
    assert found["object"] == str(shipped)
    service.assert_untouched(before)


def test_an_address_that_somebody_has_at_the_target(service: Service, net: Net) -> None:
    service.hosts.target.add_address(f"{net.service4}/24")
    before = service.picture()
    found = assert_told(service.migrate(), REFUSED, "TM-0704")
    assert net.service4 in found["object"]
    assert service.picture() == before
    service.hosts.target.remove_address(f"{net.service4}/24")


def test_a_connection_on_an_interface_that_the_target_has_not(service: Service) -> None:
    server = service.server.outer_pid
    pidfd = os.pidfd_open(server)
    (fd,) = (int(fd) for fd in os.listdir(f"/proc/{server}/fd") if is_connected(pidfd, int(fd)))
    with socket.socket(fileno=pidfd_getfd(pidfd, fd)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    os.close(pidfd)
    service.hosts.target.ip("link set eth0 name lan9")
    before = service.hosts.source.addresses()
    found = assert_told(service.migrate(), REFUSED, "TM-0593")
    assert found["object"] == "eth0"
    service.assert_still_there(before)
    status, found, _ = service.migrate("--dry-run", "--map-dev", "eth0=lan9", *rsh_options())
    assert status == 0, found


def is_connected(pidfd: int, fd: int) -> bool:
    duplicate = pidfd_getfd(pidfd, fd)
    if not stat.S_ISSOCK(os.fstat(duplicate).st_mode):
        os.close(duplicate)
        return False
    with socket.socket(fileno=duplicate) as sock, contextlib.suppress(OSError):
        return bool(sock.getpeername())
    return False


def test_a_refusal_of_the_target_is_printed_once(service: Service) -> None:
    service.hosts.target.add_address(f"{service.hosts.net.service4}/24")
    argv = [*TCPMIG, "migrate", service.server.pid, "target", *rsh_options()]
    done = service.hosts.source.run(argv, check=False)
    assert done.returncode == REFUSED
    assert done.stderr.count("TM-0704") == 1, done.stderr


def test_an_address_that_is_not_here(service: Service, net: Net) -> None:
    before = service.picture()
    assert_told(service.migrate("--address", "10.99.9.9/24", *rsh_options()), REFUSED, "TM-0701")
    assert_told(service.migrate("--address", "nonsense", *rsh_options()), USAGE, "TM-0708")
    assert_told(service.migrate("--map-dev", "eth0", *rsh_options()), USAGE, "TM-0110")
    service.assert_untouched(before)


def test_a_dry_run_changes_nothing(service: Service) -> None:
    before = service.picture()
    status, found, _ = service.migrate("--dry-run", *rsh_options())
    assert (status, found["outcome"]) == (0, "done")
    assert all(v["status"] != "refuse" for v in found["verdicts"])
    status, asked, _ = tcpmig(service.hosts.source, "check", service.server.pid, "--to", "target", *rsh_options())
    assert (status, asked["outcome"]) == (0, "done")
    assert len(asked["verdicts"]) > len(found["verdicts"])
    service.assert_untouched(before)


def test_a_dry_run_foretells_what_a_migration_takes(service: Service) -> None:
    _, found, _ = service.migrate("--dry-run", *rsh_options())
    status, done, said = service.migrate()
    assert status == 0, said
    (predicted,) = found["predicted"]
    # it waits for its client, and writes nothing: one round, and little for the stop; a last look may come between
    assert len(predicted["rounds"]) == 2
    assert 2 <= len(done["rounds"]) <= 3
    assert 0.7 < predicted["rounds"][0]["bytes"] / done["rounds"][0]["bytes"] < 1.4
    assert predicted["rounds"][-1]["bytes"] < 1 << 20
    assert predicted["bytes_sent"] == sum(one["bytes"] for one in predicted["rounds"])
    assert predicted["line_rate"] > 1e6
    assert predicted["stop_ms"] > 0
    assert not predicted["busy"]


def test_ctrl_c_before_the_end_leaves_everything_as_it_was(service: Service) -> None:
    before = service.picture()
    # a target that never answers: the remote command reads to the end of file and says nothing before
    command = [*TCPMIG, "migrate", service.server.pid, "target", "--rsh", shlex.join(RSH)]
    silent = [*command, "--remote-command", "wc -c", "--json"]
    with service.hosts.source.popen(silent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as migration:
        assert migration.stdout is not None
        while "wc" not in service.hosts.target.processes().values():
            time.sleep(0.02)
        migration.send_signal(signal.SIGINT)
        found = json.loads(migration.stdout.readline())
        status = migration.wait(15)
    assert (status, found["outcome"], found["code"]) == (FAILED, "failed", "TM-0111"), found
    while set(service.hosts.target.processes()) != before[2]:
        time.sleep(0.02)
    service.assert_untouched(before)
