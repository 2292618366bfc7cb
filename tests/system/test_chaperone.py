"""The chaperone between hosts: who may, who may not, and what is left when somebody dies."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tcpstate import codec
from tcpstate.chaperone.privilege import NEEDED
from tcpstate.kernel.capability import Cap, names
from tcpstate.signing import Signed, generate_key
from tests.hosts import Host, ThreeHosts, three_hosts
from tests.hosts.agent import Agent, AgentError, open_to_all
from tests.hosts.process import HostProcess
from tests.hosts.tcpmig import TCPMIG
from tests.packets import Watcher

OWNER, STRANGER = 1001, 1002
KEEPER = "daemon"
PORT = 7011
RUN = "/run/tcpmig-chaperone"
SILENCE = 0.5  # seconds: longer than a retransmission time-out
SERVE = """
import os, socket
from tcpstate.chaperone.client import Chaperone
listener = socket.create_server(({address!r}, {port}), family=socket.{family})
"""


def start(host: Host, *options: object, run: str = RUN, command: list[object] | None = None) -> HostProcess:
    """A chaperone that listens on ``run``/socket."""
    command = command or [*TCPMIG, "chaperone", "--user", KEEPER, "--socket", f"{run}/socket", *options]
    process = host.popen(command, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = b""
    while b"listens on" not in said:
        line = process.stderr.readline()
        if not line:
            raise AssertionError(f"the chaperone ended with {process.wait(5)}: {said.decode()}")
        said += line
    # nothing of what it says later must fill the pipe
    os.set_blocking(process.stderr.fileno(), False)
    return process


def said(process: HostProcess) -> str:
    assert process.stderr is not None
    return (process.stderr.read() or b"").decode()


@dataclass
class Talk:
    """A server's process of OWNER with one connection, and the client's end."""

    hosts: ThreeHosts
    chaperone: HostProcess
    agent: Agent
    sock: socket.socket
    conn: str

    def echo(self, data: bytes, agent: Agent | None = None) -> bool:
        """Whether the server gets what the client sends, and the reverse."""
        agent = agent or self.agent
        self.sock.settimeout(10)
        self.sock.sendall(data)
        agent(f"got = take({len(data)}); sock.sendall(got[::-1])")
        return agent("got") == data and taken(self.sock, len(data)) == data[::-1]

    def silent(self) -> bool:
        """Whether what the client sends is not taken."""
        self.sock.sendall(b"?")
        time.sleep(SILENCE)
        return bool(self.agent("sock.setblocking(False), 0") and self.agent("peek()") == b"")


def taken(sock: socket.socket, count: int) -> bytes:
    """So many bytes; TimeoutError."""
    found = b""
    while len(found) < count and (data := sock.recv(count - len(found))):
        found += data
    return found


HELPERS = """
def take(count):
    sock.settimeout(10)
    found = b""
    while len(found) < count and (data := sock.recv(count - len(found))):
        found += data
    return found
def peek():
    try:
        return sock.recv(100, socket.MSG_PEEK)
    except BlockingIOError:
        return b""
"""


@contextlib.contextmanager
def talking(
    hosts: ThreeHosts, chaperone: HostProcess, family: int = 4, uid: int = OWNER, run: str = RUN
) -> Iterator[Talk]:
    address = hosts.net.service(family)
    kind = "AF_INET6" if family == 6 else "AF_INET"
    with Agent(hosts.source, uid or None) as agent:
        agent(SERVE.format(address=address, port=PORT, family=kind))
        with hosts.client.netns_entered():
            sock = socket.create_connection((address, PORT), timeout=5)
        with sock:
            mine = sock.getsockname()
            ends = [f"[{a}]:{p}" if family == 6 else f"{a}:{p}" for a, p in ((address, PORT), mine[:2])]
            agent("sock, _ = listener.accept()")
            agent(HELPERS)
            agent(f"chaperone = Chaperone('{run}/socket')")
            yield Talk(hosts, chaperone, agent, sock, f"tcp:{ends[0]}-{ends[1]}")


@pytest.fixture(scope="module")
def opened() -> Iterator[ThreeHosts]:
    with three_hosts() as hosts:
        open_to_all(hosts.source)
        open_to_all(hosts.target)
        yield hosts


@pytest.fixture(scope="module")
def keeper(opened: ThreeHosts) -> Iterator[HostProcess]:
    """The source's chaperone."""
    with start(opened.source) as chaperone:
        yield chaperone


