"""What is kept behind files of /proc/PID: how soon the process is killed when memory runs out, what a core dump has.

Both are written from outside: they need no call inside, and lowering ``oom_score_adj`` takes CAP_SYS_RESOURCE, which
the tool has and the rebuilt process may not.

Source: Linux fs/proc/base.c; Documentation/filesystems/proc.rst, sections 3.1 and 3.4.
"""

from __future__ import annotations

from typing import Final, Self

from checkpoint.errors import NoSuchProcess
from checkpoint.state.base import State, TaskBuilder, TaskView, bounded, register, unsigned
from tcpstate.slotted import dataclass

__all__ = ["CoredumpFilter", "OomScoreAdjustment"]

#: OOM_SCORE_ADJ_MIN and _MAX, include/uapi/linux/oom.h
_OOM_MAX: Final = 1000


def _read(pid: int, name: str) -> str:
    try:
        with open(f"/proc/{pid}/{name}", encoding="ascii") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchProcess("the process does not exist, or has just ended", object=f"pid {pid}") from error


def _write(task: TaskBuilder, name: str, value: str) -> None:
    try:
        with open(f"/proc/{task.pid}/{name}", "w", encoding="ascii") as file:
            file.write(value)
    except OSError as error:
        task.warn(f"{task} cannot be given its {name} {value}: {error.strerror}")


@register("oom score adjustment")
@dataclass(frozen=True, slots=True, kw_only=True)
class OomScoreAdjustment(State):
    """-1000 (never killed) .. 1000 (killed first)."""

    value: int

    def __post_init__(self) -> None:
        bounded("oom_score_adj", self.value, -_OOM_MAX, _OOM_MAX)

    @classmethod
    def capture(cls, task: TaskView) -> Self:
        return cls(value=int(_read(task.pid, "oom_score_adj")))

    def rebuild(self, task: TaskBuilder) -> None:
        task.outside.append(lambda: _write(task, "oom_score_adj", str(self.value)))


@register("coredump filter")
@dataclass(frozen=True, slots=True, kw_only=True)
class CoredumpFilter(State):
    """Which kinds of mappings a core dump has, as bits; ``None`` where the kernel makes no core dumps."""

    bits: int | None

    def __post_init__(self) -> None:
        if self.bits is not None:
            unsigned("coredump_filter", self.bits, 32)

    @classmethod
    def capture(cls, task: TaskView) -> Self:
        # Empty for a process without memory of its own; absent without CONFIG_ELF_CORE.
        try:
            text = _read(task.pid, "coredump_filter")
        except NoSuchProcess:
            return cls(bits=None)
        return cls(bits=int(text, 16) if text else None)

    def rebuild(self, task: TaskBuilder) -> None:
        if self.bits is not None:
            value = f"{self.bits:#x}"
            task.outside.append(lambda: _write(task, "coredump_filter", value))
