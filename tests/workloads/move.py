"""One move under load, judged: what stopped, what the clients saw, what the wire showed.

stage = Stage(hosts, process.pid, loads, port=6379)
report = stage.move()                # tcpmig migrate, source -> target; the next one goes back
report.problems                      # empty: nobody noticed
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.counters import counters, moved
from tests.hosts import Host, ThreeHosts, tcpmig
from tests.packets import PacketReport, Watcher
from tests.workloads.load import Load, ask_all

__all__ = ["MoveReport", "Mover", "Stage", "by_tcpmig", "outer_pid", "pretend"]

FIGURES = ("stop_ms", "total_ms", "command_ms", "bytes_sent", "connections")  # of tcpmig's summary
RUNNING = ("R", "S", "D")  # states of /proc/PID/stat; T and t would mean that it was left stopped
CALM = 0.3  # seconds before and after a move, so that a timer which it started shows (the shortest is 200 ms)

# What moves a process: (from, pid, to) -> summary as `tcpmig migrate --json` prints it
Mover = Callable[[Host, int, Host], dict[str, Any]]


def by_tcpmig(*options: object) -> Mover:
    """Really, by `tcpmig migrate` with these options."""
    return lambda source, pid, target: tcpmig.migrate(source, pid, target, options=options)


def pretend(stop_ms: float) -> Mover:
    """Nothing moves: the process is only stopped for so long. To try the loads and the judges without tcpmig."""

    def mover(source: Host, pid: int, _: Host) -> dict[str, Any]:
        start = time.monotonic()
        if stop_ms:
            tree = _tree(outer_pid(source, pid))
            for one in tree:
                os.kill(one, signal.SIGSTOP)
            time.sleep(stop_ms / 1e3)
            for one in tree:
                os.kill(one, signal.SIGCONT)
        took = 1e3 * (time.monotonic() - start)
        return {"outcome": "pretended", "stop_ms": took, "total_ms": took, "connections": 0, "bytes_sent": 0}

    return mover


def _tree(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in _tree(int(child)))]


def outer_pid(host: Host, pid: int) -> int:
    """The harness's PID of a process that has `pid` in the host."""
    inside = f"\t{pid}\n"
    namespace = os.readlink(f"/proc/{host.init}/ns/pid")
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                # a process may call itself by any bytes
                with open(f"/proc/{entry}/status", errors="replace") as lines:
                    mine = any(line.startswith("NSpid:") and line.endswith(inside) for line in lines)
                if mine and os.readlink(f"/proc/{entry}/ns/pid") == namespace:
                    return int(entry)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
    raise ProcessLookupError(f"{host.name} has no process {pid}")


@dataclasses.dataclass(slots=True, kw_only=True)
class MoveReport:
    """One move.

    summary     what tcpmig told
    gaps        client -> the largest gap between successive replies, ms
    before_gaps the same in the calm before the move: what this machine does to the clients by itself
    packets     what passed the client's interface
    wrong       wrong, missing or cut-off replies that clients reported
    timeouts    retransmission timers that ran out at the client's host
    counters    counters of the kernel at the client's host that moved
    served      the same of the other two hosts, by name
    problems    everything that must not be, as texts; empty if nobody noticed
    log         the remarkable packets, when there are problems
    """

    way: str
    summary: dict[str, Any]
    gaps: dict[str, float] = dataclasses.field(default_factory=dict)
    before_gaps: dict[str, float] = dataclasses.field(default_factory=dict)
    answers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    packets: PacketReport = dataclasses.field(default_factory=PacketReport)
    wrong: int = 0
    timeouts: int = 0
    counters: dict[str, int] = dataclasses.field(default_factory=dict)
    served: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    log: str = ""

    @property
    def largest_gap(self) -> float:
        """The largest gap that any client saw, ms."""
        return max(self.gaps.values(), default=0.0)

    def json(self) -> dict[str, Any]:
        """For files and --json."""
        return {
            "way": self.way,
            **{key: self.summary.get(key) for key in FIGURES},
            "gap_ms": self.largest_gap,
            "gaps": self.gaps,
            "before_gaps": self.before_gaps,
            "rsts": len(self.packets.rsts),
            "resent_out": self.packets.resent_out,
            "resent_in": self.packets.resent_in,
            "syns_resent": self.packets.syns_resent,
            "wrong": self.wrong,
            "timeouts": self.timeouts,
            "counters": self.counters,
            "served": self.served,
            "phases": self.summary.get("phases"),
            "problems": self.problems,
        }


