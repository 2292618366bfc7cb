"""Processes on aarch64, in the guest: stopped, written down, rebuilt and moved; each looks after its own state."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from checkpoint.inject import Injection
from checkpoint.procfs import read_stat
from checkpoint.tracee import Tree
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS
from tests.guest.moves import PingPong
from tests.hosts import Host, HostProcess, ThreeHosts, three_hosts, warm
from tests.hosts.host import ROOT
from tests.hosts.tcpmig import RSH, TCPMIG
from tests.workloads.servers import HERE, PROGRAMS, wait_listening

pytestmark = pytest.mark.timeout(2400)
SOURCES = Path(__file__).with_name("programs")
#: seconds: an emulated machine is slow
TIMEOUT = 500
SERVERS = {
    "epoll": [sys.executable, "-m", "tests.workloads.echo_server", "PORT", "ADDRESS"],
    "asyncio": [sys.executable, "SOURCES/echo_asyncio.py", "PORT", "ADDRESS"],
    "threads and timers": [*PROGRAMS["c"][1], "PORT", "ADDRESS"],
    "static": [*PROGRAMS["static"][1], "PORT", "ADDRESS"],
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    flags = ["-O1", "-pthread", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, "-o", folder / "threads", SOURCES / "threads.c"], check=True)
    # so that the sum is what Python's numbers make of it
    subprocess.run(
        ["gcc", *flags, "-static", "-ffp-contract=off", "-o", folder / "count", SOURCES / "count.c"], check=True
    )
    for name in ("c", "static"):
        command = [word.replace("SOURCES", str(HERE)).replace("OUT", str(folder)) for word in PROGRAMS[name][0]]
        subprocess.run(command, check=True)
    return folder


def until(condition: Callable[[], bool]) -> None:
    """Wait until it holds; not too often asked, on an emulated machine."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "never became true"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def hosts() -> Iterator[ThreeHosts]:
    """The same for all tests: to read all of tcpmig's code takes such a machine a minute."""
    with three_hosts() as three:
        yield three


def tcpmig(host: Host, *arguments: object) -> dict[str, Any]:
    """One command, which ends well; what it told."""
    status, told, said = warm.tcpmig(host, *arguments)
    assert status == 0, f"{told}\n{said}"
    return told


def migrate(source: Host, pid: int, target: Host) -> dict[str, Any]:
    warm.ready(target)
    receive = shlex.join([*TCPMIG, "receive"])
    return tcpmig(
        source, "migrate", pid, target.name, "--rsh", shlex.join([*RSH, "--warm"]), "--remote-command", receive
    )


@contextlib.contextmanager
def started(host: Host, argv: Sequence[object], out: Path) -> Iterator[HostProcess]:
    with out.open("wb") as file:
        process = host.popen(argv, stdout=file, stderr=file, env={"PYTHONPATH": str(ROOT)})
    try:
        yield process
    finally:
        host.run(["kill", f"-{int(signal.SIGKILL)}", process.pid], check=False)


def cycled(host: Host, pid: int, image: Path) -> None:
    """Checkpointed and restored."""
    image.unlink(missing_ok=True)
    tcpmig(host, "checkpoint", "--stop-and-copy", "-o", image, pid)
    tcpmig(host, "restore", image)


