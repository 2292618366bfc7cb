"""Between this kernel and Debian's (6.1 with bookworm), in both directions: servers with a connection that is used all
the time, programs of the same files at the same paths. One boot; minutes, because the guest is emulated."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.moves import Mixed, PingPong, mixed
from tests.workloads.servers import HERE, PROGRAMS

pytestmark = pytest.mark.timeout(1200)
REDIS = {"head": "*2\r\n$4\r\nECHO\r\n${}\r\n", "answer": "${}\r\n", "tail": b"\r\n"}
#: name: program on the service's address and port; SOURCES, OUT: where they are
SERVERS: dict[str, list[str]] = {
    "epoll": [sys.executable, "-m", "tests.workloads.echo_server", "PORT", "ADDRESS"],
    "asyncio": [sys.executable, "SOURCES/echo_asyncio.py", "PORT", "ADDRESS"],
    "threads and timers": [*PROGRAMS["c"][1], "PORT", "ADDRESS"],
    "static": [*PROGRAMS["static"][1], "PORT", "ADDRESS"],
    "redis": ["redis-server", "--port", "PORT", "--bind", "ADDRESS", "--save", "", "--protected-mode", "no"],
}
CPUINFO = Path("/proc/cpuinfo")
#: of the emulated CPU, and not of every machine that this runs on
GUEST_CPU = ("--cpu-unused", "*")
#: a thread was in a handler of a signal: "Try again"
IN_HANDLER, TRIES = "TM-0741", 5
GUARDED = """
import mmap, time
memory = mmap.mmap(-1, 1 << 16)
private = mmap.mmap(-1, 1 << 16, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
private.madvise(102, 4096, 4096)
print("ready", flush=True)
while True:
    time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Mixed]:
    compiled = [[word.replace("SOURCES", str(HERE)) for word in PROGRAMS[name][0]] for name in ("c", "static")]
    with mixed(compiled) as made:
        yield made


@pytest.mark.parametrize("name", SERVERS)
def test_there_and_back_twice(hosts: Mixed, name: str) -> None:
    port, address = 7100 + list(SERVERS).index(name), hosts.net.service4
    words = {"PORT": str(port), "ADDRESS": address}
    argv = [words.get(w, w).replace("OUT", str(hosts.folder)).replace("SOURCES", str(HERE)) for w in SERVERS[name]]
    with contextlib.ExitStack() as ends:
        server = hosts.start(argv, port)
        ends.callback(end, hosts, server.pid)
        client = PingPong(hosts.client, address, port, **(REDIS if name == "redis" else {}))
        ends.callback(client.close)
        assert client.goes_on(), client.error
        for number in range(4):
            move = hosts.to_host if number % 2 else hosts.to_guest
            for _ in range(TRIES):
                status, told = move(server.pid, *GUEST_CPU)
                if told.get("code") != IN_HANDLER:
                    break
                assert (status, told["outcome"]) == (1, "failed")
                assert client.goes_on(), client.error
            assert status == 0, told
            assert told["connections"] == 1
            print(f"{name}: {'to 6.18' if number % 2 else 'to 6.1'}: stopped {told['stop_ms']:.0f} ms", told["rounds"])
            assert client.goes_on(), client.error


def end(hosts: Mixed, pid: int) -> None:
    """Wherever it is."""
    hosts.guest.run(["kill", "-9", str(pid)])
    hosts.host.run(["kill", f"-{int(signal.SIGKILL)}", pid], check=False)


def test_a_cpu_that_lacks_something_is_named_before_the_stop(hosts: Mixed) -> None:
    here, there = (set(text.split()) for text in (CPUINFO.read_text(), hosts.guest.run(["cat", CPUINFO]).stdout))
    lacking = {flag for flag in here - there if flag.startswith(("avx512", "sha_ni", "xsavec"))}
    assert lacking, "this machine's CPU has nothing that the emulated one lacks"
    with hosts.host.popen([sys.executable, "-c", "import time; time.sleep(1000)"]) as process:
        status, told = hosts.to_guest(process.pid)
        assert (status, told["code"]) == (3, "TM-0616")
        assert all(flag in told["message"] for flag in lacking)
        assert hosts.host.state(process.pid) == "S"
        process.kill()


def test_a_kernel_that_lacks_something_is_named_before_the_stop(hosts: Mixed) -> None:
    with hosts.host.popen([sys.executable, "-c", GUARDED], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        status, told = hosts.to_guest(process.pid, *GUEST_CPU, "--external", "1=close")
        assert (status, told["code"]) == (3, "TM-0742")
        assert "guard regions" in told["message"]
        assert hosts.host.state(process.pid) == "S"
        process.kill()