@pytest.fixture
def talk(opened: ThreeHosts, keeper: HostProcess, request: pytest.FixtureRequest) -> Iterator[Talk]:
    said(keeper)
    with talking(opened, keeper, getattr(request, "param", 4)) as found:
        yield found


def code_of(agent: Agent, code: str) -> str:
    """The error code that this raises; nothing if it raises none."""
    try:
        agent(code)
    except AgentError as error:
        return error.code or str(error)
    return ""


both_families = pytest.mark.parametrize("talk", [4, 6], indirect=True)


def test_it_has_the_capabilities_it_needs_and_no_others(talk: Talk) -> None:
    status = dict(
        line.split(":\t", 1) for line in talk.hosts.source.sh(f"cat /proc/{talk.chaperone.pid}/status").splitlines()
    )
    mask = f"{sum(1 << cap for cap in NEEDED):016x}"
    none = f"{0:016x}"
    shown = {name: status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    print(shown, names(int(status["CapEff"], 16)), f"Uid {status['Uid']}")
    assert shown == {"CapInh": none, "CapPrm": mask, "CapEff": mask, "CapBnd": mask, "CapAmb": none}
    assert status["NoNewPrivs"] == "1"
    assert set(status["Uid"].split()) == {"1"}
    assert status["Groups"].strip() == ""


@both_families
@pytest.mark.parametrize("by", ["sock", "name"])
def test_an_owner_freezes_reads_and_resumes_its_connection(talk: Talk, by: str) -> None:
    target = "sock" if by == "sock" else repr(talk.conn)
    assert talk.agent("os.getresuid()") == (OWNER,) * 3
    assert int(talk.agent("[l for l in open('/proc/self/status') if l.startswith('CapEff')][0]").split()[1], 16) == 0
    talk.agent("sock.setsockopt(6, 18, 45678); sock.setsockopt(1, 9, 1)")  # TCP_USER_TIMEOUT, SO_KEEPALIVE
    items = talk.agent(f"chaperone.get({target})")
    assert (items["connection"], items["uid"], items["frozen"]) == (talk.conn, OWNER, 0)
    assert items["info.snd_cwnd"] > 0

    assert talk.agent(f"str(chaperone.freeze({target}))") == talk.conn
    assert talk.silent()
    frozen = talk.agent(f"chaperone.get({target}, 'frozen', 'tcp.user_timeout', 'so.keepalive', 'so.mark')")
    assert frozen == {"frozen": 1, "tcp.user_timeout": 45678, "so.keepalive": 1, "so.mark": 0}
    assert code_of(talk.agent, f"chaperone.freeze({target})") == "TM-0280"

    talk.agent(f"chaperone.resume({target})")
    talk.agent("sock.setblocking(True)")
    assert talk.agent("sock.recv(1)") == b"?"
    assert talk.echo(b"it flows again")
    assert talk.agent("sock.getsockopt(6, 18), sock.getsockopt(1, 9), sock.getsockopt(1, 36)") == (45678, 1, 0)
    assert code_of(talk.agent, f"chaperone.resume({target})") == "TM-0281"
    log = said(talk.chaperone)
    assert f"uid={OWNER} pid={talk.agent.pid} freeze conn={talk.conn} result=done" in log
    assert f"freeze conn={talk.conn} result=TM-0280" in log


def test_another_user_is_denied(talk: Talk) -> None:
    with Agent(talk.hosts.source, STRANGER) as stranger:
        stranger("from tcpstate.chaperone.client import Chaperone; chaperone = Chaperone()")
        for what in ("get", "freeze", "export", "resume", "discard"):
            code = code_of(stranger, f"chaperone.{what}({talk.conn!r})")
            assert code == ("TM-0261" if what in ("get", "freeze") else "TM-0281"), what
        talk.agent("chaperone.freeze(sock)")
        for what in ("get", "freeze", "export", "resume", "discard", "release"):
            assert code_of(stranger, f"chaperone.{what}({talk.conn!r})") == "TM-0261", what
    assert f"uid={STRANGER}" in said(talk.chaperone)
    talk.agent("chaperone.resume(sock)")
    assert talk.echo(b"untouched")


def test_a_socket_of_root_is_not_the_users_who_holds_it(opened: ThreeHosts, keeper: HostProcess) -> None:
    """As of a service that makes its socket as root and hands it down."""
    with talking(opened, keeper, uid=0) as talk:
        talk.agent(f"os.setgroups([]); os.setresgid({OWNER}, {OWNER}, {OWNER})")
        talk.agent(f"os.setresuid({OWNER}, {OWNER}, {OWNER}); chaperone = Chaperone()")
        for target in ("sock", repr(talk.conn)):
            assert code_of(talk.agent, f"chaperone.freeze({target})") == "TM-0261"
        assert code_of(talk.agent, "chaperone.get(listener)") == "TM-0261"
        assert talk.echo(b"untouched")


def test_what_is_no_connection_is_refused(talk: Talk) -> None:
    talk.agent("import tempfile; file = tempfile.TemporaryFile()")
    talk.agent("class Odd(socket.socket): pass")
    for make in ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM)", "socket.socketpair()[0]", "listener"):
        assert code_of(talk.agent, f"chaperone.freeze({make})") == "TM-0212", make
    assert code_of(talk.agent, "chaperone.freeze('tcp:10.77.1.1:1-10.77.1.2:2')") == "TM-0202"
    assert code_of(talk.agent, "chaperone.freeze('nonsense')") == "TM-0201"
    assert talk.echo(b"and it goes on")


