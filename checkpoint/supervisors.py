"""Who outside the tree will act when the tree has left: systemd, other supervisors, a parent that waits.

A supervisor takes the departure for a crash and starts a second copy, or takes down what is left of a service.  So it
is named by ``tcpmig check``, and a move is refused, unless a hook of the user's deals with it (``--unit-hook``).

Source: systemd.service(5) Restart=, KillMode=; supervisord(1), runsv(8), s6-supervise(8).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from checkpoint import procfs, units
from checkpoint.errors import NoSuchProcess, SupervisedElsewhere, UnitMainProcess, UnitRestarts
from checkpoint.state.cgroup import parse_cgroups
from checkpoint.units import Unit, UnitName
from checkpoint.verdict import Status, Verdict
from tcpstate.slotted import dataclass

__all__ = ["Supervised", "parent_supervisor", "supervised", "verdicts"]

_KIND: Final = "supervisor"
_INIT: Final = 1

#: programs that start their children again: the beginning of the name, as the kernel has it (15 bytes) -> what it is
_SUPERVISORS: Final = {
    "supervisord": "supervisor",
    "runsv": "runit",
    "s6-supervise": "s6",
    "supervise-daemo": "OpenRC",
    "supervise": "daemontools",
    "circusd": "circus",
    "PM2 ": "PM2",
    "dinit": "dinit",
    "containerd-shim": "containerd",
    "conmon": "podman or CRI-O",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervised:
    """Processes of a tree that are in one unit of systemd.

    pids  those of the tree
    main  whether one of them is the unit's main process
    """

    unit: Unit
    pids: tuple[int, ...]
    main: bool


def parent_supervisor(comm: str, arguments: Sequence[str]) -> str:
    """What supervisor a process is, by its name and the beginning of its command line; empty if it is none."""
    # scripts: python3 /usr/bin/supervisord
    names = [comm, *(os.path.basename(argument)[:15] for argument in arguments[:2])]
    for name in names:
        for begin, what in _SUPERVISORS.items():
            if name == begin or (begin.endswith(" ") and name.startswith(begin)):
                return what
    return ""


def supervised(members: Iterable[int]) -> list[Supervised]:
    """The services of systemd that the processes are in. A scope only holds what somebody else started."""
    groups: dict[UnitName, list[int]] = {}
    for pid in members:
        try:
            name = units.unit_of(parse_cgroups("\n".join(procfs.read_cgroups(pid))))
        except NoSuchProcess:
            continue
        if name is not None and name.is_service:
            groups.setdefault(name, []).append(pid)
    found = []
    for name, pids in groups.items():
        unit = units.look(name)
        main = unit.main in pids if unit.asked else any(_is_child_of_manager(pid) for pid in pids)
        found.append(Supervised(unit=unit, pids=tuple(pids), main=main))
    return found


def _is_child_of_manager(pid: int) -> bool:
    try:
        parent = procfs.read_stat(pid).ppid
        return parent == _INIT or (parent > 0 and procfs.read_stat(parent).comm == "systemd")
    except NoSuchProcess:
        return False


def verdicts(roots: Sequence[int], members: Iterable[int], *, hook: bool = False) -> list[Verdict]:
    """A verdict on every supervisor; none where there is none.

    hook  the user has a program that deals with it: what would be refused becomes a warning
    """
    members = tuple(members)
    found = [_judge_unit(one) for one in supervised(members)]
    for root in roots:
        found += _judge_parent(root)
    if hook:
        found = [
            replace(v, status=Status.WARN, code="", text=f"{v.text}: left to the unit hook", fix="")
            if v.status is Status.REFUSE
            else v
            for v in found
        ]
    return found


def _judge_unit(one: Supervised) -> Verdict:
    unit, name = one.unit, one.unit.name
    subject = f"pid {one.pids[0]}"
    # what is beside a main process that stays does not make systemd act
    if unit.restarts and (one.main or not unit.main):
        part = "the main process" if one.main else "a process"
        text = f"it is {part} of the systemd unit {name}, which has Restart={unit.restart}"
        return Verdict.refuse(UnitRestarts(text, object=subject), _KIND)
    if one.main:
        known = "" if unit.restart else ", whose settings cannot be read"
        text = f"it is the main process of the systemd unit {name}{known}"
        return Verdict.refuse(UnitMainProcess(text, object=subject), _KIND)
    return Verdict(subject=subject, kind=_KIND, status=Status.WARN, text=f"it leaves the systemd unit {name}")


def _judge_parent(root: int) -> list[Verdict]:
    subject = f"pid {root}"
    try:
        parent = procfs.read_stat(root).ppid
        if parent in (0, _INIT):
            return []
        comm = procfs.read_stat(parent).comm
        with open(f"/proc/{parent}/cmdline", "rb") as file:
            arguments = [os.fsdecode(word) for word in file.read().split(b"\0")]
    except (NoSuchProcess, FileNotFoundError, ProcessLookupError):
        # one of them has just ended: the check of the process itself says so
        return []
    if comm == "systemd":
        return []  # a user's manager: its units are judged by the cgroup
    what = parent_supervisor(comm, arguments)
    if what:
        text = f"its parent is {comm} (pid {parent}), a supervisor ({what})"
        return [Verdict.refuse(SupervisedElsewhere(text, object=subject), _KIND)]
    text = f"its parent {comm} (pid {parent}) will see it end; there, init is its parent"
    return [Verdict(subject=subject, kind=_KIND, status=Status.WARN, text=text)]
