"""Files at the target: the hosts have a /var of their own, so that what is written there would really diverge."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Host, ThreeHosts
from tests.hosts.tcpmig import RSH, TCPMIG, MigrationFailed, from_host, migrate, tcpmig
from tests.system.test_cli_bad_input import connected
from tests.workloads.servers import wait_listening

PORT = 7200
FOLDER = "/var/lib/service"
LOG = "/var/log/service.log"
RSH_OPTIONS = [f"--rsh={shlex.join(RSH)}", f"--remote-command={shlex.join([*TCPMIG, 'receive'])}"]

# Logs what it is told, and keeps a database: on a line from the service address it evaluates an expression.
SERVER = f"""
import fcntl, mmap, os, socket, sys
service, shared = sys.argv[1:3]
os.chdir({FOLDER!r})
log = open({LOG!r}, "ab", buffering=0)
reader = open({LOG!r}, "rb", buffering=0)
db = os.open("db", os.O_RDWR)
fcntl.lockf(db, fcntl.LOCK_EX, 10, 0)
area = mmap.mmap(os.open("current/table", os.O_RDWR), 8192)
with_all = open(shared + "/on-the-shared-disk", "ab", buffering=0)
local = socket.socket(socket.AF_UNIX)
local.bind({FOLDER!r} + "/socket")
local.listen()
gone = open({FOLDER!r} + "/gone", "w+b", buffering=0)
gone.write(b"deleted")
os.unlink({FOLDER!r} + "/gone")
listener = socket.create_server((service, {PORT}))
count = 0
while True:
    client = listener.accept()[0]
    for line in client.makefile():
        count += 1
        log.write(b"line %d\\n" % count)
        client.sendall((repr(eval(line)) + "\\n").encode())
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

    def refused(self, source: Host, target: Host, code: str, *options: object) -> dict[str, Any]:
        """Refused with this code before anything was stopped; what was said."""
        before = self.say("count")
        with pytest.raises(MigrationFailed) as raised:
            migrate(source, self.pid, target, options=options)
        assert (raised.value.status, raised.value.summary["code"]) == (3, code), raised.value
        assert source.state(self.pid) == "S"
        assert self.say("count") == before + 1
        return raised.value.summary

    def lines(self, host: Host, path: str = LOG) -> list[str]:
        return host.path(path).read_text().splitlines()


def furnish(host: Host, text: str) -> None:
    """The files of the service on one host."""
    host.path(FOLDER).mkdir()
    host.path(LOG).write_text(f"{text}\n")
    host.path(f"{FOLDER}/db").write_bytes(text.encode().ljust(100, b"."))
    host.path(f"{FOLDER}/release").mkdir()
    host.path(f"{FOLDER}/release/table").write_bytes(text.encode().ljust(8192, b"-"))
    host.path(f"{FOLDER}/current").symlink_to("release")


@pytest.fixture
def service(hosts: ThreeHosts, tmp_path: Path) -> Iterator[Service]:
    furnish(hosts.source, "source")
    database = hosts.source.path(f"{FOLDER}/db")
    database.chmod(0o640)
    os.chown(database, 12, 34)
    os.setxattr(database, "user.comment", b"of the source")
    argv = [sys.executable, "-IS", "-c", SERVER, hosts.net.service4, tmp_path]
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        process = hosts.source.popen(argv, stdout=out, stderr=err)
    with process:
        wait_listening(hosts.source, process, hosts.net.service4, PORT, tmp_path / "err")
        with hosts.client.netns_entered():
            sock = connected((hosts.net.service4, PORT))
        with sock:
            sock.settimeout(20)
            found = Service(hosts, process.pid, sock, tmp_path)
            assert found.say("reader.read()") == b"source\nline 1\n"
            yield found


