"""What a kind of state is: captured from a stopped task, carried as a record, rebuilt in a new one.

A kind is a frozen dataclass of the family :class:`State`::

    @register("umask")
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Umask(State):
        value: int

        @classmethod
        def capture(cls, task: TaskView) -> Capture[Self]:
            old = task.calls.call(SYS.umask, 0)
            task.calls.call(SYS.umask, old)
            yield                               # the calls of all kinds and all threads are made here, in one run
            return cls(value=old.value)

        def rebuild(self, task: TaskBuilder) -> None:
            task.calls.call(SYS.umask, self.value)

``capture`` may also be a plain function, if it needs no call inside the task.  What only the tool can set from outside
goes to ``task.outside``.  A field's range is checked in ``__post_init__``: records come from files and wires.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import field
from functools import cached_property
from typing import TYPE_CHECKING, Self, TypeVar

from checkpoint import procfs
from checkpoint.kernel.kcmp import KcmpType, Known
from checkpoint.kernel.sched import online_cpus
from checkpoint.kernel.signals import SigInfo
from tcpstate import trusted
from tcpstate.codec import family, kind_of, member
from tcpstate.kernel.calls import CallTable, Result
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint import tracee
    from checkpoint.namespaces.users import Users

__all__ = ["Capture", "ProcessView", "State", "TaskBuilder", "TaskView", "bounded", "kind_of", "register", "unsigned"]

S = TypeVar("S", bound="State")
T = TypeVar("T")

#: what a ``capture`` that makes calls inside the task is: it queues them, yields once, and returns the state
Capture = Generator[None, None, T]


@family
@dataclass(frozen=True, slots=True, kw_only=True)
class State(abc.ABC):
    """One kind of kernel state of one process or thread."""

    @classmethod
    @abc.abstractmethod
    def capture(cls, task: TaskView) -> Capture[Self] | Self:
        """Read the state of a stopped task."""

    @abc.abstractmethod
    def rebuild(self, task: TaskBuilder) -> None:
        """Queue what gives ``task`` this state."""

    def rebuild_privileged(self, task: TaskBuilder) -> None:  # noqa: B027 - most kinds have nothing to do here
        """Queue what must be done before the credentials, though this kind's place in the order is after them."""

    def stands(self, task: TaskBuilder) -> bool:
        """Whether a thread that was just born has this state already; False if that is not looked at."""
        return False


def register(kind: str) -> Callable[[type[S]], type[S]]:
    """Class decorator: the state is written in records under the name ``kind``."""
    return member(State, kind)


class ProcessView:
    """A stopped process whose state is being captured: what its threads' captures share.

    first  the table of the first thread, if others have calls in it already
    """

    def __init__(
        self,
        process: tracee.Process,
        first: CallTable | None = None,
        asked: Sequence[tracee.Thread] | None = None,
    ) -> None:
        self.pid = process.pid
        self.process = process
        self.tasks = [TaskView(self, thread) for thread in (process.threads if asked is None else asked)]
        #: the other threads; known when the calls have been made
        self.silent: Sequence[TaskView] = ()
        if first is not None:
            self.tasks[0].calls = first
        #: (start, end) of the memory that was mapped for the calls
        self.scratch: Sequence[tuple[int, int]] = ()
        #: signals that the injection keeps back, by tid, 0: of the process; known when the calls have been made
        self.foreign: Mapping[int, bytes] = {}
        #: what each thread's seccomp filters are, for the others to compare
        self.seccomp: dict[int, object] = {}
        #: who has which directories, among the threads that were captured
        self.directories = Known(KcmpType.FS)

    @property
    def status(self) -> dict[str, str]:
        """/proc/PID/status: the first thread's has all that is the process's."""
        return self.tasks[0].status

    @cached_property
    def online(self) -> frozenset[int]:
        """The CPUs of this host that are online."""
        return online_cpus()

    def inner_tid(self, tid: int) -> int:
        """A thread's number in its own PID namespace, which is the one that a record has."""
        return next((task.inner_tid for task in self.tasks if task.tid == tid), tid)

    @cached_property
    def pending(self) -> list[bytes]:
        """siginfo of the signals that are pending for the process as a whole; to be read after the calls."""
        return self.tasks[0].thread.pending(shared=True) + self.kept_back(0)

    def kept_back(self, tid: int) -> list[bytes]:
        """siginfo of a signal that stopped the injected code, and so is in no queue; of a thread, 0: of the process."""
        return [self.foreign[tid]] if tid in self.foreign else []

    def timer_pending(self, timer: int) -> bool:
        """Whether a signal of this POSIX timer waits for delivery, anywhere in the process."""
        queues = [self.pending, *(task.pending for task in (*self.tasks, *self.silent))]
        return any(SigInfo.unpack(info).timer == timer for queue in queues for info in queue)


