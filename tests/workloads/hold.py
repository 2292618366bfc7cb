"""A served process held for a while, then restored: what its clients saw, and what is left behind."""

from __future__ import annotations

import dataclasses
import signal
import time
from pathlib import Path
from typing import Any

from tests.hosts import CommandFailed, Host
from tests.hosts.tcpmig import from_host, tcpmig
from tests.packets import PacketReport
from tests.workloads.load import ask_all
from tests.workloads.move import Stage

__all__ = ["HoldReport", "groups_left", "held", "left_at_last", "left_behind"]


@dataclasses.dataclass(slots=True, kw_only=True)
class HoldReport:
    """One hold.

    checkpoint, restore  tcpmig's summaries
    seconds              from the end of one to the beginning of the other
    gaps                 client -> the largest gap between successive replies, ms
    packets              what passed the client's interface
    problems             everything that must not be
    left                 what is left on the two hosts that was not there before
    """

    seconds: float
    checkpoint: dict[str, Any] = dataclasses.field(default_factory=dict)
    restore: dict[str, Any] = dataclasses.field(default_factory=dict)
    gaps: dict[str, float] = dataclasses.field(default_factory=dict)
    packets: PacketReport = dataclasses.field(default_factory=PacketReport)
    problems: list[str] = dataclasses.field(default_factory=list)
    left: list[str] = dataclasses.field(default_factory=list)
    log: str = ""

    def json(self) -> dict[str, Any]:
        """For people and files."""
        return {
            "held_s": self.seconds,
            "stop_ms": self.checkpoint.get("stop_ms"),
            "restore_ms": self.restore.get("total_ms"),
            "connections": self.restore.get("connections"),
            "taken_back": self.restore.get("held"),
            "gaps": self.gaps,
            "rsts": len(self.packets.rsts),
            "problems": self.problems,
        }


def left_behind(host: Host) -> str:
    """What of a host's could have been left: rules, holds, processes of ours. Control groups are the machine's:
    :func:`groups_left`."""
    places = "/run/tcpmig/holds/* /run/tcpmig/kept/* /sys/fs/bpf/*"
    script = f"""
        nft list ruleset; ip rule; ip -6 rule; cat /proc/net/packet | wc -l
        ls -d {places} 2>/dev/null || true
        cat /proc/[0-9]*/comm | grep tcpmig-hold || true
    """
    return host.sh(script)


def left_at_last(host: Host, before: str, *, within: float = 10) -> str:
    """What is left once it is what was there ``before``, or else when the time is up: a holder that has given up its
    last socket still has to end."""
    deadline = time.monotonic() + within
    while (now := left_behind(host)) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    return now


def groups_left(hold: str) -> list[str]:
    """Control groups of a hold. A holder that has just been told to end leaves its own within moments."""
    end = time.monotonic() + 5
    while found := [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/tcpmig-hold-{hold}")]:
        if time.monotonic() > end:
            break
        time.sleep(0.01)
    return found


def held(
    stage: Stage, image: Path, *, seconds: float, where: Host, kill: bool = False, reply_within: float = 60
) -> HoldReport:
    """Checkpoint the stage's process, wait, restore it on ``where``. Raises CommandFailed if tcpmig refuses.

    kill          the holders are killed in between
    reply_within  seconds in which every client must have had an answer again
    """
    report = HoldReport(seconds=seconds)
    here, watcher = stage.here, stage.watcher
    hosts = (stage.hosts.source, stage.hosts.target)
    before = [left_behind(host) for host in hosts]
    ask_all(stage.loads, "before")
    ask_all(stage.loads, "mark")
    watcher.mark()
    report.checkpoint = _run(here, "checkpoint", stage.pid, "-o", image)
    here.wait_until_gone(stage.pid)
    end = time.monotonic() + seconds
    if kill:
        for pid in _run(here, "holds")["holds"][0]["holders"]:
            here.kill(pid, signal.SIGKILL)
    # a hold is as long as it is: there is no other condition to wait for
    time.sleep(max(0.0, end - time.monotonic()))
    report.restore = _run(where, "restore", image, *([] if where is here else from_host(here)))
    stage.arrived(where)
    ask_all(stage.loads, "after", reply_within)
    report.gaps = {
        name: answer["gap_ms"] for name, answer in ask_all(stage.loads, "mark").items() if "gap_ms" in answer
    }
    report.packets = watcher.mark()
    report.problems = [f"{load.name}: {text}" for load in stage.loads for text in load.news()]
    report.problems += [f"RST: {packet}" for packet in report.packets.rsts]
    if report.packets.missed:
        report.problems.append(f"the watcher missed {report.packets.missed} packets")
    report.left += groups_left(report.checkpoint["hold"])
    for host, was in zip(hosts, before, strict=True):
        now = left_at_last(host, was)
        if now != was:
            report.left.append(f"{host.name}: {was!r} became {now!r}")
    if report.problems:
        report.log = watcher.log()
    return report


def _run(host: Host, *arguments: object) -> dict[str, Any]:
    status, found, told = tcpmig(host, *arguments)
    if status != 0:
        raise CommandFailed(f"{host.name}: tcpmig {arguments[0]} ended with {status}: {found} {told}")
    return found