def test_shipped_refused_and_back_again(service: Service) -> None:
    source, target = service.hosts.source, service.hosts.target
    target.path(FOLDER).mkdir()
    target.path(f"{FOLDER}/release").mkdir()
    # nothing is there: the first file is named, and the verdicts have all of them
    assert service.refused(source, target, "TM-0345")["object"] in (LOG, f"{FOLDER}/db", f"{FOLDER}/release/table")
    target.path(f"{FOLDER}/db").write_text("another")
    said = service.refused(source, target, "TM-0354", "--ship")
    assert (said["object"], "here 7 bytes" in said["message"]) == (f"{FOLDER}/db", True)
    target.path(f"{FOLDER}/db").unlink()
    service.say("area.__setitem__(slice(0, 6), b'mapped')")

    migrate(source, service.pid, target, options=["--ship"])
    left = service.lines(source)
    assert service.say("os.pwrite(db, b'target', 0)") == 6
    assert service.say("area.__setitem__(slice(6, 10), b' too')") is None
    assert service.lines(target) == [*left, *(f"line {len(left) + n}" for n in (0, 1))]
    assert service.lines(source) == left
    assert service.say("reader.read()").decode().splitlines() == service.lines(target)[2:]
    found = target.path(f"{FOLDER}/db")
    assert found.read_bytes() == b"target".ljust(100, b".")
    assert (found.stat().st_mode & 0o777, found.stat().st_uid, found.stat().st_gid) == (0o640, 12, 34)
    assert os.getxattr(found, "user.comment") == b"of the source"
    assert target.path(f"{FOLDER}/release/table").read_bytes()[:11] == b"mapped too-"
    assert service.say("(gone.seek(0), gone.read())") == (0, b"deleted")
    assert not [p for folder in (FOLDER, "/var/log", f"{FOLDER}/release") for p in target.path(folder).glob(".tcpmig*")]

    # the stale copies are others by now, and nothing replaces them unasked
    service.refused(target, source, "TM-0354", "--ship")
    migrate(target, service.pid, source, options=["--ship", "--overwrite"])
    assert source.path(f"{FOLDER}/db").read_bytes().startswith(b"target...")
    assert f"line {service.say('count')}" == service.lines(source)[-1]
    source.kill(service.pid, 9)


def test_mapped_to_another_place(service: Service) -> None:
    source, target = service.hosts.source, service.hosts.target
    furnish(target, "target")
    # a check tells all of them, with one line each
    status, shown, _ = tcpmig(source, "check", service.pid, "--to", target.name, *RSH_OPTIONS)
    refused = {v["subject"]: v["code"] for v in shown["verdicts"] if v["status"] == "refuse"}
    assert status == 3
    assert refused == dict.fromkeys((LOG, f"{FOLDER}/db", f"{FOLDER}/release/table"), "TM-0353")
    said = service.refused(source, target, "TM-0353")
    assert "here" in said["message"]
    assert "at the source" in said["message"]
    target.path("/var/moved").mkdir()
    target.path(FOLDER).rename(target.path("/var/moved/service"))
    target.path("/var/moved/service/db").write_bytes(b"mapped".ljust(120, b"."))
    maps = ["--map", f"{FOLDER}=/var/moved/service", "--map", f"{LOG}=/var/moved/log"]
    service.refused(source, target, "TM-0345", *maps)
    target.path("/var/moved/log").write_text("mapped\n")
    # what --map says of a file that is too short is not believed
    target.path("/var/moved/service/release/table").write_bytes(b"short")
    service.refused(source, target, "TM-0346", *maps)
    target.path("/var/moved/service/release/table").write_bytes(b"mapped".ljust(8192, b"-"))
    status, shown, _ = tcpmig(source, "check", service.pid, "--to", target.name, *RSH_OPTIONS, *maps)
    assert status == 0, shown
    assert sum("as --map says" in v["text"] for v in shown["verdicts"]) == 5

    migrate(source, service.pid, target, options=maps)
    assert service.say("os.getcwd()") == "/var/moved/service"
    assert service.say("os.pread(db, 6, 0)") == b"mapped"
    assert service.say("area[:6]") == b"mapped"
    assert service.lines(target, "/var/moved/log")[0] == "mapped"
    assert len(service.lines(target, "/var/moved/log")) == 4
    assert target.path("/var/moved/service/socket").is_socket()
    target.kill(service.pid, 9)


