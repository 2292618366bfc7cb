"""Every module that captures and rebuilds something, and how it is made to do nothing.

The names are those of the tables: ``files/KIND`` for the kinds of open files (checkpoint/files/kinds.py),
``state/KIND`` for the kinds of state (checkpoint/state/table.py), ``memory/..`` for what a mapping has, ``aspect/..``
for what open files have whatever their kind, ``namespaces/..``.  A kind that is added to a table is here by itself.

A kind of file that does nothing gives an open /dev/null; a kind of state queues no call.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
from collections.abc import Callable
from typing import Any

from checkpoint import tree, waiting
from checkpoint.files import corked, install, kinds, peercred, rebuild, regular
from checkpoint.files import table as files_table
from checkpoint.files.base import OpenFile, kind_name
from checkpoint.ipc.base import SystemV
from checkpoint.ipc.table import KINDS as IPC_KINDS
from checkpoint.kernel.mman import PrSetVma
from checkpoint.memory import aio, layout
from checkpoint.memory.pages import PageWriter
from checkpoint.namespaces import memoryfs, spaces
from checkpoint.state import pending, registers, table
from checkpoint.state.base import State, kind_of
from tcpstate.kernel.prctl import Pr, Speculation, SpeculationState

__all__ = ["apply", "beyond_this_machine", "modules"]

Switch = Callable[[], None]


def _nothing(*_: Any, **__: Any) -> None:
    """In place of what does something."""


def _file(kind: type[OpenFile]) -> Switch:
    def switch() -> None:
        def rebuilt(self: OpenFile, host: Any) -> int:
            return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)

        kind.rebuild = rebuilt  # type: ignore[method-assign]
        for step in ("complete", "late", "release"):
            setattr(kind, step, _nothing)

    return switch


def _state(kind: type[State]) -> Switch:
    def switch() -> None:
        kind.rebuild = _nothing  # type: ignore[method-assign]
        kind.rebuild_privileged = _nothing  # type: ignore[method-assign]
        if kind.__name__ == "Registers":
            registers.install = _nothing
        if kind.__name__.startswith("Pending"):
            pending.late = lambda signals: []

    return switch


def _ipc(kind: type[SystemV]) -> Switch:
    """Nothing is made."""

    def switch() -> None:
        kind.create = lambda self: True  # type: ignore[method-assign]
        kind.fill = _nothing  # type: ignore[method-assign]
        kind.used = _nothing  # type: ignore[method-assign]

    return switch


def _dashed(name: str) -> str:
    return name.replace(" ", "-")


def _patch(owner: Any, name: str, value: Any = _nothing) -> Switch:
    return lambda: setattr(owner, name, value)


def _replaced(mapping: Any, **changes: Any) -> Any:
    return dataclasses.replace(mapping, **changes)


def _layout(change: Callable[[Any], Any]) -> Switch:
    """Layouts are built as ``change`` makes them."""

    def switch() -> None:
        place, fields = layout._place, layout._memory_fields

        def placed(one: Any, *rest: Any) -> Any:
            return place(change(one), *rest)

        layout._place = placed
        layout._memory_fields = lambda one, *rest: fields(change(one), *rest)

    return switch


def _without_flag(flag: str) -> Switch:
    def change(one: Any) -> Any:
        changes: dict[str, Any] = {"huge": 0} if flag == "ht" else {}
        mappings = tuple(_replaced(m, flags=tuple(f for f in m.flags if f != flag), **changes) for m in one.mappings)
        return _replaced(one, mappings=mappings)

    return _layout(change)


def _no_names(one: Any) -> Any:
    named = (_replaced(m, name="") if m.name.startswith("[anon") else m for m in one.mappings)
    return _replaced(one, mappings=tuple(named))


def _memory() -> dict[str, Switch]:
    found = {f"memory/{flag}": _without_flag(flag) for flag in sorted(layout.KEPT_FLAGS)}
    return found | {
        "memory/guards": _layout(lambda one: _replaced(one, guards=())),
        "memory/names": _layout(_no_names),
        "memory/rings": _patch(aio, "rebuild"),
        "memory/fields": _patch(layout, "_memory_fields"),
        "memory/pages": _patch(PageWriter, "write", lambda self, run: 0),
    }


def _no_cgroup_namespace() -> None:
    enter = spaces.Spaces.enter

    def entered(self: spaces.Spaces, *rest: Any) -> None:
        enter(dataclasses.replace(self, cgroups=None), *rest)

    spaces.Spaces.enter = entered  # type: ignore[method-assign]


def _namespaces() -> dict[str, Switch]:
    return {
        "namespaces/uts": _patch(spaces.Uts, "enter"),
        "namespaces/ipc": _patch(spaces.IpcSettings, "give"),
        "namespaces/mounts": _patch(spaces.Mounts, "enter"),
        "namespaces/users": _patch(spaces.Spaces, "user_space", lambda self: None),
        "namespaces/memory": _patch(memoryfs.Folder, "write"),
        "namespaces/cgroups": _no_cgroup_namespace,
    }


def _position() -> None:
    rebuild.Rebuilder.seek = _nothing  # type: ignore[method-assign]
    regular._seek = _nothing


def _plain_file() -> None:
    """Everything that runs has its program open: a regular file is opened, but and nothing more."""

    def rebuilt(self: regular.RegularFile, host: Any) -> int:
        return os.open(host.path(self.path), (os.O_RDWR if self.access.writes else os.O_RDONLY) | os.O_CLOEXEC)

    regular.RegularFile.rebuild = rebuilt  # type: ignore[method-assign]


def _no_posix(self: Any) -> dict[int, list[Any]]:
    return {}


def _aspects() -> dict[str, Switch]:
    return {
        "aspect/peer-credentials": _patch(peercred.Actors, "_stub", lambda self, who, holder: None),
        "aspect/owner": _patch(rebuild.Rebuilder, "_own"),
        "aspect/locks": _patch(rebuild.Locks, "take"),
        "aspect/record-locks": _patch(files_table.FileTable, "_posix_locks", _no_posix),
        "aspect/epoll-entries": _patch(install.Installation, "_control"),
        "aspect/position": _position,
        "aspect/sharing": _patch(tree, "_sharing", lambda *_: {}),
        "aspect/corked": _patch(corked, "begin_again"),
        "aspect/waits": _patch(waiting, "go_on"),
    }


def modules() -> dict[str, Switch]:
    """Name -> what makes it do nothing, in this process, from now on."""
    refusing = ("unsupported",)
    files = {
        f"files/{_dashed(kind_name(kind))}": _file(kind) for kind in kinds.KINDS if kind_name(kind) not in refusing
    }
    states = {f"state/{_dashed(kind_of(kind))}": _state(kind) for kind in (*table.PROCESS_STATES, *table.THREAD_STATES)}
    files["files/file"] = _plain_file
    objects = {f"ipc/{_dashed(kind_of(kind))}": _ipc(kind) for kind in IPC_KINDS}
    return files | states | objects | _memory() | _aspects() | _namespaces()


def beyond_this_machine() -> set[str]:
    """Modules whose loss nothing can show here, since the kernel or the CPU has nothing of theirs."""
    found = set()
    libc = ctypes.CDLL(None)
    # an empty name for no memory: any kernel that has names takes it
    if libc.prctl(PrSetVma.OPTION, PrSetVma.ANON_NAME, 0, 0, 0):
        found.add("memory/names")
    told = [libc.prctl(Pr.GET_SPECULATION_CTRL, which, 0, 0, 0) for which in Speculation]
    with open("/proc/cpuinfo", encoding="ascii") as file:
        if "amx_tile" not in file.read():
            found.add("state/large-registers")
    if not any(value > 0 and value & SpeculationState.PRCTL for value in told):
        found.add("state/speculation-controls")
    return found


def apply(names: list[str]) -> None:
    """Make these do nothing. KeyError for a name that is not there."""
    known = modules()
    for name in names:
        known[name]()
