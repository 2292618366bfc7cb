"""Real servers, started in a test host, listening when the function returns.

Each takes the addresses it shall listen on; its files lie in a folder that all hosts share, like a shared file system.
"""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.hosts import CommandFailed, Host, HostProcess

__all__ = [
    "NGINX_PORT",
    "PROGRAMS",
    "echo_server",
    "files",
    "http_server",
    "late_server",
    "nginx",
    "program",
    "redis",
    "stream_server",
    "wait_listening",
]

START_TIMEOUT = 15.0
NGINX_PORT = 8080

NGINX_CONFIGURATION = """\
daemon off;
user root;
master_process on;
worker_processes {workers};
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 512; }}
http {{
    access_log off;
    keepalive_timeout 3600s;
    keepalive_requests 1000000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
{listen}
        root {root};
    }}
}}
"""


def wait_listening(
    host: Host,
    process: HostProcess,
    address: str,
    port: int,
    log: Path | None = None,
    *,
    timeout: float = START_TIMEOUT,
) -> None:
    """Until something accepts connections there. Raises CommandFailed when the process ends or takes too long."""
    end = time.monotonic() + timeout
    while True:
        with host.netns_entered():
            probe = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        with probe:
            if probe.connect_ex((address, port)) == 0:
                return
        if process.poll() is not None or time.monotonic() > end:
            said = log.read_text(errors="replace")[-2000:] if log is not None and log.exists() else ""
            process.close()
            raise CommandFailed(f"{process.args} does not listen on {address} port {port}: {said}")
        time.sleep(0.01)


def _start(
    host: Host, argv: Sequence[object], folder: Path, name: str, addresses: Sequence[str], port: int
) -> HostProcess:
    """Start a server as a daemon would be: no terminal, its output in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    with log.open("ab") as output:
        process = host.popen(argv, stdout=output, stderr=output, cwd=folder)
    for address in addresses:
        wait_listening(host, process, address, port, log)
    return process


def redis(host: Host, folder: Path, addresses: Sequence[str], *, port: int = 6379, megabytes: int = 0) -> HostProcess:
    """redis-server without persistence, with that much data in it."""
    options = ["--save", "", "--appendonly", "no", "--protected-mode", "no", "--enable-debug-command", "yes"]
    argv = ["redis-server", "--port", port, "--bind", *addresses, "--dir", folder, *options]
    process = _start(host, argv, folder, "redis", addresses, port)
    if megabytes:
        # Keys of 1 KB, more than their values with the overhead: about what is asked for. From the host itself, but
        # over and done with before any migration: a local peer would be one of the kinds that are refused.
        size = 1000
        count = megabytes * 1_000_000 // (size + 100)
        host.run(["redis-cli", "-h", addresses[0], "-p", port, "debug", "populate", count, "data", size])
    return process


def http_server(host: Host, folder: Path, address: str, *, port: int = 8000) -> HostProcess:
    """`python3 -m http.server` on the files of a folder."""
    argv = [sys.executable, "-m", "http.server", port, "--bind", address, "--directory", folder]
    return _start(host, argv, folder, "http", [address], port)


def nginx(
    host: Host, folder: Path, addresses: Sequence[str], root: Path, *, port: int = NGINX_PORT, workers: int = 2
) -> HostProcess:
    """nginx, a master and its workers, in the foreground."""
    folder.mkdir(parents=True, exist_ok=True)
    names = (f"[{address}]" if ":" in address else address for address in addresses)
    listen = "\n".join(f"        listen {name}:{port};" for name in names)
    configuration = folder / "nginx.conf"
    configuration.write_text(NGINX_CONFIGURATION.format(workers=workers, folder=folder, listen=listen, root=root))
    argv = ["nginx", "-c", configuration, "-p", folder, "-e", folder / "error.log"]
    return _start(host, argv, folder, "nginx", addresses, port)


def echo_server(host: Host, folder: Path, addresses: Sequence[str], *, port: int = 7000) -> HostProcess:
    """`tests.workloads.echo_server`."""
    argv = [sys.executable, "-m", "tests.workloads.echo_server", port, *addresses]
    return _start(host, argv, folder, "echo", addresses, port)


def threads_server(
    host: Host, folder: Path, addresses: Sequence[str], *, port: int = 7004, sleeping: int = 0, churning: int = 0
) -> HostProcess:
    """`tests.workloads.threads_server`."""
    argv = [sys.executable, "-m", "tests.workloads.threads_server", sleeping, churning, port, *addresses]
    return _start(host, argv, folder, "threads", addresses, port)


def late_server(host: Host, folder: Path, addresses: Sequence[str], *, port: int = 7002) -> HostProcess:
    """`tests.workloads.late_server`."""
    argv = [sys.executable, "-m", "tests.workloads.late_server", port, *addresses]
    return _start(host, argv, folder, "late", addresses, port)


def stream_server(host: Host, folder: Path, addresses: Sequence[str], *, port: int = 7001) -> HostProcess:
    """`tests.workloads.stream_server`."""
    argv = [sys.executable, "-m", "tests.workloads.stream_server", port, *addresses]
    return _start(host, argv, folder, "stream", addresses, port)


HERE = Path(__file__).parent / "programs"
#: echo servers of every sort of program: what compiles one, if anything, and what runs it. SOURCES, OUT: where they are
PROGRAMS: dict[str, tuple[list[str], list[str]]] = {
    "c": (["gcc", "-O1", "-pthread", "-o", "OUT/echo_c", "SOURCES/echo_c.c"], ["OUT/echo_c"]),
    "static": (["gcc", "-O1", "-pthread", "-static", "-o", "OUT/echo_static", "SOURCES/echo_c.c"], ["OUT/echo_static"]),
    "shm": (["gcc", "-O1", "-pthread", "-o", "OUT/echo_shm", "SOURCES/echo_shm.c"], ["OUT/echo_shm"]),
    "go": (["go", "build", "-o", "OUT/echo_go", "SOURCES/echo_go.go"], ["OUT/echo_go"]),
    "java": (
        ["javac", "-d", "OUT", "SOURCES/EchoJava.java"],
        ["java", "-Xmx128m", "-Xshare:auto", "-cp", "OUT", "EchoJava"],
    ),
    "node": ([], ["node", "SOURCES/echo_node.js"]),
    "pool": ([], [sys.executable, "SOURCES/echo_pool.py"]),
}


def program(host: Host, folder: Path, name: str, addresses: Sequence[str], *, port: int = 7003) -> HostProcess:
    """One of PROGRAMS, compiled if it must be."""
    folder.mkdir(parents=True, exist_ok=True)

    def placed(words: Sequence[str]) -> list[str]:
        return [word.replace("SOURCES", str(HERE)).replace("OUT", str(folder)) for word in words]

    compiler, command = map(placed, PROGRAMS[name])
    if compiler:
        subprocess.run(compiler, check=True, cwd=folder)
    return _start(host, [*command, port, *addresses], folder, name, addresses, port)


def files(folder: Path, sizes: Sequence[int]) -> Path:
    """A folder with files of random bytes: f0, f1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        source = random.Random(number)
        with (folder / f"f{number}").open("wb") as file:
            for start in range(0, size, 1 << 20):
                file.write(source.randbytes(min(1 << 20, size - start)))
    return folder
