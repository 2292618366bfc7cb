"""A migration whose line breaks at a chosen message, or whose `tcpmig receive` is killed there."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.hosts.host import ROOT
from tests.hosts.tcpmig import TCPMIG
from tests.workloads.deaths import WAIT, receiver, start
from tests.workloads.move import Stage

__all__ = ["MESSAGES", "Break", "migrate"]

CUTLINE = str(ROOT / "tests/hosts/cutline.py")
#: every message of the protocol, with which one of its kind
MESSAGES = (
    "source:hello:1",
    "target:hello:1",
    "source:check:1",
    "target:verdicts:1",
    "source:measure:1",
    "target:measured:1",
    "source:image:1",
    "source:image:3",
    "source:measure:6",
    "target:measured:6",
    "source:prepare:1",
    "target:prepared:1",
    "source:commit:1",
    "source:captured:1",
    "target:started:1",
    "target:running:1",
    "source:done:1",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Break:
    """at: WAY:NAME:COUNT; do: cut, stall, kill (the receiver); after: the message has passed."""

    at: str
    do: str
    after: bool = False

    def __str__(self) -> str:
        return f"{self.do} {'after' if self.after else 'before'} {self.at}"


def migrate(stage: Stage, folder: Path, where: Break) -> tuple[int, dict[str, Any], bool]:
    """Exit status, JSON object, and whether the place was reached."""
    marker = folder / f"{time.monotonic_ns()}.marker"
    do = "hold" if where.do == "kill" else where.do
    options = ["--at", where.at, "--do", do, *(["--after"] if where.after else []), "--marker", str(marker)]
    rsh = shlex.join([sys.executable, CUTLINE, *options])
    receive = shlex.join([*TCPMIG, "receive"])
    command = [*TCPMIG, "migrate", stage.pid, stage.there.name, "--rsh", rsh, "--remote-command", receive, "--json"]
    log = folder / "break.log"
    log.unlink(missing_ok=True)
    tool = start(stage.here, command, log)
    if where.do == "kill":
        end = time.monotonic() + WAIT
        while not marker.exists() and tool.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        number = receiver(stage.there)()
        if number:
            os.kill(number, signal.SIGKILL)
        marker.with_suffix(".go").touch()
    status = tool.wait(WAIT + 120)
    lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
    return status, json.loads(lines[-1]) if lines else {}, marker.exists()
