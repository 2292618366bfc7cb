"""What is written down of a tree that is built and does not run yet: how it is ended, or let go, without us."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from checkpoint.files.rebuild import Rebuilder
from checkpoint.spawn import Stub
from checkpoint.traces import StagedName, Stubs, Traced

__all__ = ["noted"]


def noted(
    stubs: Mapping[int, Stub],
    stops: Mapping[int, int],
    roots: dict[int, int],
    rebuilder: Rebuilder,
    devices: dict[str, str],
) -> Stubs:
    """The record STUBS.

    stops    by PID in the image: the signal that a process was stopped by, or 0
    roots    PIDs of the trees' roots in the image to ours
    devices  what the source's interfaces are called here
    """
    return Stubs(
        processes=[replace(Traced.of(stub), stop_signal=stops.get(pid, 0)) for pid, stub in stubs.items()],
        names=[StagedName(staged=staged, real=real) for staged, real in rebuilder.staged],
        roots=roots,
        held={index: one.file.quiet for index, one in rebuilder.held.items() if one.file.quiet is not None},
        devices=devices,
        numbers={pid: stub.pid for pid, stub in stubs.items() if stub.pid != pid},
    )
