"""tcpmig killed by SIGKILL at a chosen moment, and what must be true afterwards.

The moment is found in /proc: the tool is killed once the process that it works on has been seen to be traced, or to be
a stub, for some time in all (:func:`kill_inside`).  Then :func:`settle` runs `tcpmig recover`, and :func:`judge` looks
at everything: one running copy, clients that go on without a wrong byte or a reset, nothing left behind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hosts import Host, HostProcess, warm
from tests.hosts.tcpmig import RSH, TCPMIG
from tests.hosts.warm import tcpmig
from tests.workloads.move import RUNNING, Stage, outer_pid

__all__ = [
    "Death",
    "goes_on_alone",
    "kill_inside",
    "left_behind",
    "migrate_command",
    "receiver",
    "revive",
    "settle",
    "start",
    "stub_born",
    "traced",
    "wait_until_none_runs",
]

WAIT = 20.0
#: seconds that clients get to go on: a peer that was silent for long waits for its retransmission timer
GOING_ON = 30.0
#: of flags in /proc/PID/stat (include/linux/sched.h): it is past the signal that ended it
PF_EXITING = 0x4
#: seconds in which a process that is let go takes a signal that waits for it
CALM = 0.02
#: seconds from one look at a process to the next
LOOK = 0.0002


@dataclasses.dataclass(slots=True)
class Death:
    """How it came about.

    status  of the tool: -9 if it was killed in time
    state   letter of the process's state just before
    after   seconds that it was seen so until the kill; of one that was not killed in time: in all
    """

    status: int
    state: str
    after: float

    @property
    def inside(self) -> bool:
        """Whether the process was stopped or seized then."""
        return self.status == -signal.SIGKILL and self.state in ("t", "T")


def migrate_command(target: Host, pid: int, *options: object) -> list[object]:
    """The command line of a migration."""
    warm.ready(target)
    rsh = shlex.join([*RSH, "--warm"])
    receive = shlex.join([*TCPMIG, "receive"])
    return [*TCPMIG, "migrate", pid, target.name, "--rsh", rsh, "--remote-command", receive, "--json", *options]


def start(host: Host, command: list[object], log: Path) -> HostProcess:
    """Run a command of ours (TCPMIG...); what it prints goes to a file."""
    with log.open("ab") as out:
        return warm.popen(host, *command[2:], stdout=out, stderr=out)


def traced(pid: int, *, frozen: bool = False) -> Callable[[], str]:
    """Tells the state letter of a process (the harness's number) while it is stopped or seized, else nothing.

    frozen  only once a SIGSTOP waits for it: from then on its connections are changed
    """
    path = f"/proc/{pid}/status"

    def look() -> str:
        try:
            with open(path) as lines:
                text = lines.read()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        letter = text.partition("State:\t")[2][:1]
        if frozen and not _pending(text, signal.SIGSTOP):
            return ""
        return letter if letter in "Tt" or "\nTracerPid:\t0\n" not in text else ""

    return look


def _pending(status: str, number: int) -> bool:
    """Whether a signal waits for the process, or for its first thread."""
    masks = (int(status.partition(f"{name}:\t")[2][:16] or "0", 16) for name in ("SigPnd", "ShdPnd"))
    return any(mask >> (number - 1) & 1 for mask in masks)


def stub_born(host: Host, pid: int) -> Callable[[], str]:
    """The same of a process that does not exist yet, by its number in the host."""
    path = host.path(f"/proc/{pid}/status")

    def look() -> str:
        try:
            text = path.read_text()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        letter = text.partition("State:\t")[2][:1]
        return letter if letter in "Tt" or "\nTracerPid:\t0\n" not in text else ""

    return look


def receiver(host: Host, command: bytes = b"receive") -> Callable[[], int]:
    """Tells the harness's number of `tcpmig receive` (or another command) in a host, 0 if it does not run."""

    warm_name = warm.name_of(command.decode())

    def look() -> int:
        for pid, name in host.processes().items():
            try:
                words = host.path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if command in words or name == warm_name:
                    return outer_pid(host, pid)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended meanwhile
        return 0

    return look


def kill_inside(tool: HostProcess, victim: Callable[[], int], look: Callable[[], str], delay: float) -> Death:
    """Kill ``victim`` (the harness's number) once ``look`` has seen something for ``delay`` seconds in all, and wait
    for the tool.

    It may let the process go and stop it again: what passes between does not count, or most kills would fall there.
    """
    end = time.monotonic() + WAIT
    number = 0
    while not (state := look()):
        # looked for beforehand: it takes longer than the stop
        number = number or victim()
        if tool.poll() is not None or time.monotonic() > end:
            return Death(tool.wait(WAIT), "", 0.0)
        # the tool needs the processor more
        time.sleep(LOOK)
    number = number or victim()
    at, spent = time.monotonic(), 0.0
    while spent < delay and tool.poll() is None:
        time.sleep(LOOK)
        before, at = at, time.monotonic()
        state = look()
        if state:
            spent += at - before
    if number:
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            state = ""
    status = tool.wait(WAIT * 2)
    if number and number != tool.outer_pid and status != 0:
        status = -signal.SIGKILL
    return Death(status, state, spent)


def left_behind(host: Host, *pids: int) -> list[str]:
    """What of tcpmig is left on a host; [] is as it should be. A holder that has given up its last socket still has to
    end: it is looked for again."""
    deadline = time.monotonic() + WAIT
    while True:
        status, out, err = warm.run(host, "tests.workloads.left_behind", *pids)
        if status != 0:
            return [f"{host.name} cannot be looked at: {err}"]
        found: list[str] = json.loads(out)
        if not any("is a holder" in what for what in found) or time.monotonic() > deadline:
            return [f"{host.name}: {what}" for what in found]
        time.sleep(0.05)


def settle(host: Host, *options: object) -> tuple[int, list[dict[str, Any]]]:
    """`tcpmig recover` in a host: exit status, items."""
    status, summary, printed = tcpmig(host, "recover", *options)
    if "items" not in summary:
        return status, [{"error": printed + json.dumps(summary)}]
    return status, summary["items"]


FROZEN = "-frozen"
#: what is killed, and after how many seconds of the stop at most: about what it takes on a quiet machine;
#: ``-frozen``: since its connections are changed; of recover the share of its work
KINDS = {
    "migrate": 0.06,
    "precopy": 0.5,
    "receive": 0.06,
    "checkpoint": 0.05,
    "checkpoint-R": 0.025,
    "migrate-frozen": 0.05,
    "receive-frozen": 0.05,
    "checkpoint-frozen": 0.05,
    "restore": 0.04,
    "recover": 1.0,
}


def die(stage: Stage, folder: Path, kind: str, delay: float) -> Death:
    """One command, killed inside its work. ``recover`` is killed by :func:`tests.workloads.steps.die_recovering`."""
    log, image = folder / "tool.log", folder / "image"
    here, pid = stage.here, stage.pid
    if kind == "restore":
        done = tcpmig(here, "checkpoint", pid, "-o", image)
        assert done[0] == 0, done
        tool = start(here, [*TCPMIG, "restore", image, "--json"], log)
        return kill_inside(tool, lambda: tool.outer_pid, stub_born(here, pid), delay)
    look = traced(outer_pid(here, pid), frozen=kind.endswith(FROZEN))
    kind = kind.removesuffix(FROZEN)
    if kind in ("migrate", "precopy", "receive"):
        # without rounds the process is stopped once: the moment is found in that stop
        options = [] if kind == "precopy" else ["--stop-and-copy"]
        tool = start(here, migrate_command(stage.there, pid, *options), log)
        return kill_inside(tool, receiver(stage.there) if kind == "receive" else lambda: tool.outer_pid, look, delay)
    options = ["-R"] if kind == "checkpoint-R" else []
    tool = start(here, [*TCPMIG, "checkpoint", pid, "-o", image, *options, "--json"], log)
    return kill_inside(tool, lambda: tool.outer_pid, look, delay)


def goes_on_alone(stage: Stage) -> tuple[bool, list[str]]:
    """Once all programs of ours have ended, before anybody recovers: whether a copy runs, and what is wrong with it.

    Nobody else brings a connection back to life before the process runs: so its clients must go on.
    """
    look = receiver(stage.there)
    end = time.monotonic() + WAIT
    while look() and time.monotonic() < end:
        time.sleep(0.01)
    end = time.monotonic() + WAIT
    while any(h.state(stage.pid) == "t" for h in (stage.here, stage.there)) and time.monotonic() < end:
        time.sleep(0.001)
    # one that has a SIGSTOP stops as soon as the tool is gone
    time.sleep(CALM)
    if not copies(stage):
        return False, []
    seen = [f"{host.name}: {_status(host, stage.pid)}" for host in copies(stage)]
    return True, [f"runs on by itself ({seen}), but no answer: {name}" for name in _not_going_on(stage)]


def revive(stage: Stage, folder: Path, again: Callable[[], tuple[int, dict[str, Any], str]] | None = None) -> list[str]:
    """Recover on both hosts; what is only in the image by then is restored (``again``: by that). Problems."""
    problems = []
    here = stage.here
    for host in (here, stage.there):
        status, items = settle(host)
        if status != 0:
            problems.append(f"recover on {host.name} ended with {status}: {items}")
    if not copies(stage) and (folder / "image").exists():
        status, summary, printed = tcpmig(here, "restore", folder / "image") if again is None else again()
        if status != 0:
            problems.append(f"restore ended with {status}: {summary} {printed}")
    (folder / "image").unlink(missing_ok=True)
    return problems


def copies(stage: Stage) -> list[Host]:
    """The hosts in which the process runs. One that is ending does not: a stub that dies with the tool is still there
    until it gets the processor."""
    return [host for host in (stage.hosts.source, stage.hosts.target) if _runs(host, stage.pid)]


def _runs(host: Host, pid: int) -> bool:
    if _pending(_status(host, pid), signal.SIGKILL):
        return False
    try:
        stat = host.path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat[0] in RUNNING and not int(stat[6]) & PF_EXITING


def _status(host: Host, pid: int) -> str:
    """/proc/PID/status, empty if there is no such process."""
    try:
        return host.path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_until_none_runs(stage: Stage) -> None:
    """Until the process is stopped wherever it is: nobody goes on by himself. AssertionError."""
    end = time.monotonic() + WAIT
    while running := copies(stage):
        assert time.monotonic() < end, f"it runs on {running}"
        time.sleep(0.01)


def judge(stage: Stage) -> list[str]:
    """What is wrong once everything is settled: not one running copy, clients that do not go on, resets, leftovers."""
    hosts = stage.hosts
    running = copies(stage)
    problems = [] if len(running) == 1 else [f"running copies: {[host.name for host in running]}"]
    if running:
        stage.here = running[0]
        stage.there = hosts.target if running[0] is hosts.source else hosts.source
    problems += [f"no answer: {name}" for name in _not_going_on(stage)]
    problems += [f"{load.name}: {text}" for load in stage.loads for text in load.news()]
    problems += [f"RST: {packet}" for packet in stage.watcher.mark().rsts]
    for host in (hosts.source, hosts.target):
        problems += left_behind(host, *([stage.pid] if host in running else []))
    addresses = {host.name: host.addresses() for host in (hosts.source, hosts.target)}
    for address in (hosts.net.service4, hosts.net.service6):
        having = [name for name, has in addresses.items() if any(a.startswith(address + "/") for a in has)]
        if running and having != [running[0].name]:
            problems.append(f"{address} is on {having}, the process on {running[0].name}")
    return problems


def _not_going_on(stage: Stage) -> list[str]:
    """Clients that get no reply within a while."""
    end = time.monotonic() + GOING_ON
    before = {load.name: load.ask("replies") for load in stage.loads}
    waiting: list[str] = []
    while time.monotonic() < end:
        waiting = []
        for load in stage.loads:
            now = load.ask("replies")["replies"]
            if any(a == b for a, b in zip(before[load.name]["replies"], now, strict=True)):
                waiting.append(load.name)
        if not waiting:
            return []
        time.sleep(0.005)
    return waiting