class TaskView:
    """A stopped thread whose state is being captured, or the process that it leads.

    calls   the table that is run in this thread
    thread  the same thread as ptrace sees it
    """

    def __init__(self, view: ProcessView, thread: tracee.Thread) -> None:
        self.view = view
        self.pid = view.pid
        self.tid = thread.tid
        self.thread = thread
        self.calls = CallTable()
        #: signals that wait for it, bit n-1 for signal n; 0: none does, and nothing is read of them
        self.has_pending = -1

    @property
    def process(self) -> tracee.Process:
        """The process that the thread belongs to."""
        return self.view.process

    @property
    def leader(self) -> bool:
        """Whether this is the first thread of its process."""
        return self.tid == self.pid

    @cached_property
    def status(self) -> dict[str, str]:
        """/proc/PID/task/TID/status, read once: before the calls are made."""
        return procfs.read_status(self.pid, self.tid)

    @property
    def inner_tid(self) -> int:
        """Its number in its own PID namespace."""
        return int(self.status["NSpid"].split()[-1])

    @cached_property
    def pending(self) -> list[bytes]:
        """siginfo of the signals that are pending for this thread alone; to be read after the calls."""
        return self.thread.pending() + self.view.kept_back(self.tid) if self.has_pending else []

    def __str__(self) -> str:
        return f"pid {self.pid}" if self.leader else f"pid {self.pid} thread {self.tid}"


@dataclass(slots=True)
class TaskBuilder:
    """A new thread that is being given its state, or the process that it leads.

    calls       the table that will be run in this thread
    warn        told, in one sentence, of whatever will differ from the original
    elapsed     nanoseconds since the capture, as measured by the caller; timers are that much nearer
    outside     done by the tool after the calls have been made, in order
    birth       /proc/PID/status of the new process as it was born, for its credentials; read if it is not given
    path        maps a path of the source to one here
    placed      the process's directories are another's, and right
    users       the user namespace that it is in; None: the tool's
    """

    pid: int
    tid: int
    warn: Callable[[str], None]
    elapsed: int = 0
    calls: CallTable = field(default_factory=CallTable)
    outside: list[Callable[[], None]] = field(default_factory=list)
    birth: dict[str, str] = field(default_factory=dict)
    path: Callable[[str], str] = lambda path: path
    placed: bool = False
    users: Users | None = None

    @property
    def leader(self) -> bool:
        """Whether this is the first thread of its process."""
        return self.tid == self.pid

    def of(self, tid: int) -> TaskBuilder:
        """That of one of its threads."""
        return _builder(
            *(self.pid, tid, self.warn, self.elapsed, CallTable(), [], self.birth, self.path, self.placed, self.users)
        )

    @property
    def child_of_tool(self) -> bool:
        """Whether its parent is the tool: that of the original was outside of the tree."""
        return procfs.read_stat(self.pid).ppid == os.getpid()

    def born(self) -> dict[str, str]:
        """/proc/PID/status of the process as it was born."""
        if not self.birth:
            self.birth.update(procfs.read_status(self.pid))
        return self.birth

    def warn_unless(self, result: Result, text: str) -> None:
        """Once the calls have been made: tell that ``text`` happened unless this one, which ignores errors, worked."""

        def check() -> None:
            if not result.ok:
                self.warn(f"{self} {text}: {os.strerror(-result.value)}")

        self.outside.append(check)

    def run_outside(self) -> None:
        """Do what is to be done from outside, once the calls have been made."""
        for work in self.outside:
            work()
        self.outside.clear()

    def __str__(self) -> str:
        return f"pid {self.pid}" if self.leader else f"pid {self.pid} thread {self.tid}"


_builder = trusted.maker(
    *(TaskBuilder, "pid", "tid", "warn", "elapsed", "calls", "outside", "birth", "path", "placed", "users")
)


def bounded(name: str, value: int, low: int, high: int) -> None:
    """ValueError unless ``low <= value <= high``: for ``__post_init__``."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, not within {low} .. {high}")


def unsigned(name: str, value: int, bits: int = 64) -> None:
    """ValueError unless the value fits into so many bits."""
    bounded(name, value, 0, (1 << bits) - 1)