def test_a_process_that_runs_is_not_exported_by_name(talk: Talk) -> None:
    with Agent(talk.hosts.source, OWNER) as helper:
        helper("from tcpstate.chaperone.client import Chaperone; chaperone = Chaperone()")
        helper(f"chaperone.freeze({talk.conn!r})")
        assert code_of(helper, f"chaperone.export({talk.conn!r})") == "TM-0265"
        talk.agent.process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 5
        while talk.hosts.source.state(talk.agent.pid) != "T":
            assert time.monotonic() < deadline
        assert len(helper(f"chaperone.export({talk.conn!r})")) > 300
        assert code_of(helper, f"chaperone.discard({talk.conn!r})") == "TM-0268"
        helper(f"chaperone.resume({talk.conn!r})")
        talk.agent.process.send_signal(signal.SIGCONT)
    assert talk.echo(b"and it goes on")


@pytest.mark.parametrize("family", [4, 6])
def test_a_connection_moves_with_no_privilege_but_the_chaperones(
    opened: ThreeHosts, keeper: HostProcess, family: int
) -> None:
    address = opened.net.service(family)
    length = 64 if family == 6 else 24
    with (
        Watcher(opened.client, port=PORT) as watcher,
        start(opened.target, "--address", address) as there,
        talking(opened, keeper, family) as talk,
        Agent(opened.target, OWNER) as heir,
    ):
        assert talk.echo(b"before")
        talk.agent("sock.sendall(b'on its way')")
        talk.sock.sendall(b"unread")
        deadline = time.monotonic() + 5
        while talk.agent("peek()") != b"unread":
            assert time.monotonic() < deadline
        talk.agent("chaperone.freeze(sock)")
        begun = time.monotonic()
        record = talk.agent("chaperone.export(sock)")
        heir("import os, socket; from tcpstate.chaperone.client import Chaperone; chaperone = Chaperone()")
        elapsed = time.monotonic() - begun
        assert heir(f"str(chaperone.rebuild({record!r}, elapsed={elapsed}))") == talk.conn
        assert code_of(heir, f"chaperone.release({talk.conn!r})") == "TM-0269", "the address is not there"
        talk.sock.sendall(b"sent into the silence")
        opened.source.remove_address(f"{address}/{length}")
        opened.target.add_address(f"{address}/{length}")
        deadline = time.monotonic() + 5
        while code_of(heir, f"sock = chaperone.release({talk.conn!r})"):
            assert time.monotonic() < deadline
        talk.agent("chaperone.discard(sock)")
        assert code_of(talk.agent, "sock.send(b'x')"), "the old socket is dead"
        talk.agent("sock.close()")
        opened.client.sh("ip neigh flush all")  # what an announcement does

        assert heir("os.fstat(sock.fileno()).st_uid") == OWNER
        heir(HELPERS)
        expected = b"unread" + b"sent into the silence"
        assert heir(f"take({len(expected)})") == expected
        talk.sock.settimeout(10)
        assert talk.sock.recv(100) == b"on its way"
        assert talk.echo(b"and afterwards" * 1000, heir)
        assert watcher.mark().rsts == []
        assert f"uid={OWNER} pid={heir.pid} release conn={talk.conn} result=done" in said(there)
    opened.target.remove_address(f"{address}/{length}")
    opened.source.add_address(f"{address}/{length}")
    opened.client.sh("ip neigh flush all")