def test_a_static_counter(hosts: ThreeHosts, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(hosts.source, [built / "count"], out) as process:
        for _ in range(3):
            seen = out.stat().st_size
            until(lambda seen=seen: out.stat().st_size > seen + 100)
            cycled(hosts.source, process.pid, tmp_path / "image")
        seen = out.stat().st_size
        until(lambda: out.stat().st_size > seen + 100)
    total = 0.5
    for number, line in enumerate(out.read_text().splitlines()[:-1]):
        count, _, found = line.partition(" ")
        assert (int(count), float.fromhex(found)) == (number, total)
        total = total * 1.0000001 + 1e-9


def rounds(out: Path) -> dict[str, int]:
    """How often each thread has found all well, in the last whole line."""
    lines = out.read_text().splitlines(keepends=True)
    assert not [line for line in lines if not line.startswith("round ")], lines[-3:]
    words = [line for line in lines if line.endswith("\n")][-1].split() if lines else []
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


def all_go_on(out: Path) -> None:
    before = rounds(out)

    def more() -> bool:
        now = rounds(out)
        return len(now) >= 8 and all(now[name] > before.get(name, 0) + 1 for name in now)

    until(more)


def test_threads_in_every_state(hosts: ThreeHosts, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(hosts.source, [built / "threads"], out) as process:
        all_go_on(out)
        assert ("sve" in rounds(out)) == ("sve" in Path("/proc/cpuinfo").read_text().split())
        tcpmig(hosts.source, "checkpoint", "-R", "--stop-and-copy", "-o", tmp_path / "running", process.pid)
        all_go_on(out)
        for _ in range(3):
            cycled(hosts.source, process.pid, tmp_path / "image")
            all_go_on(out)


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_moves_with_its_connection(hosts: ThreeHosts, built: Path, tmp_path: Path, name: str) -> None:
    port, address = 7100 + list(SERVERS).index(name), hosts.net.service4
    words = {"PORT": str(port), "ADDRESS": address}
    argv = [words.get(w, w).replace("OUT", str(built)).replace("SOURCES", str(HERE)) for w in SERVERS[name]]
    with contextlib.ExitStack() as ends:
        process = ends.enter_context(started(hosts.source, argv, tmp_path / "out"))
        wait_listening(hosts.source, process, address, port)
        client = PingPong(hosts.client, address, port)
        ends.callback(client.close)
        assert client.goes_on(), client.error
        for here, there in ((hosts.source, hosts.target), (hosts.target, hosts.source)):
            ends.callback(there.run, ["kill", f"-{int(signal.SIGKILL)}", process.pid], check=False)
            told = migrate(here, process.pid, there)
            assert told["connections"] == 1
            assert client.goes_on(), client.error
        # and written down, with what the client sends meanwhile
        cycled(hosts.source, process.pid, tmp_path / "image")
        assert client.goes_on(), client.error


# -- what the kernel is told


@contextlib.contextmanager
def waiting(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits in a call after its first line."""
    head = "import ctypes, os, signal, time\nlibc = ctypes.CDLL(None)\nsignal.signal(signal.SIGUSR1, lambda *_: None)\n"
    argv = [sys.executable, "-ISc", f"{head}print(1, flush=True)\n{code}"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"1\n"
            until(lambda: read_stat(process.pid).state == "S")
            yield process
        finally:
            process.kill()


def injected(tree: Tree) -> None:
    """Calls are made in the process: the kernel forgets what it was in."""
    (process,) = tree.processes
    with Injection(process) as injection:
        calls = CallTable()
        told = calls.call(SYS.getpid)
        injection.run({process.leader.tid: calls})
        assert told.value == process.pid


@pytest.mark.parametrize("call", ["libc.pause()", "libc.read(os.pipe()[0], ctypes.create_string_buffer(1), 1)"])
def test_a_handler_ends_the_call_that_it_interrupts_during_the_stop(call: str) -> None:
    flags = "libc.siginterrupt(signal.SIGUSR1, 1)"
    with waiting(f"{flags}\nprint({call}, flush=True)\ntime.sleep(1000)") as process:
        tree = Tree.stop([process.pid])
        try:
            injected(tree)
            os.kill(process.pid, signal.SIGUSR1)
        finally:
            tree.resume()
        assert process.stdout is not None
        assert process.stdout.readline() == b"-1\n"


def test_calls_go_on_that_no_handler_interrupts() -> None:
    code = (
        "r, w = os.pipe()\nb = ctypes.create_string_buffer(1)\nprint(w, flush=True)\nprint(libc.read(r, b, 1), b.raw)"
    )
    with waiting(code) as process:
        assert process.stdout is not None
        fd = int(process.stdout.readline())
        until(lambda: read_stat(process.pid).state == "S")
        for _ in range(3):
            tree = Tree.stop([process.pid])
            try:
                assert tree.processes[0].leader.call == SYS.read
                injected(tree)
            finally:
                tree.resume()
            until(lambda: read_stat(process.pid).state == "S")
        with open(f"/proc/{process.pid}/fd/{fd}", "wb") as file:
            file.write(b"x")
        assert process.stdout.readline() == b"1 b'x'\n"


def test_an_epoll_wait_does_not_see_the_stop() -> None:
    code = (
        "e = libc.epoll_create1(0)\nb = ctypes.create_string_buffer(64)\nprint(2, flush=True)\n"
        "print(libc.epoll_wait(e, b, 1, 20000), flush=True)"
    )
    with waiting(code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"2\n"
        until(lambda: read_stat(process.pid).state == "S")
        for _ in range(2):
            tree = Tree.stop([process.pid])
            try:
                assert tree.processes[0].leader.call == SYS.epoll_pwait
                injected(tree)
            finally:
                tree.resume()
        assert process.stdout.readline() == b"0\n"


def test_the_tools_death_leaves_a_thread_whole(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # what vector registers have beyond FP ends with a call made in the thread, and nobody is there to put it back
    with out.open("wb") as file, subprocess.Popen([built / "threads", "without-sve"], stdout=file) as process:
        try:
            all_go_on(out)
            for moment in ("open", "ran"):
                tool = os.fork()
                if not tool:
                    with contextlib.suppress(BaseException):
                        tree = Tree.stop([process.pid])
                        injection = Injection(tree.processes[0])
                        injection.open()
                        if moment == "ran":
                            tables = {thread.tid: CallTable() for thread in tree.processes[0].threads}
                            for table in tables.values():
                                table.call(SYS.gettid)
                            injection.run(tables)
                        os.kill(os.getpid(), signal.SIGKILL)
                    os._exit(1)
                assert os.WTERMSIG(os.waitpid(tool, 0)[1]) == signal.SIGKILL
                all_go_on(out)
        finally:
            process.kill()


def test_the_vdso_is_as_it_was_afterwards() -> None:
    with waiting("libc.pause()") as process:
        tree = Tree.stop([process.pid])
        try:
            (vdso,) = [vma for vma in tree.processes[0].maps if vma.name == "[vdso]"]
            before = tree.processes[0].read(vdso.start, vdso.size)
            injected(tree)
            assert tree.processes[0].read(vdso.start, vdso.size) == before
            assert ctypes.string_at(_own_vdso(), vdso.size) == before
        finally:
            tree.resume()


def _own_vdso() -> int:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[vdso]"):
            return int(line.partition("-")[0], 16)
    raise LookupError("we have no vdso")
