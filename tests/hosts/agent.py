"""A Python process in a test host, as any user, that does what a test tells it, line by line."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.hosts.host import ROOT, Host
from tests.hosts.process import HostProcess

__all__ = ["Agent", "AgentError", "as_user", "open_to_all"]

_LOOP = """
import ast, sys
place = {}
for line in sys.stdin:
    code = eval(line)
    try:
        try:
            value = eval(compile(code, "<test>", "eval"), place)
        except SyntaxError:
            exec(compile(code, "<test>", "exec"), place)
            value = None
        try:
            ast.literal_eval(repr(value))
        except (ValueError, SyntaxError):
            value = None
        print(repr((True, value)), flush=True)
    except Exception as error:
        print(repr((False, (getattr(error, "code", ""), f"{type(error).__name__}: {error}"))), flush=True)
"""


class AgentError(Exception):
    """What the process was told to do raised this.

    code  of a TcpmigError, else nothing
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


def open_to_all(host: Host) -> None:
    """Let every user of the host run this Python and read this checkout, wherever they lie.

    Directories that only root may pass (such as /root) are replaced, for the processes of this host, by empty ones in
    which there is nothing but what they need.
    """
    places = {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), ROOT}
    for number, place in enumerate(sorted(places)):
        barred = next((p for p in [*reversed(place.parents), place] if not p.stat().st_mode & 1), None)
        if barred is not None:
            aside = f"/run/open-{number}"
            host.sh(
                f"mkdir -p {aside}; mount --bind {place} {aside}; mountpoint -q {barred} ||"
                f" mount -t tmpfs -o mode=755 none {barred}; mkdir -p {place}; mount --bind {aside} {place}"
            )


def as_user(uid: int) -> list[object]:
    """What a command begins with that is to run as this user, with no group and no capability."""
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]


class Agent:
    """The process. ``uid`` None: as root."""

    def __init__(self, host: Host, uid: int | None = None) -> None:
        prefix = [] if uid is None else as_user(uid)
        pipe = subprocess.PIPE
        self.process: HostProcess = host.popen([*prefix, sys.executable, "-c", _LOOP], stdin=pipe, stdout=pipe)
        self.pid = self.process.pid

    def __call__(self, code: str) -> Any:
        """The value of an expression, if it is a literal, else None. AgentError."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(repr(code).encode() + b"\n")
        line = self.process.stdout.readline().decode()
        if not line:
            raise AgentError("", f"the process ended with {self.process.wait(5)}")
        done, value = ast.literal_eval(line)
        if not done:
            raise AgentError(*value)
        return value

    def close(self) -> None:
        """Kill it."""
        self.process.close()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