def test_what_a_vanished_client_froze_flows_again(talk: Talk) -> None:
    with Agent(talk.hosts.source, OWNER) as helper:
        helper("from tcpstate.chaperone.client import Chaperone; chaperone = Chaperone()")
        helper(f"chaperone.freeze({talk.conn!r})")
        assert talk.silent()
        helper.process.kill()
    talk.agent("sock.settimeout(10)")
    assert talk.agent("sock.recv(1)") == b"?"
    assert talk.echo(b"it flows again")


def test_a_policy_keeps_what_a_vanished_client_froze_until_it_expires(opened: ThreeHosts) -> None:
    with (
        start(opened.source, "--keep-frozen", "--frozen-seconds", 2, run="/run/keeping") as chaperone,
        talking(opened, chaperone, run="/run/keeping") as talk,
        Agent(opened.source, OWNER) as helper,
    ):
        helper("from tcpstate.chaperone.client import Chaperone; chaperone = Chaperone('/run/keeping/socket')")
        helper(f"chaperone.freeze({talk.conn!r})")
        helper.process.kill()
        assert talk.silent()
        assert talk.agent(f"chaperone.get({talk.conn!r}, 'frozen')") == {"frozen": 1}
        talk.agent("sock.settimeout(10)")
        assert talk.agent("sock.recv(1)") == b"?"
        assert talk.echo(b"it flows again")
        assert "was frozen for too long" in said(chaperone)


def test_what_a_killed_chaperone_left_frozen_flows_again_with_the_next(opened: ThreeHosts) -> None:
    run, host = "/run/killed", opened.source

    def rules() -> str:
        return host.sh("ip rule; ip -6 rule")

    before = rules()
    with start(host, run=run) as first, talking(opened, first, run=run) as talk:
        talk.agent("chaperone.freeze(sock)")
        talk.agent("chaperone.export(sock)")
        standing = rules()
        first.kill()
        first.wait(10)
        assert talk.silent()
        with start(host, run=run) as second:
            talk.agent("sock.settimeout(10)")
            assert talk.agent("sock.recv(1)") == b"?"
            assert talk.echo(b"it flows again")
            assert rules().count("blackhole") == standing.count("blackhole"), "the dead one's rules are gone"
            second.terminate()
            assert second.wait(10) == 0
        assert rules() == before
        assert host.sh(f"ls {run}/frozen") == ""


