"""What `tcpmig recover` finishes is what was asked for: paths, interfaces, descriptors, local peers; hooks are told."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Host, ThreeHosts
from tests.hosts.tcpmig import RSH, TCPMIG, from_host, tcpmig
from tests.system.test_cli_bad_input import connected
from tests.workloads.deaths import left_behind

PORT = 7400
FOLDER, MOVED = "/var/lib/service", "/var/moved/service"
GROUP = "239.1.2.3"
KEY = 0x7E57
LETTERS = [b"one", b"", b"two", b"two"]
KILLED_IN = [sys.executable, "-m", "tests.workloads.killed_in"]

# Has a file, a local socket and System V objects of its own, unread datagrams, a group on lan0, a pipe and a connection
# to a process that stays; a line from the service address is evaluated.
PROGRAM = f"""
import ctypes, errno, os, signal, socket, struct, sys
def told(call):
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno]
listener = socket.create_server((sys.argv[1], {PORT}))
client = listener.accept()[0]
log = open({FOLDER!r} + "/log", "ab", buffering=0)
log.write(b"at the source\\n")
local = socket.socket(socket.AF_UNIX)
local.bind({FOLDER!r} + "/socket")
local.listen()
mail = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
mail.bind((sys.argv[1], {PORT} + 2))
mail.setblocking(False)
group = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
group.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lan0")
group.bind(("", {PORT}))
wanted = struct.pack("=4s4xi", socket.inet_aton({GROUP!r}), socket.if_nametoindex("lan0"))
group.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, wanted)
gate = socket.create_server(("127.0.0.1", {PORT} + 1))
theirs = socket.create_connection(("127.0.0.1", {PORT} + 1))
end = gate.accept()[0]
gate.close()
theirs.send(b"unread")
their_out, out = os.pipe()
ready, to_us = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.setsid()
        for fd in (log, local, mail, group, listener, client, end, 0, 1, 2):
            os.close(fd if isinstance(fd, int) else fd.fileno())
        for fd in (out, ready, to_us):
            os.close(fd)
        signal.pause()
    os._exit(0)
os.wait()
os.close(to_us)
assert os.read(ready, 1) == b""
os.close(ready)
os.close(their_out)
theirs.close()
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = ctypes.c_int, ctypes.c_void_p, ctypes.c_int
assert libc.shmat(libc.shmget({KEY}, 4096, 0o1600), None, 0)
semaphores = libc.semget({KEY}, 1, 0o1600)
assert semaphores >= 0
raised = (ctypes.c_short * 3)(0, 1, 0o10000)
assert libc.semop(semaphores, raised, 1) == 0
for line in client.makefile():
    client.sendall((repr(told(lambda: eval(line))) + "\\n").encode())
"""

HOOK = """
import json, sys
said = json.load(sys.stdin)
with open(sys.argv[1], "a") as log:
    print(json.dumps([said["role"], said["hook"], said["target_pids"]]), file=log)
