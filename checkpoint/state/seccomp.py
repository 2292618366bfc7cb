"""seccomp: the mode and the filters of a thread.

Rebuilt after the credentials.  A filter that was installed with privilege, by a thread that has since given up
CAP_SYS_ADMIN and never set no_new_privs (as container engines do), can only be installed before them.  Either way calls
are still made in the thread afterwards: the engine holds rebuilt threads under PTRACE_O_SUSPEND_SECCOMP until they are
released.

If all threads have the same filters, the first one installs them for all (TSYNC): threads that share the very same
filters can add to them together later.

Source: Linux kernel/seccomp.c; PTRACE_SECCOMP_GET_FILTER, PTRACE_SECCOMP_GET_METADATA.
"""

from __future__ import annotations

from typing import Final, Self

from checkpoint.errors import SeccompSupervised
from checkpoint.kernel import ptrace
from checkpoint.kernel.seccomp import (
    INSTRUCTION_SIZE,
    MAX_INSTRUCTIONS,
    Action,
    FilterFlag,
    Mode,
    SetMode,
    actions,
    program,
)
from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, register
from tcpstate.kernel.capability import Cap
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["Filter", "Seccomp"]

#: the kernel bounds the instructions of all filters of a thread to 32768, MAX_INSNS_PER_PATH
_MOST_FILTERS: Final = 32768


@dataclass(frozen=True, slots=True)
class Filter:
    """One filter: classic BPF instructions as the program gave them, and SECCOMP_FILTER_FLAG_LOG if it had it."""

    code: bytes
    flags: int

    def __post_init__(self) -> None:
        if not self.code or len(self.code) % INSTRUCTION_SIZE or len(self.code) > MAX_INSTRUCTIONS * INSTRUCTION_SIZE:
            raise ValueError(f"a filter of {len(self.code)} bytes")
        if self.flags & ~FilterFlag.LOG:
            raise ValueError(f"filter flags {self.flags:#x}")


def _queue(filters: tuple[Filter, ...], flags: int, task: TaskBuilder) -> None:
    calls = task.calls
    for each in filters:
        code = calls.put(each.code)
        prog = calls.put(program(len(each.code) // INSTRUCTION_SIZE))
        calls.pointer(prog + 8, code)
        calls.call(SYS.seccomp, SetMode.FILTER, each.flags | flags, prog, label="install a seccomp filter")


@register("seccomp")
@dataclass(frozen=True, slots=True, kw_only=True)
class Seccomp(State):
    """The thread's filters, oldest first.

    privileged  they were installed, or could only have been installed, with CAP_SYS_ADMIN that the thread now lacks
    shared      all threads of the process have these filters
    """

    mode: Mode
    filters: tuple[Filter, ...]
    privileged: bool
    shared: bool

    def __post_init__(self) -> None:
        if bool(self.filters) != (self.mode is Mode.FILTER):
            raise ValueError(f"seccomp mode {self.mode.name} with {len(self.filters)} filters")
        if len(self.filters) > _MOST_FILTERS:
            raise ValueError(f"{len(self.filters)} seccomp filters")

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        mode = Mode(int(task.status["Seccomp"]))
        filters = _read(task) if mode is Mode.FILTER else ()
        no_new_privs = task.status["NoNewPrivs"] == "1"
        admin = int(task.status["CapEff"], 16) >> Cap.SYS_ADMIN & 1
        task.view.seccomp[task.tid] = (filters, no_new_privs)
        yield
        all_filters = task.view.seccomp.values()
        return cls(
            mode=mode,
            filters=filters,
            privileged=bool(filters) and not no_new_privs and not admin,
            shared=bool(filters) and len(all_filters) > 1 and len(set(all_filters)) == 1,
        )

    def rebuild_privileged(self, task: TaskBuilder) -> None:
        if self.privileged:
            self._install(task)

    def rebuild(self, task: TaskBuilder) -> None:
        if not self.privileged:
            self._install(task)

    def _install(self, task: TaskBuilder) -> None:
        if self.mode is Mode.STRICT:
            task.calls.call(SYS.seccomp, SetMode.STRICT, 0, 0, label="enter seccomp's strict mode")
        elif not self.shared:
            _queue(self.filters, 0, task)
        elif task.leader:
            _queue(self.filters, FilterFlag.TSYNC, task)


def _read(task: TaskView) -> tuple[Filter, ...]:
    found: list[Filter] = []
    while (code := ptrace.seccomp_filter(task.tid, len(found))) is not None:
        if Action.USER_NOTIF in actions(code):
            raise SeccompSupervised(
                "its system calls are answered by another process (seccomp user notification)", object=str(task)
            )
        found.append(Filter(code, ptrace.seccomp_flags(task.tid, len(found))))
    return tuple(found)
