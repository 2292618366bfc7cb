"""Connections held for 20 seconds (TMH_HOLD changes that), then taken back or rebuilt, here and elsewhere.

Also with the holder killed meanwhile: every byte right, new connections served in the end, no RST, nothing left.

Peers back off meanwhile: after 20 s the next retransmission of a peer is up to half a minute away, and that of a SYN
too.  So the clients wait longer than they do in a move.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import three_hosts
from tests.hosts.tcpmig import from_host, tcpmig
from tests.packets import Watcher
from tests.workloads import scenes
from tests.workloads.hold import held
from tests.workloads.many import PATIENCE, ask, hear, opened

SECONDS = float(os.environ.get("TMH_HOLD", "20"))
FINISH = PATIENCE


@pytest.mark.parametrize("kill", [False, True], ids=["holder lives", "holder killed"])
@pytest.mark.parametrize("where", ["source", "target"])
@pytest.mark.parametrize("scene", ["redis", "echo", "stream"])
def test_hold(scene: str, where: str, kill: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMH_PATIENCE", str(4 * SECONDS + 20))
    with three_hosts() as hosts, getattr(scenes, scene)(hosts, tmp_path) as stage:
        for number in range(2):
            # there and back again, or twice at home
            here = stage.here
            to = here if where == "source" else stage.there
            report = held(stage, tmp_path / f"image{number}", seconds=SECONDS, where=to, kill=kill, reply_within=FINISH)
            print(json.dumps(report.json()))
            assert report.problems == [], report.log
            assert report.left == []
            away = report.checkpoint["connections"]
            assert report.restore["held"] == (0 if kill or where == "target" else away)
        assert stage.finish(FINISH) == []
        stage.here.kill(stage.pid, signal.SIGKILL)


@pytest.mark.parametrize("where", ["source", "target"])
@pytest.mark.parametrize("count", [5_000, 10_000])
def test_many(count: int, where: str, tmp_path: Path) -> None:
    """Thousands of connections of one server, each of which has said something meanwhile, and is answered."""
    port = 7000
    # ours, and those of the server, which has them from us
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with three_hosts() as hosts, contextlib.ExitStack() as ends:
        address, to = hosts.net.service4, getattr(hosts, where)
        raised = ["sh", "-c", 'ulimit -n $(ulimit -Hn); exec "$@"', "sh"]
        argv = [*raised, sys.executable, "-m", "tests.workloads.echo_server", port, address]
        server = ends.enter_context(hosts.source.popen(argv))
        with hosts.client.netns_entered():
            clients = opened(ends, (address, port), count)
        ask(clients, b"before")
        watcher = ends.enter_context(Watcher(hosts.client, port=port, data=False))
        done: dict[str, Any] = {}
        status, done["checkpoint"], told = tcpmig(hosts.source, "checkpoint", server.pid, "-o", tmp_path / "image")
        assert status == 0, (done, told)
        hosts.source.wait_until_gone(server.pid)
        for client in clients:
            client.send(b"during")
        time.sleep(SECONDS)
        options = [] if where == "source" else from_host(hosts.source)
        begun = time.monotonic()
        status, done["restore"], told = tcpmig(to, "restore", tmp_path / "image", *options, timeout=120)
        assert status == 0, (done, told)
        took = time.monotonic() - begun
        hear(clients, b"during")
        last = time.monotonic() - begun
        ask(clients, b"after")
        seen = watcher.mark()
        figures = {key: done["checkpoint"].get(key) for key in ("stop_ms", "total_ms", "connections")}
        restored = {key: done["restore"].get(key) for key in ("connections", "held", "total_ms")}
        print(json.dumps({"checkpoint": figures, "restore": restored, "command_s": took, "last_answer_s": last}))
        assert (seen.rsts, seen.missed) == ([], 0)
        assert (restored["connections"], restored["held"]) == (count, count if where == "source" else 0)
        to.kill(server.pid, signal.SIGKILL)