def test_a_second_chaperone_is_refused(talk: Talk) -> None:
    done = talk.hosts.source.run([*TCPMIG, "chaperone"], check=False)
    assert done.returncode == 3
    assert "TM-0271" in done.stderr
    assert talk.echo(b"the first one is still there")


def test_records_that_their_caller_may_not_build_are_refused(talk: Talk) -> None:
    """Each on the source itself: the address is here, the connection is not gone."""
    agent = talk.agent
    agent("from dataclasses import replace; from tcpstate import ConnectionRecord, ConnId")
    agent("chaperone.freeze(sock); record = ConnectionRecord.from_bytes(chaperone.export(sock)); conn = record.conn_id")
    agent("def build(**new): chaperone.rebuild(replace(record, **new), elapsed=1)")
    agent("free = ConnId('tcp', conn.local, 7013, conn.peer, 9)")
    agent("def at(local, port): build(conn_id=ConnId('tcp', local, port, conn.peer, conn.peer_port))")
    for code, why in (
        ("at('10.77.1.2', 7011)", "TM-0263"),  # the target's address
        ("at(conn.local, 443)", "TM-0263"),
        ("build(options=record.options | {'so.mark': (7,)})", "TM-0264"),
        ("build(options=record.options | {'so.priority': (7,)})", "TM-0264"),
        ("build(options=record.options | {'ip.transparent': (1,)})", "TM-0264"),
        ("build(option_data={'ip.options': b'x'})", "TM-0264"),
        ("build(buffers=replace(record.buffers, receive=1 << 30))", "TM-0264"),
        ("build(windows=replace(record.windows, max_window=0xffffffff))", "TM-0264"),
        ("build()", "TM-0215"),  # it lives here
        ("chaperone.rebuild(record.to_bytes()[:-1], elapsed=1)", "TM-0203"),
        ("build(conn_id=free, options={'tcp.nodelay': (1, 2)})", "TM-0203"),
        ("build(conn_id=free, options={'ip.tos': (1 << 40,)})", "TM-0203"),
        ("build(conn_id=free, options={'tcp.keepcnt': (1 << 20,)})", "TM-0214"),
    ):
        assert code_of(agent, code) == why, code
    with Agent(talk.hosts.source, STRANGER) as stranger:
        stranger("import socket; from tcpstate.chaperone.client import Chaperone; chaperone = Chaperone()")
        stranger("from dataclasses import replace; from tcpstate import ConnectionRecord, ConnId")
        stranger(f"record = ConnectionRecord.from_bytes({agent('record.to_bytes()')!r}); conn = record.conn_id")
        stranger("other = replace(record, conn_id=ConnId('tcp', conn.local, conn.local_port, conn.peer, 9))")
        assert code_of(stranger, "chaperone.rebuild(other, elapsed=1)") == "TM-0263", "the port is OWNER's"
        stranger("other = replace(record, conn_id=ConnId('tcp', conn.local, 7012, conn.peer, 9))")
        assert code_of(stranger, "chaperone.rebuild(other, elapsed=1)") == "", "nobody has that one"
    agent("chaperone.resume(sock)")
    assert talk.echo(b"untouched")


SERVER_WITHOUT = """
import logging, sys
from pathlib import Path
from tcpstate.chaperone import privilege, service
from tcpstate.chaperone.policy import Policy
from tcpstate.kernel.capability import Cap
logging.basicConfig(level=logging.INFO)
service.needed = lambda ports: privilege.NEEDED - {Cap[sys.argv[1]]}
service.serve(Path("/run/without/socket"), Policy(), "daemon")
"""


