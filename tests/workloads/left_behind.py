"""What of tcpmig is left on this host: run in a test host, prints a JSON list of sentences; [] is as it should be.

python -m tests.workloads.left_behind [PID...]      PID: processes of this host whose sockets and memory are looked at
"""

from __future__ import annotations

import json
import os
import socket
import sys

from checkpoint import procfs
from checkpoint.errors import NoSuchProcess
from checkpoint.leftovers import leftovers
from migrate.holdstore import holds
from migrate.recover import survey
from tcpstate.errors import ForeignFilter, UnsupportedSocket
from tcpstate.filters import read_filters
from tcpstate.frozen import runtime_dir
from tcpstate.kernel import route
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import TCP
from tcpstate.locate import take
from tcpstate.silence import MARK
from tcpstate.uses.hold import standing


def left_behind(pids: list[int]) -> list[str]:
    """All of it."""
    found = [f"journal {view.path.name}" for view in survey() if view.mine]
    for family in (socket.AF_INET, socket.AF_INET6):
        found += [f"rule of priority {priority}" for priority in route.blackhole_rules(family, MARK)]
    found += [f"hold {record.hold}" for record in holds()]
    found += [f"drop rule of hold {hold}" for hold in standing()]
    found += [f"file {path}" for path in (runtime_dir() / "kept").glob("*")]
    for name in os.listdir("/proc"):
        if name.isdigit():
            found += _of_process(int(name), int(name) in pids)
    return found


def _last_argument(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().rstrip(b"\0").rpartition(b"\0")[2]
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _of_process(pid: int, known: bool) -> list[str]:
    try:
        stat = procfs.read_stat(pid)
    except NoSuchProcess:
        # it has ended since it was listed
        return []
    found = [f"pid {pid} is in state {stat.state}"] if stat.state in "Tt" else []
    if stat.comm.startswith("tcpmig-stub"):
        found.append(f"pid {pid} is a stub")
    if stat.comm == "tcpmig-hold" and not stat.zombie:
        found.append(f"pid {pid} is a holder")
    if not stat.zombie and _last_argument(pid) == b"accept queues":
        found.append(f"pid {pid} keeps what waited to be accepted")
    if not known:
        return found
    if leftovers(pid) is not None:
        found.append(f"pid {pid} has code of ours in its memory")
    for fd in os.listdir(f"/proc/{pid}/fd"):
        if os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:"):
            found += [f"pid {pid} fd {fd}: {what}" for what in _of_socket(pid, int(fd))]
    return found


def _of_socket(pid: int, fd: int) -> list[str]:
    try:
        taken = take(pid, fd)
    except UnsupportedSocket:
        # not TCP: nothing of this is done to it
        return []
    with taken as sock:
        found = []
        for name, level, option, usual in (
            ("mark", Level.SOCKET, SO.MARK, 0),
            ("user time-out", Level.TCP, TCP.USER_TIMEOUT, 0),
            ("repair", Level.TCP, TCP.REPAIR, 0),
            ("inline", Level.SOCKET, SO.OOBINLINE, 0),
            ("peek offset", Level.SOCKET, SO.PEEK_OFF, -1),
        ):
            value = sock.getsockopt(level, option)
            if value != usual:
                found.append(f"{name} {value}")
        try:
            if read_filters([sock])[0]:
                found.append("a filter")
        except ForeignFilter:
            found.append("an eBPF filter")
        return found


if __name__ == "__main__":
    print(json.dumps(left_behind([int(argument) for argument in sys.argv[1:]])))
