"""Running tcpmig in the test hosts."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from tests.hosts.host import ROOT, Host
from tests.hosts.process import CommandFailed

__all__ = ["RSH", "TCPMIG", "MigrationFailed", "from_host", "migrate", "tcpmig"]

TCPMIG = [sys.executable, "-m", "cli.main"]
RSH = [sys.executable, "-IS", str(ROOT / "tests/hosts/rsh.py")]


class MigrationFailed(CommandFailed):
    """`tcpmig migrate` did not end with 0.

    status   its exit status (CLI.md)
    summary  the JSON object that it printed; empty if it printed none
    """

    def __init__(self, message: str, status: int, summary: dict[str, Any]) -> None:
        super().__init__(message)
        self.status = status
        self.summary = summary


def tcpmig(host: Host, *arguments: object, timeout: float = 60) -> tuple[int, dict[str, Any], str]:
    """Run one command of tcpmig in a host, with --json: exit status, the last JSON object it printed, its stderr."""
    done = host.run([*TCPMIG, *arguments, "--json"], check=False, timeout=timeout)
    lines = done.stdout.strip().splitlines()
    try:
        summary = json.loads(lines[-1]) if lines else {}
    except json.JSONDecodeError:
        summary = {}
    return done.returncode, summary if isinstance(summary, dict) else {}, done.stderr + ("" if summary else done.stdout)


def from_host(origin: Host, *, relay: bool = False) -> list[str]:
    """The options of `restore` for an image whose connections ``origin`` holds."""
    rsh = shlex.join([*RSH, "--relay"] if relay else RSH)
    return ["--from", origin.name, "--rsh", rsh, "--remote-command", shlex.join([*TCPMIG, "handover"])]


def migrate(
    source: Host,
    pid: int | Sequence[int],
    target: Host,
    *,
    options: Sequence[object] = (),
    relay: bool = False,
    timeout: float = 60,
) -> dict[str, Any]:
    """Migrate processes by `tcpmig migrate` in the source's host, through rsh, and return its JSON summary.

    options   further arguments of `migrate`
    relay     the bytes go through the rsh process as they go through ssh (it can then be killed: a cut line)

    Added to the summary: ``command_ms``, from the start of the command to its end.
    Raises MigrationFailed when it ends with another status than 0, with all that it printed.
    """
    pids = [pid] if isinstance(pid, int) else list(pid)
    rsh = shlex.join([*RSH, "--relay"] if relay else RSH)
    receive = shlex.join([*TCPMIG, "receive"])
    arguments = ["migrate", *pids, target.name, "--rsh", rsh, "--remote-command", receive, *options]
    start = time.monotonic()
    status, summary, printed = tcpmig(source, *arguments, timeout=timeout)
    if status != 0:
        what = json.dumps(summary) if summary else ""
        raise MigrationFailed(
            f"tcpmig migrate {pids} {source.name} -> {target.name} ended with {status}: {what}\n{printed.strip()}",
            status,
            summary,
        )
    summary["command_ms"] = 1e3 * (time.monotonic() - start)
    return summary
