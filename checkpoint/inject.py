"""System calls made inside a stopped process, so that the death of the tool at any instruction leaves it whole.

The machine code, and the rule that it keeps, is in ``checkpoint/arch``; how threads enter and leave it, in
:mod:`checkpoint.excursion`; the first call of all, in :mod:`checkpoint.boot`.  Here is the order of things:

1. Boot maps memory, and would unmap it again should we die.
2. An engine for each thread, with the thread's own frame, goes into that memory, and behind them the tables.  As soon
   as a second thread may be in there the leader must no longer unmap it when we die: then it stays, and a later tool
   removes it.  A single thread takes it along.
3. Tables run, in all threads at once.
4. All threads but the leader go home.  The leader leaves the memory for boot, unmaps it, and goes home last.  Then the
   vdso's tail is zeroed.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Final, Self

from checkpoint import procfs
from checkpoint.arch import ENGINE_SIZE, ENGINE_STOP, engine_idle, engine_image, engine_position, engine_start
from checkpoint.boot import HEAD_SIZE, Boot, head_bytes
from checkpoint.errors import InjectionRefused, InjectionTimeout, ProcessDied
from checkpoint.excursion import Excursions
from checkpoint.interference import require_no_interference
from checkpoint.kernel.mman import Map, Prot
from checkpoint.kernel.signals import SigInfo
from checkpoint.leftovers import clean
from checkpoint.memory.vma import PAGE
from checkpoint.thread import Thread
from checkpoint.tracee import Process
from tcpstate.kernel.calls import ENTRY_SIZE, CallError, CallTable
from tcpstate.kernel.machine import SYS

__all__ = ["RUN_TIMEOUT", "Injection"]

#: seconds that the calls of one run may take
RUN_TIMEOUT: Final = 60.0
# Memory for tables is only touched where tables are written, so much of it costs nothing; but an address space limit
# may be tight.
_ROOM: Final = 1 << 20
_ROOM_PER_THREAD: Final = 8 << 10
_LEAST_ROOM: Final = 32 << 10

_log = logging.getLogger(__name__)


def _pages(size: int) -> int:
    return size + -size % PAGE


class Injection:
    """Calls inside one stopped process: ``open``, ``run`` as often as needed, ``close``; or as a context manager.

    process              all its threads stand still, and stay so but for our code
    threads              those in which calls will be made, the leader first; None: all
    accept_seccomp_risk  see :class:`~checkpoint.errors.SeccompInTheWay`
    """

    def __init__(
        self, process: Process, threads: Sequence[Thread] | None = None, *, accept_seccomp_risk: bool = False
    ) -> None:
        self.process = process
        self._callers = threads
        self._accept_seccomp_risk = accept_seccomp_risk
        self._excursions = Excursions(process)
        self._boot: Boot | None = None
        self._start = 0  # the engines, one for each thread
        self._head = 0  # behind them the head, then the tables
        self._end = 0
        self._engines: dict[int, int] = {}  # tid -> address
        self._free: list[int] = []  # engines of threads that are gone
        # Threads that stand at their engine's stop with undo calls, by the half of the tables' memory where these are.
        self._armed: dict[int, int] = {}
        self._half = 0

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        """Whether calls can be made."""
        return self._start != 0

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(start, end) of the mappings that are ours, not the application's."""
        return [(self._start, self._end)] if self.is_open else []

    @property
    def foreign(self) -> Mapping[int, bytes]:
        """siginfo_t of signals from elsewhere that stopped our code and count as pending: by tid, 0: of the process.
        :meth:`close` queues them again."""
        return self._excursions.foreign

    @property
    def room(self) -> int:
        """Bytes that a table may have. Tables are placed in the two halves of the memory in turn, so that the undo
        calls of one run stand until the next has begun."""
        half = (self._end - self._head - HEAD_SIZE) // 2
        return half - half % CallTable.ALIGN

    # -- open and close

    def open(self) -> None:
        """Make the process ready for calls.

        What a tool that died has left in it is removed first. Raises InjectionRefused, SeccompInTheWay,
        SyscallDispatch; the process is then as it was.
        """
        if self._boot is not None:
            raise RuntimeError("the injection is open already")
        process = self.process
        clean(process)
        boot = Boot(process, self._excursions)
        callers = process.threads if self._callers is None else self._callers
        require_no_interference(process, boot.address, callers, accept_seccomp_risk=self._accept_seccomp_risk)
        boot.write()
        self._boot = boot
        try:
            count = len(callers)
            self._map(boot, _pages(count * ENGINE_SIZE), max(_ROOM, count * _ROOM_PER_THREAD))
            self.add_threads(callers)
            if count > 1:
                boot.disarm()  # from now on others may be in the memory
        except BaseException:
            self.close()
            raise

    def _map(self, boot: Boot, code: int, room: int, address: int = 0) -> None:
        """Map ``code`` bytes for engines, and memory for tables, less than ``room`` if there is not so much; at
        ``address`` if that is not 0."""
        flags = Map.PRIVATE | Map.ANONYMOUS | Map.NORESERVE | (Map.FIXED_NOREPLACE if address else Map(0))
        while True:
            size = code + _pages(HEAD_SIZE + room)
            try:
                # Never writable and executable at once: security modules and PR_SET_MDWE refuse that.
                start = boot.call(
                    *(SYS.mmap, address, size, Prot.READ | Prot.EXEC, flags, -1, 0),
                    undo=SYS.munmap,
                    label="mapping memory for calls",
                )
                boot.call(
                    *(SYS.mprotect, start + code, size - code, Prot.READ | Prot.WRITE),
                    undo=SYS.munmap,
                    undo_args=(start, size),
                    label="making memory for calls writable",
                )
                break
            except CallError as error:
                if error.errno != errno.ENOMEM or room <= _LEAST_ROOM:
                    raise InjectionRefused(str(error.strerror), object=f"pid {self.process.pid}") from error
                room = max(room // 4, _LEAST_ROOM)
        self._start, self._head, self._end = start, start + code, start + size
        self.process.write(self._head, head_bytes(size))
        boot.write(start, size, self._head)

    def add_threads(self, threads: Iterable[Thread]) -> None:
        """Give each thread an engine."""
        fresh = list(threads)
        # the only one's takes our memory along if we die, which it may not as soon as there is another one
        others = [] if len(self._engines) > 1 else [self.process.thread(tid) for tid in self._engines]
        for thread in fresh:
            engine = self._free.pop() if self._free else self._start + len(self._engines) * ENGINE_SIZE
            if engine + ENGINE_SIZE > self._head:
                raise InjectionRefused("there are more threads than was foreseen", object=thread.name)
            self._engines[thread.tid] = engine
        self._write_engines([*others, *fresh])

    def _write_engines(self, threads: Iterable[Thread]) -> None:
        boot = self._boot
        if boot is None:
            raise RuntimeError("the injection is not open")
        alone = len(self._engines) == 1
        last = (boot.address, self._start, self._end - self._start) if alone else ()
        start, end, images = 0, 0, bytearray()
        for thread in threads:
            at = self._engines[thread.tid]
            if at != end:
                self.process.write(start, images)
                start, images = at, bytearray()
            images += engine_image(self._excursions.frame(thread), *last)
            end = at + ENGINE_SIZE
        self.process.write(start, images)

    def close(self) -> None:
        """Put all threads back and remove all that is ours. Does nothing if it is not open."""
        boot = self._boot
        if boot is None:
            return
        try:
            self._close(boot)
        except (ProcessDied, ProcessLookupError) as error:
            # ESRCH is also the answer for a thread that could not be interrupted. It comes home by itself.
            if procfs.exists(self.process.pid) and not procfs.read_stat(self.process.pid).zombie:
                raise InjectionTimeout("a call does not return", object=f"pid {self.process.pid}") from error
            _log.info("pid %d ended while calls were made in it", self.process.pid)
        finally:
            self._boot = None
            self._start = self._head = self._end = 0
            self._engines.clear()
            self._free.clear()
            self._armed.clear()

    def _close(self, boot: Boot) -> None:
        away, leader = self._excursions.away, self.process.leader
        self._excursions.home(thread for thread in self.process.threads[1:] if thread.tid in away)
        try:
            if self.is_open:
                self._queue_again(boot)
                self._unmap(boot)
        finally:
            if leader.tid in away:
                self._excursions.home([leader])
        boot.remove()

    def _unmap(self, boot: Boot) -> None:
        boot.call(SYS.munmap, self._start, self._end - self._start, label="unmapping the memory for calls")

    def _queue_again(self, boot: Boot) -> None:
        """Queue the stop signals that came from elsewhere, by calls that stop with another signal."""
        excursions = self._excursions
        if not excursions.foreign:
            return
        excursions.use_another_signal()
        boot.write(self._start, self._end - self._start, self._head)
        self._write_engines(thread for thread in self.process.threads if thread.tid in self._engines)
        table = CallTable()
        pid = self.process.inner_pid
        for tid, info in excursions.foreign.items():
            number, data = SigInfo.unpack(info).signal, table.put(info)
            if tid:
                inner = self.process.inner_tid(self.process.thread(tid))
                table.call(SYS.rt_tgsigqueueinfo, pid, inner, number, data, label="queueing a signal again")
            else:
                table.call(SYS.rt_sigqueueinfo, pid, number, data, label="queueing a signal again")
        excursions.foreign.clear()
        # Only the leader may queue a signal in the name of another (kernel/signal.c, do_rt_sigqueueinfo).
        self.run({self.process.leader.tid: table})

    # -- run

    def run(self, tables: Mapping[int, CallTable], *, timeout: float = RUN_TIMEOUT) -> None:
        """Run a table in each of the given threads, all at once, and load the results into the tables.

        tables   by tid, as we see it
        timeout  seconds for all of it
        The first failure, in the order given, is raised when all have ended: CallError, InjectionTimeout,
        EngineFault, ProcessDied.

        Should the tool die meanwhile, every thread finishes its table all the same, and then makes its ``undo`` calls.
        Those stand until the next run begins: a thread that has a table in it changes from the old undo calls to the
        new ones in one step, the others forget theirs just before. So what a thread has opened it should close itself,
        by a table without undo calls.
        """
        if not self.is_open:
            raise RuntimeError("the injection is not open")
        deadline = time.monotonic() + timeout
        group: dict[int, CallTable] = {}
        used = 0
        for tid, table in tables.items():
            size = table.size + -table.size % table.ALIGN
            if used + size > self.room and group:
                self._run_group(group, deadline)
                group, used = {}, 0
            if size > self.room:
                raise InjectionRefused(
                    f"a table of calls needs {size} bytes, there are {self.room}", object=f"pid {self.process.pid}"
                )
            group[tid] = table
            used += size
        if group:
            self._run_group(group, deadline)

    def _run_group(self, tables: Mapping[int, CallTable], deadline: float) -> None:
        base = self._next_half(tables)
        images = bytearray()
        running: list[tuple[Thread, CallTable, int, int]] = []
        threads = {thread.tid: thread for thread in self.process.threads} if len(tables) > 1 else {}
        for tid, table in tables.items():
            here = base + len(images)
            images += table.image(here)
            thread = threads[tid] if threads else self.process.thread(tid)
            running.append((thread, table, here, base + len(images) - here))
            images += bytes(-len(images) % table.ALIGN)
        self.process.write(base, images)
        for thread, table, here, _ in running:
            self._start_table(thread, table, here)
        failure: Exception | None = None
        for thread, table, here, size in running:
            try:
                self._finish(thread, table, here, size, deadline)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _next_half(self, takers: Iterable[int]) -> int:
        """Where the next tables go. Undo calls that stand there, or that no new ones will replace, are forgotten."""
        self._half ^= 1
        takers = set(takers)
        for tid, half in list(self._armed.items()):
            if half == self._half or tid not in takers:
                thread = self.process.thread(tid)
                thread.set_registers(engine_idle(thread.registers, self._engines[tid]))
                del self._armed[tid]
        return self._head + HEAD_SIZE + self._half * self.room

    def _start_table(self, thread: Thread, table: CallTable, here: int) -> None:
        first, end = undo = table.undo_entries(here)
        start = engine_start(thread.registers, self._engines[thread.tid], table.entries(here), undo)
        self._excursions.start(thread, start)
        if end > first:
            self._armed[thread.tid] = self._half
        else:
            self._armed.pop(thread.tid, None)

    def send_off(self, thread: Thread, table: CallTable) -> None:
        """Run a table from which the thread does not come back, since it ends its process."""
        base = self._next_half([thread.tid])
        self.process.write(base, table.image(base))
        self._start_table(thread, table, base)

    def _finish(self, thread: Thread, table: CallTable, here: int, size: int, deadline: float) -> None:
        stop = self._engines[thread.tid] + ENGINE_STOP
        registers = self._excursions.finish(thread, stop, max(deadline - time.monotonic(), 0))
        done = (engine_position(registers) - table.entries(here)[0]) // ENTRY_SIZE
        if done < len(table) or table.asked:
            table.load(self.process.read(here, size), done)
