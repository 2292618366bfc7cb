"""Connections held for 20 seconds (TMH_HOLD changes that), then taken back or rebuilt, here and elsewhere.

Also with the holder killed meanwhile: every byte right, new connections served in the end, no RST, nothing left.

Peers back off meanwhile: after 20 s the next retransmission of a peer is up to half a minute away, and that of a SYN
too.  So the clients wait longer than they do in a move.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.hosts import three_hosts
from tests.workloads import scenes
from tests.workloads.hold import held

SECONDS = float(os.environ.get("TMH_HOLD", "20"))
FINISH = 200.0


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
