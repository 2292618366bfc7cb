"""CLOCK_MONOTONIC and CLOCK_BOOTTIME go on in the rebuilt processes from where they stood.

Hosts were booted at different times.  A deadline that a program has computed on the source's CLOCK_MONOTONIC would be
days away at the target, or long past, and a clock that runs backwards hangs what waits on it.  So the rebuilt tree
enters a time namespace: its clocks are the host's plus an offset.

The offset is fixed by one equation, for each clock: at the moment of capture plus the time that the caller measured
since, the inside clock shows what it showed at the capture plus that time.

A namespace is made only if it is needed: if the tool's own clocks differ from what the processes must see by less than
``TOLERANCE`` forwards, and not at all backwards, they keep the tool's.  To a program that is a scheduling delay.

Source: time_namespaces(7), Linux kernel/time/namespace.c.  Since 5.6; since 6.2 a process enters the namespace at
vfork + exec, before only at fork (:mod:`checkpoint.births`).
"""

from __future__ import annotations

import enum
import functools
import os
import threading
import time
from collections.abc import Callable
from typing import Final

from checkpoint import births
from checkpoint.errors import ClocksNotContinued, NoSuchProcess
from checkpoint.kernel.timers import NS
from checkpoint.state.base import bounded
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["TOLERANCE", "Clocks", "Offsets", "continued", "enter", "offsets_for", "read"]

#: nanoseconds that the clocks may jump forwards without a namespace being made for it
TOLERANCE: Final = 10_000_000
#: nanoseconds; the kernel keeps the sum of clock and offset below half of what a 64-bit ktime_t can hold
_HIGHEST: Final = (1 << 62) - 1


class _Clone(enum.IntFlag):
    """include/uapi/linux/sched.h."""

    NEWTIME = 0x00000080


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocks:
    """What the two clocks showed inside the processes when they were captured, in nanoseconds."""

    monotonic: int
    boottime: int

    def __post_init__(self) -> None:
        bounded("CLOCK_MONOTONIC", self.monotonic, 0, _HIGHEST)
        bounded("CLOCK_BOOTTIME", self.boottime, 0, _HIGHEST)

    def after(self, elapsed: int) -> Clocks:
        """The same clocks, so many nanoseconds later."""
        return Clocks(monotonic=self.monotonic + elapsed, boottime=self.boottime + elapsed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offsets:
    """Offsets of a time namespace against the host's clocks, in nanoseconds; may be negative."""

    monotonic: int
    boottime: int

    @classmethod
    def of(cls, pid: int) -> Offsets:
        """Those of the namespace that the *children* of a process will be in (its own, unless it has unshared it).

        Zero on a kernel without time namespaces.
        """
        try:
            with open(f"/proc/{pid}/timens_offsets", encoding="ascii") as file:
                text = file.read()
        except FileNotFoundError as error:
            if os.path.exists(f"/proc/{pid}"):
                return cls(monotonic=0, boottime=0)
            raise NoSuchProcess("the process does not exist, or has just ended", object=f"pid {pid}") from error
        if not text:
            raise NoSuchProcess("the process has ended", object=f"pid {pid}")  # a zombie
        return cls.parse(text)

    @classmethod
    def parse(cls, text: str) -> Offsets:
        """The lines ``clock seconds nanoseconds`` of timens_offsets."""
        found = {name: int(sec) * NS + int(nsec) for name, sec, nsec in map(str.split, text.splitlines())}
        return cls(monotonic=found["monotonic"], boottime=found["boottime"])

    def format(self) -> str:
        """What is written to timens_offsets. Nanoseconds count upwards, also from a negative second."""
        values = (("monotonic", self.monotonic), ("boottime", self.boottime))
        return "".join("{} {} {}\n".format(name, *divmod(value, NS)) for name, value in values)


@functools.cache
def _own_offsets() -> Offsets:
    """Those of the tool's own namespace. Asked once: after :func:`enter` /proc tells those of the new one."""
    return Offsets.of(os.getpid())


def _own_clocks() -> Clocks:
    monotonic = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    return Clocks(monotonic=monotonic, boottime=time.clock_gettime_ns(time.CLOCK_BOOTTIME))


def read(pid: int) -> Clocks:
    """What the clocks show now inside a process, in whatever time namespace it is."""
    ours = _own_offsets()
    theirs, now = Offsets.of(pid), _own_clocks()
    return Clocks(
        monotonic=now.monotonic + theirs.monotonic - ours.monotonic,
        boottime=now.boottime + theirs.boottime - ours.boottime,
    )


def continued(wanted: Clocks, now: Clocks) -> bool:
    """Whether processes that must see ``wanted`` can keep a clock that shows ``now``: not backwards, and hardly on."""
    ahead = (now.monotonic - wanted.monotonic, now.boottime - wanted.boottime)
    return all(0 <= difference <= TOLERANCE for difference in ahead)


def offsets_for(wanted: Clocks, now: Clocks, own: Offsets) -> Offsets:
    """Offsets with which the clocks show ``wanted`` at the moment when, with the offsets ``own``, they show ``now``."""
    return Offsets(
        monotonic=own.monotonic + wanted.monotonic - now.monotonic,
        boottime=own.boottime + wanted.boottime - now.boottime,
    )


def enter(clocks: Clocks, elapsed: int) -> Offsets | None:
    """Let the processes that are spawned from now on see ``clocks``, as they are ``elapsed`` nanoseconds after them.

    Makes a time namespace for the children of the calling process, once for all trees of one source; the tool itself
    keeps its clocks.  To be called by the main thread, which must also be the one that spawns (a namespace belongs to
    a thread).  Returns the namespace's offsets, or None if none is needed.

    ClocksNotContinued if the kernel refuses.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("the time namespace must be entered by the main thread")
    if elapsed < 0:
        raise ValueError(f"{elapsed} ns cannot have passed")
    own, now = _own_offsets(), _own_clocks()
    wanted = clocks.after(elapsed)
    if continued(wanted, now):
        return None
    offsets = offsets_for(wanted, now, own)
    if not births.threads_go_on():
        births.apart()
    births.run(lambda: _try(_unshare, "no time namespace can be made"))
    births.run(lambda: _try(lambda: _write(offsets), "the offsets of the time namespace are refused"))
    return offsets


def _unshare() -> None:
    syscall(SYS.unshare, _Clone.NEWTIME)


def _write(offsets: Offsets) -> None:
    # of the very thread
    with open(f"/proc/{threading.get_native_id()}/timens_offsets", "w", encoding="ascii") as file:
        file.write(offsets.format())


def _try(step: Callable[[], None], what: str) -> None:
    try:
        step()
    except OSError as error:
        raise ClocksNotContinued(f"{what}: {error.strerror}") from error
