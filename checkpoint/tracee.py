"""A tree of processes, stopped.

Stopping: every thread of every process is seized and interrupted, a process before its children, until a whole pass
finds nothing new.  A stopped process cannot fork or clone, so when its own threads have stopped its list of children is
final, but for orphans that come to it if it is a subreaper; the last pass sees those.

No signal is taken away: one that is due before the stop is delivered first.  A process that is stopped by a signal of
its own (state T) stays so when it is let go.

Source: ptrace(2); kernel/ptrace.c, kernel/signal.c.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from checkpoint import arch, offspring, procfs, waiting
from checkpoint.errors import (
    ForeignMode,
    LeaderExited,
    MayNotTrace,
    NoSuchProcess,
    ProcessDied,
    Refused,
    StopTimeout,
    VforkParent,
)
from checkpoint.kernel import ptrace
from checkpoint.kernel.callwatch import CallWatch
from checkpoint.kernel.ptrace import Event, Option
from checkpoint.kernel.rseq import abort_address
from checkpoint.memory import vmflags
from checkpoint.memory.vma import Vma
from checkpoint.procfs import Stat
from checkpoint.refuse import refuse_process, refuse_root, refuse_traced
from checkpoint.telling import begin_again
from checkpoint.thread import Stop, Thread, signal_of, wait_status
from checkpoint.vforked import vfork_child
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS

__all__ = ["Process", "Stop", "Thread", "Tree"]

#: seconds in which a tree must stand still
STOP_TIMEOUT: Final = 5.0
# A queued SIGSTOP is reported as soon as the thread is let go; if a SIGCONT has just removed it, nothing is.
_SWALLOW_TIMEOUT: Final = 0.2
# A thread that did not stop in time does not stop soon; if it does, it is let go.
_LATE_STOP_TIMEOUT: Final = 0.5
_VFORK_PAUSE: Final = 1e-3

#: by tid: instruction and stack pointer, and the call in which we have found it last
_calls: dict[int, tuple[int, int, int]] = {}

_log = logging.getLogger(__name__)


class Process:
    """One stopped process.

    pid          its number in our PID namespace
    threads      leader first
    stat         /proc/PID/stat as of the stop
    stop_signal  the signal that holds it in a stop of its own (state T), 0 if none does
    foreseen     what memory.vmflags.foresee() gave before the stop; ``maps`` goes on from it, and has flags then
    tracked      our own tracking of writes is on, and shows in the flags of its mappings
    watch        looks at its threads before they are stopped; None: nobody does
    """

    def __init__(self, pid: int, watch: CallWatch | None = None) -> None:
        self.pid = pid
        self.watch = watch
        self.foreseen: Mapping[bytes, Vma] = {}
        self.tracked = False
        self.threads: list[Thread] = []
        self.stat: Stat
        self.stop_signal = 0
        self.seccomp_suspended = False
        self._status: dict[str, str] | None = None
        self._fds: dict[str, int] = {}
        self._maps: list[Vma] | None = None
        self._brk: int | None = None
        self._sigstops_queued = False
        self._resend_stop = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.pid}: {len(self.threads)} threads>"

    # -- what is known of it

    @property
    def leader(self) -> Thread:
        """The thread that has the process's number."""
        return self.threads[0]

    def thread(self, tid: int) -> Thread:
        """The thread with that number. KeyError if there is none."""
        for each in self.threads:
            if each.tid == tid:
                return each
        raise KeyError(tid)

    @property
    def inner_pid(self) -> int:
        """Its number in its own PID namespace."""
        return int(self.status["NSpid"].split()[-1])

    def inner_tid(self, thread: Thread) -> int:
        """The number of one of its threads there."""
        if len(self.status["NSpid"].split()) == 1:
            return thread.tid  # it is in our namespace
        return thread.inner_tid

    @property
    def status(self) -> dict[str, str]:
        """/proc/PID/status, read once after the stop."""
        if self._status is None:
            self._status = procfs.read_status(self.pid)
        return self._status

    def _fd(self, name: str, flags: int) -> int:
        if name not in self._fds:
            if name == "pidfd":
                self._fds[name] = os.pidfd_open(self.pid)
            else:
                self._fds[name] = os.open(f"/proc/{self.pid}/{name}", flags | os.O_CLOEXEC)
        return self._fds[name]

    @property
    def mem_fd(self) -> int:
        """Its memory as a file, for reading and writing; writes reach read-only mappings, too."""
        return self._fd("mem", os.O_RDWR)

    @property
    def pagemap_fd(self) -> int:
        """/proc/PID/pagemap, opened."""
        return self._fd("pagemap", os.O_RDONLY)

    @property
    def pidfd(self) -> int:
        """A descriptor of ours that stands for the process."""
        return self._fd("pidfd", 0)

    @property
    def maps(self) -> list[Vma]:
        """Its mappings, read once; :meth:`forget_maps` when they have changed."""
        if self._maps is None:
            self._maps, self._brk = vmflags.mappings(self.pid, self.foreseen, tracked=self.tracked)
        return self._maps

    @property
    def brk(self) -> int | None:
        """Where its heap ended when :attr:`maps` were read; None: only the process itself can tell."""
        return self._brk if self.maps else None

    def forget_maps(self) -> None:
        """The mappings were changed: read them again when they are asked for."""
        self._maps = None

    def read(self, address: int, size: int) -> bytes:
        """Bytes of its memory, all of them. OSError (EIO) where nothing is mapped."""
        parts = []
        while size > 0:
            part = os.pread(self.mem_fd, size, address)
            if not part:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            parts.append(part)
            address += len(part)
            size -= len(part)
        return b"".join(parts)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write its memory, whatever the mapping's protection."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self.mem_fd, view, address)
            address += written
            view = view[written:]

    def close(self) -> None:
        """Close the descriptors. The process stays as it is."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    # -- stop and go

    def seize_and_stop(self, deadline: float) -> None:
        """Seize and stop all its threads. Those that had been seized are in ``threads`` also when this fails."""
        self._await_vfork(deadline)
        passed: set[int] = set()  # threads that ended meanwhile
        while True:
            known = passed.union(thread.tid for thread in self.threads)
            new = [tid for tid in procfs.threads(self.pid) if tid not in known]
            if not new:
                break
            fresh = []
            for tid in new:
                if (thread := self._seize(tid)) is None:
                    passed.add(tid)
                else:
                    self.threads.append(thread)
                    fresh.append(thread)
            for thread in fresh:
                try:
                    thread.await_interrupt(max(deadline - time.monotonic(), 0))
                    self._note(thread)
                except ProcessDied:
                    self.threads.remove(thread)
                    passed.add(thread.tid)
                except StopTimeout as error:
                    raise self._why_not_stopped(thread, error) from error
        if not self.threads:
            raise NoSuchProcess("the process has just ended", object=f"pid {self.pid}")
        if self.threads[0].tid != self.pid:
            raise LeaderExited("its main thread has ended, others run on", object=f"pid {self.pid}")
        self.stat = procfs.read_stat(self.pid)
        self.stop_signal = next((t.stop.signal for t in self.threads if t.stop is not None and t.stop.group), 0)

    def _seize(self, tid: int) -> Thread | None:
        """Seize and interrupt one thread; None if it is ending."""
        thread = Thread(self.pid, tid)
        try:
            self.seccomp_suspended = self._seize_with_seccomp(thread)
            thread.interrupt()
        except ProcessLookupError:
            return None
        except PermissionError as error:
            # also the answer for a thread that has ended but is still listed
            try:
                state = procfs.read_stat(self.pid, tid)
            except NoSuchProcess:
                return None
            if not state.zombie:
                refuse_process(self.pid)
                refuse_traced(self.pid, tid)
                raise MayNotTrace(f"tracing {state.comm} is not allowed", object=thread.name) from error
            return None
        return thread

    def _seize_with_seccomp(self, thread: Thread) -> bool:
        """Seize with seccomp filters suspended, if we may; else without. Whether they are suspended."""
        try:
            thread.seize(Option.SUSPEND_SECCOMP)
        except OSError as error:
            # not allowed to us (no CAP_SYS_ADMIN, a filter of our own), or not known to the kernel
            if error.errno not in (errno.EPERM, errno.EINVAL):
                raise
            thread.seize()
            return False
        return True

    def _await_vfork(self, deadline: float) -> None:
        """Wait until no thread is suspended by vfork. Once seized such a thread could neither be stopped nor let go."""
        while (child := vfork_child(self.pid)) is not None:
            if time.monotonic() > deadline:
                raise VforkParent(f"it waits for its child {child} to call exec", object=f"pid {self.pid}")
            time.sleep(_VFORK_PAUSE)

    def _why_not_stopped(self, thread: Thread, error: StopTimeout) -> Refused | VforkParent | StopTimeout:
        state = procfs.read_stat(self.pid, thread.tid)
        if state.zombie:
            return LeaderExited(f"the main thread of {state.comm} has ended, others run on", object=thread.name)
        if (child := vfork_child(self.pid)) is not None:
            return VforkParent(f"{state.comm} waits for its child {child} to call exec", object=thread.name)
        return StopTimeout(f"{error.message} (state {state.state})", object=thread.name)

    def note(self) -> None:
        """Take down again what the threads have in their registers as the application's own."""
        for thread in self.threads:
            self._note(thread)

    def _note(self, thread: Thread) -> None:
        found = thread.get_registers()
        arch.require_native(found, thread.name)
        hidden = arch.hides_note(found, self.read)
        if hidden is not None:
            _calls[thread.tid] = (found.ip, found.sp, hidden)
            begin_again(thread)
            found = thread.get_registers()
        thread.fleeting = arch.fleeting(thread.tid)
        seen = arch.in_its_call(found, thread.tid, self.read)
        thread.registers = arch.going_on(seen)
        if thread.registers != found:
            # At once: should the tool die now, the thread shall not see the EINTR either.
            thread.set_registers(thread.registers)
        thread.call = self._call(thread.tid, seen)
        thread.until = waiting.end_of(self, thread)
        thread.sigmask = thread.get_sigmask()
        thread.rseq = ptrace.get_rseq(thread.tid)
        if thread.rseq is not None:
            abort = abort_address(thread.rseq.address, found.ip, self.read)
            if abort is not None:
                thread.registers = found.moved(abort)

    def _call(self, tid: int, found: arch.Registers) -> int | None:
        """The system call that a thread stands in. Of one that was stopped in it before the kernel does not tell; we
        know it if it was us, else the code may."""
        place = (found.ip, found.sp)
        call = found.call
        if call == SYS.restart_syscall:
            known = _calls.get(tid)
            if known is not None and known[:2] == place:
                return known[2]
            try:
                call = arch.restarted_call(found, self.read(found.ip - arch.CODE_BEFORE, arch.CODE_BEFORE))
            except OSError:
                call = None  # nothing is mapped before it
        if call is not None:
            _calls[tid] = (*place, call)
        return call

    def queue_sigstops(self) -> None:
        """Queue a SIGSTOP to every thread, so that the process stays stopped should the tool die."""
        self._sigstops_queued = True
        for thread in self.threads:
            syscall(SYS.tgkill, self.pid, thread.tid, signal.SIGSTOP)

    def stop_later(self) -> None:
        """A SIGSTOP from outside was taken away from it while calls were made: it gets another when it is let go."""
        self._resend_stop = True

    def resume(self) -> None:
        """Let all threads run on without us, as if they had never been stopped."""
        if self._resend_stop:
            os.kill(self.pid, signal.SIGSTOP)
        for thread in self.threads:
            try:
                if self._sigstops_queued:
                    self._swallow_sigstops([thread])
                self._let_go(thread)
            except (ProcessDied, ProcessLookupError):
                # killed from outside meanwhile: nothing is left that could be let go
                _log.info("%s ended while it was stopped", thread.name)
            except StopTimeout:
                _log.warning("%s cannot be let go before it leaves the kernel, or tcpmig ends", thread.name)
        self.close()

    def _let_go(self, thread: Thread) -> None:
        if thread.stop is None:
            # seized, and still on its way to its first stop
            thread.interrupt()
            thread.await_interrupt(_LATE_STOP_TIMEOUT)
            with contextlib.suppress(ForeignMode):  # of such it is not known what an EINTR means
                self._note(thread)
        waiting.go_on(self, thread)
        thread.detach()

    def _swallow_sigstops(self, threads: Sequence[Thread]) -> None:
        """Take back the SIGSTOPs of :meth:`queue_sigstops`. Other signals that come first are delivered."""
        # of others a SIGCONT from outside has removed it
        going = [one for one in threads if any(signal_of(info) == signal.SIGSTOP for info in one.pending())]
        for thread in going:
            thread.cont()
        for thread in going:
            self._await_sigstop(thread)

    def _await_sigstop(self, thread: Thread) -> None:
        while True:
            try:
                stop = thread.wait(_SWALLOW_TIMEOUT)
            except StopTimeout:
                # a SIGCONT came in between: the thread runs, as it should, but with us
                thread.interrupt()
                thread.await_interrupt(STOP_TIMEOUT)
                self._note(thread)
                thread.until = None  # what it does now may be another call
                return
            if stop.event == Event.SIGNAL and stop.signal == signal.SIGSTOP:
                return
            thread.cont(stop.signal if stop.event == Event.SIGNAL else 0)

    def kill(self) -> None:
        """End it, and take note of the end: its parent can then wait for it."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            _log.info("pid %d had ended already", self.pid)
        # The leader is reported last, when all others are gone.
        for thread in [*self.threads[1:], self.threads[0]]:
            self.await_end(thread)
        self.close()

    @staticmethod
    def await_end(thread: Thread) -> int | None:
        """Wait for a thread's end; its wait status, None if somebody else has taken that."""
        try:
            while True:
                status = wait_status(thread.tid, STOP_TIMEOUT)
                if not os.WIFSTOPPED(status):
                    return status
        except ProcessDied:
            return None