@pytest.mark.parametrize("missing", sorted(NEEDED))
def test_each_of_its_capabilities_is_needed(opened: ThreeHosts, missing: Cap) -> None:
    command: list[object] = [sys.executable, "-c", SERVER_WITHOUT, missing.name]
    if missing is Cap.NET_ADMIN:
        # the rules that silence what is frozen cannot be added
        with pytest.raises(AssertionError, match="PermissionError"):
            start(opened.source, command=command)
        return
    with start(opened.source, command=command) as chaperone, talking(opened, chaperone, run="/run/without") as talk:
        step = {
            Cap.NET_RAW: "chaperone.freeze(sock)",
            Cap.SYS_PTRACE: f"chaperone.freeze({talk.conn!r})",
            Cap.CHOWN: "chaperone.rebuild(other, elapsed=1)",
        }[missing]
        if missing is Cap.CHOWN:
            talk.agent("from dataclasses import replace; from tcpstate import ConnectionRecord, ConnId")
            talk.agent("chaperone.freeze(sock); record = ConnectionRecord.from_bytes(chaperone.export(sock))")
            talk.agent("c = record.conn_id; other = replace(record, conn_id=ConnId('tcp', c.local, 7012, c.peer, 9))")
        code = code_of(talk.agent, step)
        assert code in ("TM-0102", "TM-0214", "TM-0202"), code
        if missing is not Cap.NET_RAW:
            talk.agent("chaperone.close()")
        assert talk.echo(b"untouched")


def test_a_service_manager_may_start_it_as_its_user(opened: ThreeHosts) -> None:
    """As the systemd unit does: not as root, with ambient capabilities, where memory never becomes executable."""
    capabilities = ",".join(f"+{cap.name.lower()}" for cap in sorted(NEEDED))
    command: list[object] = [
        *["setpriv", f"--reuid={KEEPER}", f"--regid={KEEPER}", "--clear-groups", "--no-new-privs"],
        *[f"--inh-caps=-all,{capabilities}", f"--ambient-caps=-all,{capabilities}"],
        *[f"--bounding-set=-all,{capabilities}", "--securebits=+noroot,+noroot_locked"],
        *["env", "TCPMIG_NO_BATCH=1", "HOME=/run/managed", *TCPMIG, "chaperone", "--socket", "/run/managed/socket"],
    ]
    opened.source.sh(f"install -d -o {KEEPER} /run/managed")
    with start(opened.source, command=command) as chaperone, talking(opened, chaperone, run="/run/managed") as talk:
        talk.agent("chaperone.freeze(sock); chaperone.export(sock); chaperone.resume(sock)")
        assert talk.echo(b"it flows again")
        status = opened.source.sh(f"cat /proc/{chaperone.pid}/status")
        assert f"CapEff:\t{sum(1 << cap for cap in NEEDED):016x}" in status


def test_only_what_a_trusted_chaperone_has_exported_is_rebuilt(opened: ThreeHosts, tmp_path: Path) -> None:
    private, public = tmp_path / "chaperone", tmp_path / "chaperone.pub"
    generate_key(private)
    run, address = "/run/sealed", opened.net.service4
    with (
        start(opened.source, "--sign", private, run=run) as here,
        start(opened.target, "--require-signature", public, "--address", address, run=run),
        talking(opened, here, run=run) as talk,
        Agent(opened.target, OWNER) as heir,
        Agent(opened.target, STRANGER) as stranger,
    ):
        talk.agent("chaperone.freeze(sock)")
        sealed = talk.agent("chaperone.export(sock)")
        for agent in (heir, stranger):
            agent(f"from tcpstate.chaperone.client import Chaperone; chaperone = Chaperone('{run}/socket')")
        bare = codec.unpack(Signed, sealed).record
        altered = sealed.replace(b"ESTABLISHED", b"established")
        assert altered != sealed
        for agent, data, code in ((heir, bare, "0230"), (heir, altered, "0231"), (stranger, sealed, "0267")):
            assert code_of(agent, f"chaperone.rebuild({data!r}, elapsed=1)") == f"TM-{code}"
        assert heir(f"str(chaperone.rebuild({sealed!r}, elapsed=1))") == talk.conn
        heir(f"chaperone.discard({talk.conn!r})")
        talk.agent("chaperone.resume(sock)")
        assert talk.echo(b"untouched")