"""


@dataclass(slots=True)
class Service:
    hosts: ThreeHosts
    pid: int
    sock: socket.socket
    folder: Path

    def say(self, expression: str) -> Any:
        self.sock.sendall(expression.encode() + b"\n")
        return eval(self.sock.makefile().readline())

    def post(self) -> None:
        """Datagrams that nobody reads before it moves."""
        with self.hosts.client.netns_entered():
            mail = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with mail:
            for letter in LETTERS:
                mail.sendto(letter, (self.hosts.net.service4, PORT + 2))

    def read_post(self) -> list[bytes | str]:
        """All of them, and what comes when there is none."""
        return [self.say("mail.recv(100)") for _ in range(len(LETTERS) + 1)]

    def command(self, receive: list[str], *options: object) -> list[object]:
        """`migrate` with a hook on either side."""
        hook = shlex.join([sys.executable, str(self.folder / "hook.py"), str(self.folder / "hooks")])
        remote = shlex.join([*receive, "--unit-hook", hook])
        rsh = ["--rsh", shlex.join(RSH), "--remote-command", remote, "--unit-hook", hook]
        return ["migrate", self.pid, self.hosts.target.name, *rsh, *options]

    def heard(self) -> list[list[object]]:
        """What the hooks were told, sorted; it is forgotten."""
        log = self.folder / "hooks"
        found = [json.loads(line) for line in log.read_text().splitlines()]
        log.unlink()
        return sorted(found)


@pytest.fixture
def service(hosts: ThreeHosts, tmp_path: Path) -> Iterator[Service]:
    (tmp_path / "hook.py").write_text(HOOK)
    for host, lan in ((hosts.source, "lan0"), (hosts.target, "lan7")):
        host.sh(f"ip link add {lan} type veth peer name {lan}b && ip link set {lan} up && ip link set {lan}b up")
    hosts.source.path(FOLDER).mkdir()
    hosts.target.path("/var/moved").mkdir()
    hosts.target.path(MOVED).mkdir()
    argv = [sys.executable, "-IS", "-c", PROGRAM, hosts.net.service4]
    with (tmp_path / "err").open("wb") as err:
        process = hosts.source.popen(argv, stdout=err, stderr=err)
    with process:
        with hosts.client.netns_entered():
            sock = connected((hosts.net.service4, PORT))
        with sock:
            sock.settimeout(20)
            yield Service(hosts, process.pid, sock, tmp_path)
            for host in (hosts.source, hosts.target):
                if host.state(process.pid):
                    host.kill(process.pid, 9)


def settled(service: Service, state: str) -> None:
    status, told, said = tcpmig(service.hosts.source, "recover")
    assert status == 0, (told, said)
    assert [(item["state"], item["settled"]) for item in told["items"]] == [(state, True)]


# before anything is released, and when all is: what was done once must not be done again
@pytest.mark.parametrize("moment", ["checkpoint.restore:Restore.release", "checkpoint.restore:Restore.run"])
def test_what_was_chosen_holds(service: Service, moment: str) -> None:
    source, target, pid = service.hosts.source, service.hosts.target, service.pid
    out = service.say("out")
    service.post()
    options = ["--ship", "--map", f"{FOLDER}={MOVED}", "--map-dev", "lan0=lan7"]
    options += ["--external", f"{out}=/var/moved/out", "--local-peer", "reset"]
    command = service.command([*KILLED_IN, moment, "receive"], *options)
    status, told, said = tcpmig(source, *command)
    assert status == 5, (told, said)
    assert target.state(pid) == "T"
    settled(service, "gone")

    assert service.heard() == [
        [role, hook, [pid] if hook == "committed" else []]
        for role in ("source", "target")
        for hook in ("before-stop", "committed")
    ]
    assert service.say("log.write(b'at the target\\n')") > 0
    assert target.path(f"{MOVED}/log").read_text() == "at the source\nat the target\n"
    assert not target.path(FOLDER).exists()
    assert target.path(f"{MOVED}/socket").is_socket()
    assert service.say("group.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)") == b"lan7\0"
    joined = target.sh("ip -4 maddress show dev lan7")
    assert GROUP in joined
    assert service.say("os.write(out, b'said')") == 4
    assert target.path("/var/moved/out").read_bytes() == b"said"
    assert service.say("end.recv(100)") == b"unread"
    assert service.say("end.recv(100)") == "ECONNRESET"
    assert service.read_post() == [*LETTERS, "EAGAIN"]
    assert left_behind(source) == []
    assert left_behind(target, pid) == []


@pytest.mark.long
def test_a_source_that_dies_tells_both_hooks(service: Service) -> None:
    source, pid = service.hosts.source, service.pid
    options = ["--map", f"{FOLDER}={MOVED}", "--ship", "--local-peer", "close"]
    command = service.command([*TCPMIG, "receive"], *options)
    status, told, _ = tcpmig(source, *command)
    assert (status, told["code"], told["object"]) == (3, "TM-0593", f"0.0.0.0:{PORT}"), "lan0 is not there"
    assert source.state(pid) == "S"
    command += ["--map-dev", "lan0=lan7"]
    done = source.run([*KILLED_IN, "checkpoint.dump:Dump.delta", *command], check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    settled(service, "here")
    # the target has noticed by itself
    deadline = time.monotonic() + 20
    while left := left_behind(service.hosts.target):
        assert time.monotonic() < deadline, left
    assert service.heard() == [[role, hook, []] for role in ("source", "target") for hook in ("aborted", "before-stop")]
    assert service.say("end.recv(100)") == b"unread"
    assert left_behind(source, pid) == []

    # the same choices are there for an image
    image = service.folder / "image"
    status, told, said = tcpmig(source, "checkpoint", pid, "-o", image, "--ship", "--local-peer", "close")
    assert status == 0, (told, said)
    source.wait_until_gone(pid)
    places = ["--map", f"{FOLDER}={MOVED}", "--map-dev", "lan0=lan7", *from_host(source)]
    status, told, said = tcpmig(service.hosts.target, "restore", image, *places)
    assert status == 0, (told, said)
    assert service.say("group.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)") == b"lan7\0"
    assert service.say("end.recv(100)") == b""


def test_system_v_objects_go_with_the_original(service: Service) -> None:
    """The source dies when the copy runs and the original is still there."""
    source, target = service.hosts.source, service.hosts.target
    options = ["--ship", "--map", f"{FOLDER}={MOVED}", "--map-dev", "lan0=lan7", "--local-peer", "close"]
    command = service.command([*TCPMIG, "receive"], *options)
    done = source.run([*KILLED_IN, "checkpoint.dump:Dump.discard", *command], check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert objects(source) == objects(target) == [KEY, KEY]
    settled(service, "gone")
    assert (objects(source), objects(target)) == ([], [KEY, KEY])
    assert service.say("end.recv(100)") == b"unread"


def objects(host: Host) -> list[int]:
    """The keys of the System V shared memory and semaphores of a host."""
    lines = host.run(["cat", "/proc/sysvipc/shm", "/proc/sysvipc/sem"]).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if not line.split()[0].isalpha()]