class Stage:
    """A served process, its clients, and the judges; closes the clients and the watcher.

    lossy   segments are dropped on purpose: retransmissions and their timers are then no problem
    """

    def __init__(
        self,
        hosts: ThreeHosts,
        pid: int,
        loads: Sequence[Load],
        *,
        port: int,
        mover: Mover | None = None,
        lossy: bool = False,
        data: bool = True,
    ) -> None:
        self.hosts = hosts
        self.pid = pid
        self.loads = list(loads)
        self.here, self.there = hosts.source, hosts.target
        self._mover = mover or by_tcpmig()
        self._lossy = lossy
        self._wrongs = 0
        self._watcher = Watcher(hosts.client, port=port, data=data)

    def move(self, calm: float = CALM) -> MoveReport:
        """Move the process to the other host and judge. Raises MigrationFailed if tcpmig says that it did not work."""
        client = self.hosts.client
        report = MoveReport(way=f"{self.here.name} -> {self.there.name}", summary={})
        report.answers = {f"{n} before": a for n, a in ask_all(self.loads, "before").items()}
        ask_all(self.loads, "mark")
        time.sleep(calm)
        report.before_gaps = self._gaps()
        hosts = (client, self.here, self.there)
        before = {host.name: counters(host) for host in hosts}
        self._watcher.mark()
        report.summary = self._mover(self.here, self.pid, self.there)
        if report.summary.get("outcome") != "pretended":
            self.pid = int(report.summary.get("target_pid", self.pid))
            self.here, self.there = self.there, self.here
        time.sleep(calm)
        report.gaps = self._gaps(report)
        report.answers |= {f"{n} after": a for n, a in ask_all(self.loads, "after").items()}
        report.packets = self._watcher.mark()
        report.served = {host.name: moved(before[host.name], counters(host)) for host in hosts}
        report.counters = report.served.pop(client.name)
        report.timeouts = report.counters.get("TcpExtTCPTimeouts", 0)
        self._judge(report)
        return report

    @property
    def watcher(self) -> Watcher:
        """What it watches the clients' interface with."""
        return self._watcher

    def arrived(self, host: Host) -> None:
        """The process is on this host now, by other means than :meth:`move`."""
        if host is not self.here:
            self.here, self.there = host, self.here

    def _gaps(self, report: MoveReport | None = None) -> dict[str, float]:
        marks = ask_all(self.loads, "mark")
        if report is not None:
            report.answers |= {f"{name} during": answer for name, answer in marks.items()}
        return {name: answer["gap_ms"] for name, answer in marks.items() if "gap_ms" in answer}

    def _judge(self, report: MoveReport) -> None:
        if report.summary.get("outcome") != "pretended":
            if self.here.state(self.pid) not in RUNNING:
                report.problems.append(f"pid {self.pid} does not run on {self.here.name}")
            if self.there.state(self.pid) not in ("", "Z"):
                report.problems.append(f"pid {self.pid} is still there on {self.there.name}")
        before = self._wrongs
        report.problems += self._new_wrongs()
        report.wrong = self._wrongs - before
        report.problems += [f"RST: {packet}" for packet in report.packets.rsts]
        if report.packets.missed:
            report.problems.append(f"the watcher missed {report.packets.missed} packets")
        if report.timeouts and not self._lossy:
            report.problems.append(
                f"{report.timeouts} retransmission timeouts of clients: {report.counters}; served {report.served}; "
                f"phases {report.summary.get('phases')}"
            )
        if report.problems:
            report.log = self._watcher.log()

    def _new_wrongs(self) -> list[str]:
        """What the clients have complained about since the last time."""
        self._wrongs = sum(load.wrongs for load in self.loads)
        return [f"{load.name}: {text}" for load in self.loads for text in load.news()]

    def finish(self, timeout: float = 180) -> list[str]:
        """The clients check what is left and end; what is wrong."""
        ask_all(self.loads, "finish", timeout)
        problems = self._new_wrongs() + [f"RST: {packet}" for packet in self._watcher.mark().rsts]
        self.close()
        return problems

    def close(self) -> None:
        """End clients and watcher."""
        for load in self.loads:
            load.close()
        self._watcher.close()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
