"""What this host is: told to the other side, and written into journals to tell our own from another host's."""

from __future__ import annotations

import fnmatch
import functools
import os
import platform
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from checkpoint import kernelneeds
from checkpoint.arch import chosen_by
from checkpoint.memory import lazy
from checkpoint.verdict import Verdict
from migrate import squeeze
from migrate.errors import AnotherMachine
from migrate.messages import CpuState, HostFacts, Needs
from tcpstate import acceptqueue

__all__ = [
    "ACCEPT_QUEUE",
    "AHEAD",
    "AHEAD_PLAIN",
    "ALIKE",
    "APART",
    "CHECK_FOLLOWS",
    "FORWARD",
    "LAZY",
    "PROBE",
    "RETOLD",
    "STAGED",
    "features",
    "host_facts",
    "judge_host",
    "namespace",
    "state_directory",
    "without",
]

#: of :func:`features`: connections can be put into a listener's accept queue
ACCEPT_QUEUE: Final = "accept-queue"
#: of :func:`features`: connections are built before the stop (the frame AHEAD is understood)
AHEAD: Final = "connections-ahead"
#: of :func:`features`: so are plain files (they may stand in the frame AHEAD)
AHEAD_PLAIN: Final = "files-ahead"
#: of :func:`features`: of those that have changed numbers are enough (the field ``retold`` of FILES_DELTA)
RETOLD: Final = "connections-retold"
#: of :func:`features`: shared memory is kept before the stop (the frame CONTENTS is understood)
STAGED: Final = "contents-ahead"
#: of :func:`features`: threads can be told by what is their own (the field ``alike`` of STATES)
ALIKE: Final = "threads-alike"
#: of :func:`features`: and states some processes at a time, when their memory has come (the field ``apart``)
APART: Final = "states-apart"
#: the same: this program answers Probe
PROBE: Final = "probe"

#: the same: this program takes in processes whose connections are forwarded to it
FORWARD: Final = "forward"
#: the same, and the option of Check that has the migration's ID: pages can come after the processes have begun to run
LAZY: Final = "lazy"
#: of a source's Hello: it will send Check, and looks at its processes meanwhile
CHECK_FOLLOWS: Final = "check-follows"

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_DEFAULT_STATE = "/var/lib/tcpmig"


def host_facts() -> HostFacts:
    """The facts of this host, of the calling thread's namespaces."""
    return HostFacts(
        boot_id=_BOOT_ID.read_text().strip(),
        network=namespace("net"),
        pids=namespace("pid"),
        kernel=platform.release(),
        page_size=resource.getpagesize(),
        cpu=CpuState(machine=platform.machine(), flags=_cpu_flags()),
    )


def without(needs: Needs, patterns: Sequence[str]) -> Needs:
    """The needs of processes that do without the features of this CPU that match a pattern (``avx512*``)."""
    if not patterns:
        return needs
    cpu = host_facts().cpu
    unused = {flag for pattern in patterns for flag in fnmatch.filter(cpu.flags, pattern)}
    return replace(needs, cpu=replace(cpu, flags=cpu.flags - unused))


def features() -> frozenset[str]:
    """What the kernel and this program can do here that another host may want to know before anything is stopped. The
    first time takes up to a second (the kernel's BTF is read)."""
    ours = frozenset({PROBE, AHEAD, AHEAD_PLAIN, RETOLD, STAGED, ALIKE, APART, FORWARD, squeeze.FEATURE})
    ours |= set() if lazy.available() else {LAZY}
    return ours if acceptqueue.missing() else ours | {ACCEPT_QUEUE}


def namespace(kind: str) -> int:
    """The inode number of the calling thread's namespace of this kind."""
    return os.stat(f"/proc/thread-self/ns/{kind}").st_ino


def state_directory() -> Path:
    """Where journals are: TCPMIG_STATE_DIR, else /var/lib/tcpmig."""
    return Path(os.environ.get("TCPMIG_STATE_DIR") or _DEFAULT_STATE)


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """The flags that *all* processors of this host have."""
    # x86: "flags", arm64: "Features"
    lines = [
        line.partition(":")[2].split()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.partition("\t")[0].strip() in ("flags", "Features")
    ]
    return frozenset.intersection(*map(frozenset, lines)) if lines else frozenset()


def judge_host(needs: Needs, theirs: HostFacts, ours: HostFacts) -> list[Verdict]:
    """What speaks against running the other host's processes on this one, as far as machine and CPU go."""
    verdicts = []
    cpu = theirs.cpu if needs.cpu is None else needs.cpu

    def refuse(text: str, object: str) -> None:
        verdicts.append(Verdict.refuse(AnotherMachine(text, object=object), "machine"))

    if cpu.machine != ours.cpu.machine:
        refuse(f"the processes are of the machine {cpu.machine}, this host is {ours.cpu.machine}", "machine")
    if theirs.page_size != ours.page_size:
        refuse(f"the source's pages have {theirs.page_size} bytes, ours {ours.page_size}", "page size")
    missing = sorted(chosen_by(cpu.flags) - ours.cpu.flags) if cpu.machine == ours.cpu.machine else ()
    if missing:
        refuse(f"this CPU lacks {' '.join(missing)}", "cpu")
    if cpu.xsave_mask and ours.cpu.xsave_mask and cpu.xsave_mask & ~ours.cpu.xsave_mask:
        refuse(
            f"the register state has components {cpu.xsave_mask & ~ours.cpu.xsave_mask:#x} that this CPU lacks", "cpu"
        )
    return verdicts + kernelneeds.judge(needs.features)
