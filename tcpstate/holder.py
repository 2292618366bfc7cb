"""A process that does nothing but keep descriptors open: what must outlive us, and whoever owned it.

A frozen connection would end with its owner, and its capture with the program that froze it.  So a process of its own
has both open: it sleeps until it is ended.  It is started in two steps, so that none is left behind if we die between:
it ends by itself unless it is told to stay, which is done once there is a note of it on disk.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from tcpstate.kernel.sockets import pidfd_getfd
from tcpstate.slotted import dataclass

__all__ = ["Holder", "starting"]

#: double fork: nobody of ours has to reap it
_SCRIPT: Final = """
import os, signal
if os.fork():
    os._exit(0)
os.write(1, b"%d\\n" % os.getpid())
if not os.read(0, 1):
    os._exit(0)
null = os.open("/dev/null", os.O_RDWR)
for number in (0, 1, 2):
    os.dup2(null, number)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
while True:
    signal.pause()
"""
_START_TIME_FIELD: Final = 19  # of /proc/PID/stat, counted from the state


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A holder, and its descriptors by their numbers there.

    pid, started  process ID, and start time in clock ticks since boot: together they are of one process only
    """

    pid: int
    started: int

    @property
    def lives(self) -> bool:
        """Whether it is there still."""
        return _started(self.pid) == self.started

    def take(self, fds: Iterable[int]) -> list[socket.socket]:
        """Descriptors of our own for sockets that it keeps; [] if it is gone. OSError."""
        if not self.lives:
            return []
        pidfd = os.pidfd_open(self.pid)
        try:
            return [socket.socket(fileno=pidfd_getfd(pidfd, fd)) for fd in fds]
        finally:
            os.close(pidfd)

    def end(self) -> None:
        """End it, and with it what nobody else has open."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            # asked with the pidfd open: from here on the number cannot become another process's
            if self.lives:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


@contextlib.contextmanager
def starting(fds: Sequence[int], label: str) -> Iterator[Holder]:
    """A process that has ``fds`` open under the same numbers. It stays if the block ends without an exception.

    label  what it shows as its last argument
    """
    command = [sys.executable or "python3", "-ISc", _SCRIPT, label]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=fds, cwd="/",
        start_new_session=True, env={},
    ) as first:  # fmt: skip
        if first.stdin is None or first.stdout is None:
            raise RuntimeError("pipes were asked for")
        line = first.stdout.readline()
        if not line:
            raise ChildProcessError("the process that is to keep the connection open did not start")
        pid = int(line)
        started = _started(pid)
        if started is None:
            raise ChildProcessError("the process that is to keep the connection open has ended")
        yield Holder(pid=pid, started=started)
        first.stdin.write(b"k")
        first.stdin.flush()


def _started(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[_START_TIME_FIELD])
    except (OSError, IndexError, ValueError):
        return None
