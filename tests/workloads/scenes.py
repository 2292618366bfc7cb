"""The scenes that tests, demo and campaign share: a server with its clients on the three hosts, ready to be moved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.hosts import ThreeHosts
from tests.workloads import servers
from tests.workloads.load import Load
from tests.workloads.move import Mover, Stage

__all__ = ["echo", "http", "nginx", "program", "redis", "stream", "threads"]


@contextlib.contextmanager
def redis(hosts: ThreeHosts, folder: Path, *, megabytes: int = 10, mover: Mover | None = None) -> Iterator[Stage]:
    """redis-server with data; pipelines, waiting connections and new ones, over IPv4 and IPv6."""
    port = 6379
    both = [hosts.net.service4, hosts.net.service6]
    server = servers.redis(hosts.source, folder, both, port=port, megabytes=megabytes)
    with contextlib.ExitStack() as ends:
        loads = [
            _load(ends, hosts, "pipeline", "redis_pipeline", port, *both, *both),
            _load(ends, hosts, "waiting", "redis_waiting", port, *both),
            _load(ends, hosts, "churn", "redis_churn", port, *both),
        ]
        with Stage(hosts, server.pid, loads, port=port, mover=mover) as stage:
            yield stage


@contextlib.contextmanager
def http(
    hosts: ThreeHosts, folder: Path, *, megabytes: int = 60, rate: float = 20, mover: Mover | None = None
) -> Iterator[Stage]:
    """`python3 -m http.server` that serves a big file to curl at `rate` MB/s, so for megabytes/rate seconds."""
    port = 8000
    servers.files(folder / "root", [megabytes * 1_000_000])
    server = servers.http_server(hosts.source, folder / "root", hosts.net.service4, port=port)
    url = f"http://{hosts.net.service4}:{port}/f0"
    with contextlib.ExitStack() as ends:
        curl = _load(ends, hosts, "curl", "http_download", "--rate", rate, "--file", folder / "root/f0", url)
        with Stage(hosts, server.pid, [curl], port=port, mover=mover) as stage:
            yield stage


@contextlib.contextmanager
def nginx(hosts: ThreeHosts, folder: Path, *, connections: int = 8, mover: Mover | None = None) -> Iterator[Stage]:
    """nginx, master and two workers, with keep-alive clients over IPv4 and IPv6."""
    port = servers.NGINX_PORT
    both = [hosts.net.service4, hosts.net.service6]
    root = servers.files(folder / "root", [100, 5_000, 300_000])
    server = servers.nginx(hosts.source, folder, both, root, port=port)
    with contextlib.ExitStack() as ends:
        clients = _load(
            ends, hosts, "keepalive", "http_keepalive", "--root", root, "--connections", connections, port, *both
        )
        with Stage(hosts, server.pid, [clients], port=port, mover=mover) as stage:
            yield stage


@contextlib.contextmanager
def echo(hosts: ThreeHosts, folder: Path, *, mover: Mover | None = None) -> Iterator[Stage]:
    """An echo server with a message every millisecond, over IPv4 and IPv6: the finest measure of a gap."""
    port = 7000
    both = [hosts.net.service4, hosts.net.service6]
    server = servers.echo_server(hosts.source, folder, both, port=port)
    with contextlib.ExitStack() as ends:
        client = _load(ends, hosts, "echo", "echo_client", port, *both)
        with Stage(hosts, server.pid, [client], port=port, mover=mover) as stage:
            yield stage


@contextlib.contextmanager
def threads(
    hosts: ThreeHosts, folder: Path, *, sleeping: int = 100, churning: int = 0, mover: Mover | None = None
) -> Iterator[Stage]:
    """The same server with threads beside it, that sleep, or come and go all the time."""
    port = 7004
    both = [hosts.net.service4, hosts.net.service6]
    server = servers.threads_server(hosts.source, folder, both, port=port, sleeping=sleeping, churning=churning)
    with contextlib.ExitStack() as ends:
        client = _load(ends, hosts, "echo", "echo_client", port, *both)
        with Stage(hosts, server.pid, [client], port=port, mover=mover) as stage:
            yield stage


@contextlib.contextmanager
def program(hosts: ThreeHosts, folder: Path, name: str, *, mover: Mover | None = None) -> Iterator[Stage]:
    """One of servers.PROGRAMS, an echo server with threads, timers, children of all sorts in the way of every message,
    over IPv4 and IPv6."""
    port = 7003
    both = [hosts.net.service4, hosts.net.service6]
    server = servers.program(hosts.source, folder, name, both, port=port)
    with contextlib.ExitStack() as ends:
        client = _load(ends, hosts, "echo", "echo_client", port, *both, *both)
        with Stage(hosts, server.pid, [client], port=port, mover=mover) as stage:
            yield stage


@contextlib.contextmanager
def stream(
    hosts: ThreeHosts,
    folder: Path,
    *,
    families: tuple[int, ...] = (4, 6),
    rate: float = 0,
    seed: int = 1,
    loss: int = 0,
    mover: Mover | None = None,
) -> Iterator[Stage]:
    """Random streams both ways, a connection for each family; `rate` in MB/s (0 = full speed), `loss` in % each way."""
    port = 7001
    addresses = [hosts.net.service(family) for family in families]
    server = servers.stream_server(hosts.source, folder, addresses, port=port)
    with contextlib.ExitStack() as ends:
        if loss:
            ends.enter_context(hosts.client.loss(loss, port=port))
        client = _load(ends, hosts, "stream", "stream_client", "--rate", rate, "--seed", seed, port, *addresses)
        with Stage(hosts, server.pid, [client], port=port, mover=mover, lossy=bool(loss), data=False) as stage:
            yield stage


def _load(ends: contextlib.ExitStack, hosts: ThreeHosts, name: str, module: str, *arguments: object) -> Load:
    load = Load(hosts.client, name, module, *arguments)
    ends.callback(load.close)
    return load
