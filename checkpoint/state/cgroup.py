"""The control groups that a process is in.

It enters the groups of the same names at the target, where they exist, and the root group of a hierarchy where not: the
rebuilt tree must not stay in the tool's own group, which may be an ssh session's and end with it.  A session's group of
the same name is another session's here: that is never entered, nor is the tool's own if it is a service's.

Source: Linux Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/cgroups.rst; /proc/PID/cgroup.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Final, Self

from checkpoint.errors import NoSuchProcess
from checkpoint.state.base import State, TaskBuilder, TaskView, register
from tcpstate.slotted import dataclass

__all__ = ["Cgroup", "Cgroups", "Mount", "mounts", "namespace_roots", "parse_cgroups", "read_cgroups"]


_ROOT: Final = "/"
#: systemd's groups for logins and for what `systemd-run --scope` starts: their names say nothing on another host
_SESSION: Final = re.compile(r"(session|run)-.*\.scope")


@dataclass(frozen=True, slots=True)
class Cgroup:
    """One membership. ``hierarchy`` is what tells the hierarchies of a host apart: empty for version 2, else the
    controllers or the ``name=`` of version 1."""

    hierarchy: str
    path: str

    def __post_init__(self) -> None:
        if not self.path.startswith("/") or "\0" in self.path:
            raise ValueError(f"{self.path!r} is not the path of a cgroup")

    @property
    def controllers(self) -> frozenset[str]:
        """The controllers of its hierarchy, or its name; empty for version 2."""
        return frozenset(filter(None, self.hierarchy.split(",")))

    def __str__(self) -> str:
        return f"the cgroup {self.path} ({self.hierarchy or 'version 2'})"

    @property
    def outside(self) -> bool:
        """Whether it lies outside of the cgroup namespace from which it was seen."""
        return ".." in PurePosixPath(self.path).parts

    @property
    def session(self) -> bool:
        """Whether it is a login's, or below that."""
        return any(_SESSION.fullmatch(part) for part in PurePosixPath(self.path).parts)


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a hierarchy can be reached: ``root`` is the group that ``at`` shows."""

    hierarchy: frozenset[str]
    root: str
    at: str

    def directory(self, path: str) -> str | None:
        """The directory of the group ``path``, or None if it is not below this mount."""
        if PurePosixPath(path).is_relative_to(self.root):
            return os.path.join(self.at, PurePosixPath(path).relative_to(self.root))
        return None


@register("cgroups")
@dataclass(frozen=True, slots=True, kw_only=True)
class Cgroups(State):
    """One membership per hierarchy."""

    groups: tuple[Cgroup, ...]

    @classmethod
    def capture(cls, task: TaskView) -> Self:
        return cls(groups=parse_cgroups(read_cgroups(task.pid)))

    def rebuild(self, task: TaskBuilder) -> None:
        task.outside.append(lambda: self._enter(task))

    def _enter(self, task: TaskBuilder) -> None:
        here = _mounted_here()
        wanted = {group.hierarchy: group for group in self.groups}
        for now in parse_cgroups(read_cgroups(task.pid)):
            # A hierarchy that the source did not have: out of the tool's own group all the same.
            group = wanted.pop(now.hierarchy, Cgroup(now.hierarchy, _ROOT))
            if group.session or (group.path == now.path and group.path.endswith(".service")):
                group = Cgroup(now.hierarchy, _ROOT)
            if group.path != now.path:
                _enter(group, now, here, task)
        for group in wanted.values():
            if group.path != _ROOT:
                task.warn(f"{task} was in {group}, of a hierarchy that this host does not have")


def _enter(group: Cgroup, now: Cgroup, here: list[Mount], task: TaskBuilder) -> None:
    mount = next((m for m in here if m.hierarchy == group.controllers), None)
    if mount is None:
        task.warn(f"{task} was in {group} and stays in tcpmig's, {now.path}: the hierarchy is not mounted here")
        return
    directory = None if group.outside else mount.directory(group.path)
    if directory is None or not os.path.isdir(directory):
        task.warn(f"{task} was in {group}, which does not exist here")
        directory = mount.at
    try:
        with open(os.path.join(directory, "cgroup.procs"), "w", encoding="ascii") as file:
            file.write(f"{task.pid}\n")
    except OSError as error:
        task.warn(f"{task} cannot enter the cgroup {directory}: {error.strerror}")


def read_cgroups(pid: int) -> str:
    """/proc/PID/cgroup, as the calling thread's cgroup namespace shows it. NoSuchProcess."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchProcess("the process does not exist, or has just ended", object=f"pid {pid}") from error


def namespace_roots(seen: str, inside: str) -> tuple[Cgroup, ...] | None:
    """Where a cgroup namespace begins, by hierarchy: from the /proc/PID/cgroup of one process in it, read by us and
    from inside. None: that process has left what its namespace shows."""
    roots = []
    own = {group.hierarchy: group.path for group in parse_cgroups(inside)}
    for group in parse_cgroups(seen):
        path = own.get(group.hierarchy, "")
        below = path.rstrip("/")
        if not path.startswith("/") or ".." in PurePosixPath(path).parts or not group.path.endswith(below):
            return None
        roots.append(Cgroup(group.hierarchy, group.path[: len(group.path) - len(below)] or _ROOT))
    return tuple(roots)


def parse_cgroups(text: str) -> tuple[Cgroup, ...]:
    """The lines ``number:controllers:path`` of /proc/PID/cgroup."""
    lines = (line.split(":", 2) for line in text.splitlines())
    return tuple(Cgroup(hierarchy, path) for _, hierarchy, path in lines)


@functools.cache
def _mounted_here() -> list[Mount]:
    """mounts(), read once for all processes of a tree."""
    return mounts()


def mounts(lines: Iterable[str] | None = None) -> list[Mount]:
    """The hierarchies that are mounted in our mount namespace (``lines``: those of a mountinfo, for tests)."""
    if lines is None:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    found = []
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, (kind, _, options) = left.split(" "), right.split(" ", 2)
        if kind == "cgroup2":
            found.append(Mount(frozenset(), fields[3], fields[4]))
        elif kind == "cgroup":
            # the mount's options are the controllers, or the name, among others that are the file system's
            found.append(
                Mount(frozenset(options.split(",")) - {"rw", "ro", "xattr", "release_agent"}, fields[3], fields[4])
            )
    return found
