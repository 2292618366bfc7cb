"""`conns`, `get`, `freeze` and `resume` on a real server with a real client, between hosts."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.hosts import Host, Net
from tests.hosts.process import HostProcess
from tests.hosts.tcpmig import TCPMIG, tcpmig
from tests.tscnet import wait_until

PORT = 7007
SILENCE = 0.6  # seconds: longer than a retransmission time-out, so that a leak would be seen
ECHO = f"""
import socket, sys
listener = socket.create_server((sys.argv[1], {PORT}), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
print("ready", flush=True)
connection, _ = listener.accept()
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 45678)
connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
connection.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 77)
while data := connection.recv(65536):
    connection.sendall(data)
"""


@dataclass(frozen=True, slots=True)
class Talk:
    """An echo server in the source's host and a connection to it from the client's."""

    host: Host
    server: HostProcess
    sock: socket.socket
    conn_id: str

    def echo(self, data: bytes, timeout: float = 5) -> bytes:
        self.sock.settimeout(timeout)
        self.sock.sendall(data)
        return self.sock.recv(len(data), socket.MSG_WAITALL)

    def silent(self) -> bool:
        """Whether nothing comes back for a while."""
        self.sock.settimeout(SILENCE)
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        return False

    def stop_with(self, data: bytes) -> None:
        """Stop the server, then send it data that it leaves in its receive queue."""
        self.server.send_signal(signal.SIGSTOP)
        # a signal takes effect when the server runs next: until then it would still read
        wait_until(lambda: self.host.state(self.server.pid) == "T")
        self.sock.sendall(data)
        wait_until(lambda: self.unread() == len(data))

    def unread(self) -> int:
        _, found, _ = tcpmig(self.host, "conns", self.server.pid)
        unread: int = found["connections"][0]["receive_queue"]
        return unread

    def get(self, *keywords: str) -> dict[str, Any]:
        status, found, _ = tcpmig(self.host, "get", self.conn_id, *keywords)
        assert status == 0
        assert found["connection"] == self.conn_id
        return {keyword: item["value"] for keyword, item in found["items"].items()}


def end(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


both_families = pytest.mark.parametrize("talk", [4, 6], indirect=True)


@pytest.fixture
def talk(source: Host, client: Host, net: Net, request: pytest.FixtureRequest) -> Iterator[Talk]:
    address = net.service(getattr(request, "param", 4))
    with source.popen([sys.executable, "-IS", "-c", ECHO, address], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        with client.netns_entered():
            sock = socket.create_connection((address, PORT), timeout=5)
        with sock:
            mine = sock.getsockname()
            found = Talk(source, server, sock, f"tcp:{end(address, PORT)}-{end(mine[0], mine[1])}")
            assert found.echo(b"hello") == b"hello"
            yield found
            server.kill()


def rules(host: Host) -> str:
    return host.sh("ip rule; ip -6 rule")


@both_families
def test_conns_tells_whose_a_connection_is(talk: Talk) -> None:
    status, found, _ = tcpmig(talk.host, "conns", talk.server.pid)
    [one] = found["connections"]
    assert status == 0
    assert one["connection"] == talk.conn_id
    assert one["state"] == "ESTABLISHED"
    assert [owner["pid"] for owner in one["owners"]] == [talk.server.pid]
    assert (one["receive_queue"], one["send_queue"], one["frozen"]) == (0, 0, False)
    assert 0 < one["rtt_us"] < 1_000_000
    assert one["cwnd"] > 0
    [process] = found["processes"]
    assert (process["pid"], process["user"], process["threads"]) == (talk.server.pid, "root", 1)
    assert process["memory"] > 1 << 20
    assert process["age"] < 600
    _, everything, _ = tcpmig(talk.host, "conns")
    assert talk.conn_id in [each["connection"] for each in everything["connections"]]


def test_conns_tells_what_waits(talk: Talk) -> None:
    talk.stop_with(b"x" * 1234)
    assert talk.unread() == 1234
    talk.server.send_signal(signal.SIGCONT)


def test_conns_watches_until_it_is_ended(talk: Talk) -> None:
    command = [*TCPMIG, "conns", talk.server.pid, "--watch", "--interval", "0.1", "--json"]
    with talk.host.popen(command, stdout=subprocess.PIPE) as watching:
        assert watching.stdout is not None
        lines = [json.loads(watching.stdout.readline()) for _ in range(3)]
        watching.send_signal(signal.SIGINT)
        assert watching.wait(10) == 0
    assert all(line["connections"][0]["connection"] == talk.conn_id for line in lines)


@both_families
def test_get_reads_without_disturbing(talk: Talk) -> None:
    items = talk.get()
    assert items["tcp.user_timeout"] == 45678
    assert (items["so.keepalive"], items["so.mark"]) == (1, 77)
    assert items["cwnd"] > 0
    assert items["tcp.nodelay"] == 0
    assert set(talk.get("hard")) | set(talk.get("soft")) == set(items)
    assert talk.get("tcp.nodelay", "state") == {"tcp.nodelay": 0, "state": "ESTABLISHED"}
    assert talk.echo(b"still here") == b"still here"


@both_families
def test_set_writes_what_get_reads(talk: Talk) -> None:
    status, found, _ = tcpmig(talk.host, "set", talk.conn_id, "tcp.nodelay=1", "so.linger=1,7", "congestion=reno")
    assert (status, found["set"]) == (0, {"tcp.nodelay": 1, "so.linger": [1, 7], "congestion": "reno"})
    assert talk.get("tcp.nodelay", "so.linger", "congestion") == found["set"]
    # sequence numbers: its process is in recv() all the time
    before = talk.get("snd_una")["snd_una"]
    assert talk.echo(b"moved on") == b"moved on"
    wait_until(lambda: talk.get("unacknowledged")["unacknowledged"] == 0)
    assert talk.get("snd_una")["snd_una"] == (before + 8) & 0xFFFFFFFF
    assert tcpmig(talk.host, "set", talk.conn_id, f"snd_una={before:#x}")[0] == 0
    assert talk.get("snd_una")["snd_una"] == before
    assert tcpmig(talk.host, "set", talk.conn_id, f"snd_una={(before + 8) & 0xFFFFFFFF}")[0] == 0
    assert talk.echo(b"still here") == b"still here"
    for wrong, status, code in (
        ("tcp.nodelay", 2, "TM-0110"),
        ("tcp.nodelay=yes", 2, "TM-0110"),
        ("nothing=1", 2, "TM-0220"),
        ("bytes_sent=1", 3, "TM-0221"),
        ("rcv_wnd=-1", 3, "TM-0222"),
        ("congestion=none-such", 1, "TM-0223"),
    ):
        done = tcpmig(talk.host, "set", talk.conn_id, "so.keepalive=0", wrong)
        assert (done[0], done[1]["code"]) == (status, code), wrong
        assert talk.get("so.keepalive") == {"so.keepalive": 1}, "it was set although another was refused"


@both_families
def test_a_frozen_connection_is_silent_until_it_is_resumed(talk: Talk) -> None:
    before, rules_before = talk.get(), rules(talk.host)
    status, found, _ = tcpmig(talk.host, "freeze", talk.conn_id)
    assert (status, found["outcome"], found["connection"]) == (0, "done", talk.conn_id)

    talk.sock.sendall(b"into the silence")
    assert talk.silent()
    _, listed, _ = tcpmig(talk.host, "conns", talk.server.pid)
    assert listed["connections"][0]["frozen"] is True
    assert listed["connections"][0]["state"] == "ESTABLISHED"
    assert listed["connections"][0]["receive_queue"] == 0, "nothing got in"
    frozen = talk.get()
    assert [frozen[k] for k in ("tcp.user_timeout", "so.keepalive", "so.mark")] == [45678, 1, 77]

    status, found, _ = tcpmig(talk.host, "resume", talk.conn_id)
    assert status == 0
    assert found["frozen_seconds"] > SILENCE
    talk.sock.settimeout(10)
    assert talk.sock.recv(100) == b"into the silence"
    assert talk.echo(b"and on") == b"and on"
    after = talk.get()
    options = {k: v for k, v in before.items() if "." in k}
    assert {k: v for k, v in after.items() if "." in k} == options
    assert rules(talk.host) == rules_before
    assert not list(talk.host.path("/run/tcpmig/frozen").glob("*.frozen"))


def test_what_the_server_says_meanwhile_comes_later(talk: Talk) -> None:
    talk.stop_with(b"question")
    tcpmig(talk.host, "freeze", talk.conn_id)
    talk.server.send_signal(signal.SIGCONT)  # it answers into the blackhole
    assert talk.silent()
    tcpmig(talk.host, "resume", talk.conn_id)
    talk.sock.settimeout(10)
    assert talk.sock.recv(8, socket.MSG_WAITALL) == b"question"


def test_freezing_twice_is_refused(talk: Talk) -> None:
    tcpmig(talk.host, "freeze", talk.conn_id)
    status, found, _ = tcpmig(talk.host, "freeze", talk.conn_id)
    assert (status, found["outcome"], found["code"]) == (3, "refused", "TM-0280")
    assert found["object"] == talk.conn_id
    assert tcpmig(talk.host, "resume", talk.conn_id)[0] == 0
    status, found, _ = tcpmig(talk.host, "resume", talk.conn_id)
    assert (status, found["code"]) == (3, "TM-0281")
    assert talk.echo(b"fine") == b"fine"


def test_the_record_is_private_and_of_this_host(talk: Talk, target: Host) -> None:
    tcpmig(talk.host, "freeze", talk.conn_id)
    [record] = talk.host.path("/run/tcpmig/frozen").glob("*.frozen")
    assert record.stat().st_mode & 0o777 == 0o600
    assert record.parent.stat().st_mode & 0o777 == 0o700
    # the same file on another host is nothing to it
    there = target.path("/run/tcpmig/frozen")
    there.mkdir(parents=True)
    (there / record.name).write_bytes(record.read_bytes())
    status, found, _ = tcpmig(target, "resume", talk.conn_id)
    assert (status, found["code"]) == (3, "TM-0281")
    assert tcpmig(talk.host, "resume", talk.conn_id)[0] == 0


def test_a_damaged_record_hides_no_other(talk: Talk) -> None:
    tcpmig(talk.host, "freeze", talk.conn_id)
    (talk.host.path("/run/tcpmig/frozen") / "0.frozen").write_bytes(b"\xff")
    status, _, printed = tcpmig(talk.host, "resume", talk.conn_id)
    assert status == 0
    assert "is no record of a frozen connection" in printed


def test_a_frozen_connection_survives_its_owner(talk: Talk) -> None:
    rules_before = rules(talk.host)
    tcpmig(talk.host, "freeze", talk.conn_id)
    talk.server.kill()
    talk.host.wait_until_gone(talk.server.pid)
    talk.sock.sendall(b"is anybody there?")
    assert talk.silent(), "the end of the process reached the peer"
    _, listed, _ = tcpmig(talk.host, "conns")
    assert [(c["state"], c["frozen"]) for c in listed["connections"]] == [("ESTABLISHED", True)]
    # nobody owns it: let live again, it ends as if the process ended now
    assert tcpmig(talk.host, "resume", talk.conn_id)[0] == 0
    talk.sock.settimeout(5)
    with pytest.raises(ConnectionResetError):
        # what the peer said was never read (RFC 9293 3.6.1)
        talk.sock.recv(1)
    assert rules(talk.host) == rules_before
    assert tcpmig(talk.host, "resume", talk.conn_id)[1]["code"] == "TM-0281"


def test_a_connection_that_went_is_forgotten(talk: Talk) -> None:
    rules_before = rules(talk.host)
    tcpmig(talk.host, "freeze", talk.conn_id)
    keepers = {o["pid"] for c in tcpmig(talk.host, "conns")[1]["connections"] for o in c["owners"]} - {talk.server.pid}
    assert len(keepers) == 1
    talk.host.sh(f"kill -9 {keepers.pop()}")
    talk.server.kill()
    talk.host.wait_until_gone(talk.server.pid)
    status, found, _ = tcpmig(talk.host, "resume", talk.conn_id)
    assert (status, found["code"]) == (3, "TM-0202")
    assert rules(talk.host) == rules_before
    assert tcpmig(talk.host, "resume", talk.conn_id)[1]["code"] == "TM-0281"


def test_what_is_asked_wrongly(talk: Talk) -> None:
    cases = [
        (("get", talk.conn_id, "nothing"), 2, "TM-0220", "nothing"),
        (("freeze", "tcp:nonsense"), 2, "TM-0201", "tcp:nonsense"),
        (("freeze", "tcp:10.1.1.1:1-10.1.1.2:2"), 3, "TM-0202", "tcp:10.1.1.1:1-10.1.1.2:2"),
        (("get", "tcp:[fd00::1]:1-[fd00::2]:2"), 3, "TM-0202", "tcp:[fd00::1]:1-[fd00::2]:2"),
        (("conns", "nobody"), 2, "TM-0110", ""),
    ]
    for arguments, status, code, what in cases:
        done = tcpmig(talk.host, *arguments)
        assert (done[0], done[1]["code"], done[1]["object"]) == (status, code, what), arguments
    assert talk.echo(b"untouched") == b"untouched"


def test_a_connection_within_the_host_is_refused(source: Host) -> None:
    script = (
        "import socket, time; l = socket.create_server(('127.0.0.1', 7008));"
        "c = socket.create_connection(('127.0.0.1', 7008)); s, _ = l.accept(); print(c.getsockname()[1], flush=True);"
        "time.sleep(60)"
    )
    with source.popen([sys.executable, "-IS", "-c", script], stdout=subprocess.PIPE) as both:
        assert both.stdout is not None
        port = int(both.stdout.readline())
        status, found, _ = tcpmig(source, "freeze", f"tcp:127.0.0.1:7008-127.0.0.1:{port}")
        assert (status, found["code"]) == (3, "TM-0212")
        both.kill()
