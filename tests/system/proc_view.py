"""Print, as JSON, what /proc shows of a process and a digest of every byte of its memory; run inside its host.

Left out is what no two runs of one process share: times, counters, the kernel's own inode numbers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from checkpoint.memory.compare import snapshot
from checkpoint.tracee import Tree

#: of /proc/PID/status
STATUS = [
    "Name",
    "Umask",
    "State",
    "Tgid",
    "Pid",
    "TracerPid",
    "Uid",
    "Gid",
    "Groups",
    "NStgid",
    "NSpid",
    "NSpgid",
    "NSsid",
    "Threads",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
    "Cpus_allowed",
    "Mems_allowed",
]
#: of /proc/PID/stat, counted from its third field: group, session, tty, priority, threads, code, stack, data, args
STAT = [2, 3, 4, 5, 15, 16, 17, 23, 24, 25, 35, 37, 38, 41, 42, 43, 44, 45, 46, 47, 48]
FILES = [
    "cmdline",
    "comm",
    "environ",
    "limits",
    "personality",
    "oom_score_adj",
    "coredump_filter",
    "cgroup",
    "timerslack_ns",
    "auxv",
]
LINKS = ["cwd", "exe", "root"]
#: of fdinfo: what counts inodes or time
TIMES = re.compile(r"^(mnt_id|ino|it_value|eventfd-id).*\n", re.MULTILINE)
#: the lock of a description shows who took it, perhaps long ago: that is the tool now
TAKER = re.compile(r"((?:FLOCK|LEASE) +\w+ +\w+) \d+")
INODES = re.compile(r"\b(ino|sdev):[0-9a-f]+|:\[\d+\]")


def status(path: Path) -> dict[str, str]:
    lines = (line.partition(":") for line in (path / "status").read_text(errors="replace").splitlines())
    return {name: value.strip() for name, _, value in lines if name in STATUS}


def stat(path: Path) -> list[str]:
    fields = (path / "stat").read_text(errors="replace").rpartition(")")[2].split()
    return [fields[i] for i in STAT]


def epoll_sorted(info: str) -> str:
    lines = info.splitlines()
    return "\n".join(
        [line for line in lines if not line.startswith("tfd:")]
        + sorted(line for line in lines if line.startswith("tfd:"))
    )


def look(pid: int, areas: Iterable[tuple[int, int]], *, whole: bool = True) -> dict[str, object]:
    """Of a process that is stopped. ``areas``: (start, end) of memory that the kernel itself writes (rseq); ``whole``:
    also the bytes of files that it only maps."""
    return shown(pid) | {"memory": memory(pid, areas, whole)}


def memory(pid: int, areas: Iterable[tuple[int, int]], whole: bool) -> dict[str, object]:
    return {
        f"{region.start:x}": {
            name: INODES.sub("", str(sorted(value) if isinstance(value, frozenset) else value))
            for name, value in dataclasses.asdict(region).items()
        }
        for region in snapshot(pid, skip=areas, whole=whole)
    }


def shown(pid: int) -> dict[str, object]:
    path = Path(f"/proc/{pid}")
    return {
        "status": status(path),
        "stat": stat(path),
        "links": {name: os.readlink(path / name) for name in LINKS},
        "files": {name: (path / name).read_bytes().hex() for name in FILES},
        "timers": (path / "timers").read_text(),
        "threads": {
            tid.name: {"status": status(tid), "stat": stat(tid), "comm": (tid / "comm").read_text(errors="replace")}
            for tid in sorted((path / "task").iterdir())
        },
        "descriptors": {
            fd.name: [
                INODES.sub("", os.readlink(fd)),
                TAKER.sub(r"\1", INODES.sub("", epoll_sorted(TIMES.sub("", (path / "fdinfo" / fd.name).read_text())))),
            ]
            for fd in sorted((path / "fd").iterdir())
        },
    }


def dead(pid: int) -> dict[str, object]:
    """Of a process that has ended and is not waited for."""
    path = Path(f"/proc/{pid}")
    fields = (path / "stat").read_text(errors="replace").rpartition(")")[2].split()
    return {"status": {"Pid": pid, "State": fields[0]}, "ids": fields[1:5], "wait status": fields[49]}


def view(pid: int) -> dict[str, object]:
    found = shown(pid)
    tree = Tree.stop([pid])
    try:
        threads = tree.processes[0].threads
        areas = [(t.rseq.address, t.rseq.address + t.rseq.size) for t in threads if t.rseq is not None]
        return found | {"memory": memory(pid, areas, True)}
    finally:
        tree.resume()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    json.dump(view(int(sys.argv[1])), sys.stdout)
