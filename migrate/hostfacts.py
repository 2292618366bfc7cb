"""What this host is: told to the other side, and written into journals to tell our own from another host's."""

from __future__ import annotations

import functools
import os
import platform
import resource
from pathlib import Path

from migrate.messages import CpuState, HostFacts

__all__ = ["host_facts", "namespace", "state_directory"]

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