class Tree:
    """Processes that are stopped together.

    processes  parents before children
    zombies    children of theirs that have ended and were not waited for
    """

    def __init__(self, processes: Iterable[Process] = (), watch: CallWatch | None = None) -> None:
        self.processes: list[Process] = list(processes)
        self.zombies: list[Stat] = []
        self._watch = watch or CallWatch()

    @classmethod
    def stop(cls, roots: Iterable[int], *, timeout: float = STOP_TIMEOUT, watch: CallWatch | None = None) -> Tree:
        """Stop the trees that begin at ``roots``. ``watch`` has just looked at them (waiting.look_at); it is closed at
        the end. None: it is done here.

        If that fails everything runs on: :class:`~checkpoint.errors.Refused` (which, why), StopTimeout, VforkParent.
        """
        roots = list(roots)
        for root in roots:
            refuse_root(root)
        tree = cls(watch=watch or waiting.look_at(roots))
        try:
            tree._stop_all(roots, time.monotonic() + timeout)
        except BaseException:
            tree.resume()
            raise
        return tree

    def _stop_all(self, roots: list[int], deadline: float) -> None:
        seen: set[int] = set()
        children: dict[int, list[int]] = {}
        todo = list(roots)
        while todo:
            for pid in todo:  # grows while it is walked
                if pid in seen:
                    continue
                seen.add(pid)
                if self._stop_one(pid, deadline, required=pid in roots):
                    children[pid] = offspring.children(pid)
                    todo += children[pid]
            # Orphans come only to a process that has descendants.
            children.update((pid, offspring.children(pid)) for pid, known in list(children.items()) if known)
            todo = [child for known in children.values() for child in known if child not in seen]
        self._sort()
        living = {each.pid for each in self.processes}
        self.zombies = [procfs.read_stat(pid) for known in children.values() for pid in known if pid not in living]

    def _stop_one(self, pid: int, deadline: float, *, required: bool) -> bool:
        """Stop one process; whether it is there to be stopped. NoSuchProcess if it is not but ``required``."""
        process = Process(pid, self._watch)
        self.processes.append(process)  # at once, so that it is let go if anything fails
        try:
            if procfs.read_stat(pid).zombie:
                refuse_process(pid)
                raise NoSuchProcess("the process has just ended", object=f"pid {pid}")
            process.seize_and_stop(deadline)
        except NoSuchProcess:
            self.processes.remove(process)
            if required:
                raise
            return False
        return True

    def _sort(self) -> None:
        """Parents first, else in the order found."""
        inside = {each.pid for each in self.processes}
        todo = self.processes
        done, placed = list[Process](), set[int]()
        while todo:
            ready = [each for each in todo if each.stat.ppid not in inside or each.stat.ppid in placed]
            placed.update(each.pid for each in ready)
            done += ready
            todo = [each for each in todo if each.pid not in placed]
        self.processes = done

    def queue_sigstops(self) -> None:
        """Make sure that the death of the tool leaves everything stopped (state T) instead of running.

        To be called when all injected work is done and nothing of it is left, before the first socket is changed: a
        queued SIGSTOP ends the next batch.
        """
        for process in self.processes:
            process.queue_sigstops()

    def resume(self) -> None:
        """Let everything run on without us. Queued SIGSTOPs are taken back first."""
        for process in self.processes:
            process.resume()
        self.processes = []
        self._watch.close()

    def kill(self) -> None:
        """End everything, children first: an init of a PID namespace waits for its descendants, which we hold."""
        for process in reversed(self.processes):
            process.kill()
        self.processes = []
        self._watch.close()
