"""A migration, or a restore of what another host holds, whose line breaks at a chosen message, or whose other end
(`tcpmig receive`, `tcpmig handover`) is killed there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hosts import Host, warm
from tests.hosts.host import ROOT
from tests.hosts.tcpmig import TCPMIG, from_host
from tests.hosts.warm import tcpmig
from tests.workloads.deaths import WAIT, receiver, start
from tests.workloads.move import Stage

__all__ = ["HANDOVER", "MESSAGES", "Break", "hold", "migrate", "restore", "restore_again"]

CUTLINE = str(ROOT / "tests/hosts/cutline.py")
HAND_OVER = shlex.join([*TCPMIG, "handover"])
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
#: the same of `restore --from`; "source" is the side that began, the new host
HANDOVER = (
    "source:hello:1",
    "target:hello:1",
    "source:ask_hold:1",
    "target:hold_told:1",
    "source:give_up:1",
    "target:captured:1",
    "target:given_up:1",
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
    receive = shlex.join([*TCPMIG, "receive"])
    warm.ready(stage.there)
    command = [*TCPMIG, "migrate", stage.pid, stage.there.name, "--remote-command", receive]
    return _broken(stage.here, command, receiver(stage.there), folder, where)


def hold(stage: Stage, folder: Path) -> None:
    """Checkpoint the process; its connections are held."""
    status, found, told = tcpmig(stage.here, "checkpoint", stage.pid, "-o", folder / "image")
    assert status == 0, (found, told)
    stage.here.wait_until_gone(stage.pid)


def restore(stage: Stage, folder: Path, where: Break) -> tuple[int, dict[str, Any], bool]:
    """The same of a restore on the other host, after :func:`hold`."""
    warm.ready(stage.here)
    command = [*TCPMIG, "restore", folder / "image", "--from", stage.here.name, "--remote-command", HAND_OVER]
    return _broken(stage.there, command, receiver(stage.here, b"handover"), folder, where)


def restore_again(stage: Stage, folder: Path) -> tuple[int, dict[str, Any], str]:
    """The same command over a line that does not break."""
    return tcpmig(stage.there, "restore", folder / "image", *from_host(stage.here))


def _broken(
    host: Host, command: list[object], victim: Callable[[], int], folder: Path, where: Break
) -> tuple[int, dict[str, Any], bool]:
    marker = folder / f"{time.monotonic_ns()}.marker"
    do = "hold" if where.do == "kill" else where.do
    options = ["--warm", "--at", where.at, "--do", do, *(["--after"] if where.after else []), "--marker", str(marker)]
    rsh = shlex.join([sys.executable, CUTLINE, *options])
    log = folder / "tool.log"
    log.unlink(missing_ok=True)
    tool = start(host, [*command, "--rsh", rsh, "--json"], log)
    if where.do == "kill":
        end = time.monotonic() + WAIT
        while not marker.exists() and tool.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        number = victim()
        if number:
            # after its last word it may end by itself
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        marker.with_suffix(".go").touch()
    status = tool.wait(WAIT + 120)
    lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
    return status, json.loads(lines[-1]) if lines else {}, marker.exists()