def test_an_image_with_files(service: Service) -> None:
    source, target = service.hosts.source, service.hosts.target
    image = service.folder / "image"
    # what is left running has its files; the image has them too
    assert tcpmig(source, "checkpoint", service.pid, "-o", image, "--ship")[0] == 0
    source.wait_until_gone(service.pid)
    furnish(target, "target")
    status, said, _ = tcpmig(target, "restore", image, *from_host(source))
    assert (status, said["code"]) == (3, "TM-0354")
    assert service.lines(target) == ["target"]
    target.path("/var/moved").mkdir()
    target.path("/var/moved/service").mkdir()
    target.path("/var/moved/service/release").mkdir()
    options = ["--map", f"{FOLDER}=/var/moved/service", "--overwrite", *from_host(source)]
    status, back, told = tcpmig(target, "restore", image, *options)
    assert status == 0, told
    assert service.say("reader.seek(0) or reader.read()") == b"source\nline 1\nline 2\n"
    assert service.say("os.getcwd()") == "/var/moved/service"
    assert service.lines(target)[0] == "source"
    target.kill(back["pid"], 9)


@pytest.fixture
def program(hosts: ThreeHosts) -> Iterator[int]:
    """A running program that only reads: itself, and data."""
    for host in (hosts.source, hosts.target):
        shutil.copy("/usr/bin/perl", host.path("/var/lib/program"))
        host.path("/var/lib/data").write_bytes(b"data" * 1000)
    with hosts.source.popen(["sh", "-c", "exec /var/lib/program -e sleep </var/lib/data >/dev/null 2>&1"]) as process:
        while hosts.source.path(f"/proc/{process.pid}/comm").read_text() != "program\n":
            continue
        yield process.pid
        for host in (hosts.source, hosts.target):
            if host.state(process.pid):
                host.kill(process.pid, 9)


def test_what_is_only_read(hosts: ThreeHosts, program: int) -> None:
    source, target = hosts.source, hosts.target

    def refused(code: str, path: str) -> str:
        with pytest.raises(MigrationFailed) as raised:
            migrate(source, program, target, options=["--address", "none"])
        summary = raised.value.summary
        assert (raised.value.status, summary["code"], summary["object"]) == (3, code, path), raised.value
        assert source.state(program) == "S"
        return str(summary["message"])

    # another program, of the very same size and time
    found = source.path("/var/lib/program").stat()
    other = bytearray(Path("/usr/bin/perl").read_bytes())
    at = other.index(b"GNU\0", other.index(b"\x03\0\0\0GNU\0")) + 4
    other[at] ^= 0xFF
    target.path("/var/lib/program").write_bytes(other)
    os.utime(target.path("/var/lib/program"), ns=(found.st_mtime_ns, found.st_mtime_ns))
    assert refused("TM-0346", "/var/lib/program").count("build-id") == 2
    shutil.copy("/usr/bin/perl", target.path("/var/lib/program"))
    # other data, of the same size
    target.path("/var/lib/data").write_bytes(b"date" * 1000)
    assert "here 4000 bytes" in refused("TM-0346", "/var/lib/data")
    target.path("/var/lib/data").unlink()
    refused("TM-0345", "/var/lib/data")
    # the same content, whatever the times
    target.path("/var/lib/data").write_bytes(b"data" * 1000)
    os.utime(target.path("/var/lib/data"), (1, 1))
    os.utime(target.path("/var/lib/program"), (1, 1))
    migrate(source, program, target, options=["--address", "none"])
    assert target.state(program) == "S"
