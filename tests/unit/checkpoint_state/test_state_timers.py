"""Timers and pending signals: set up in one process by other means, captured, rebuilt, captured again."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import struct
import threading

import pytest
from own_task import OwnThread, capture, in_child, own_view, rebuild, round_trip

from checkpoint.errors import TimerOutOfReach
from checkpoint.kernel.signals import SIGINFO_SIZE, SiCode, siginfo, timer_siginfo
from checkpoint.kernel.timers import Itimer
from checkpoint.state import posix_timers
from checkpoint.state.itimers import IntervalTimer, IntervalTimers
from checkpoint.state.pending import PendingForProcess, PendingForThread, late
from checkpoint.state.posix_timers import PosixTimers
from tcpstate.kernel.batch import libc
from tcpstate.kernel.machine import SYS

MS = 1_000_000


def _syscall(nr: int, *args: object) -> None:
    assert libc.syscall(ctypes.c_long(nr), *args) >= 0


def test_interval_timers():
    def prepare() -> None:
        signal.setitimer(signal.ITIMER_REAL, 1000, 7)
        signal.setitimer(signal.ITIMER_PROF, 500)

    first, second = round_trip(prepare, IntervalTimers)
    for state in (first, second):
        real, prof = state.timers
        assert (real.which, prof.which) == (Itimer.REAL, Itimer.PROF)
        assert 990_000 * MS < real.value <= 1_000_000 * MS
        assert (real.interval, prof.interval) == (7_000 * MS, 0)


def test_interval_timers_are_nearer_by_the_time_that_has_passed():
    timer = IntervalTimer(which=Itimer.REAL, value=1_000_000 * MS, interval=0)
    prof = IntervalTimer(which=Itimer.PROF, value=1_000_000 * MS, interval=0)
    state = IntervalTimers(timers=(timer, prof))
    real, cpu = in_child(lambda: (rebuild(state, elapsed=400_000 * MS), capture(IntervalTimers).timers)[1])
    assert 590_000 * MS < real.value <= 600_000 * MS
    # CPU time has not passed (and is counted in ticks).
    assert 990_000 * MS < cpu.value <= 1_000_010 * MS


def test_an_alarm_that_was_due_meanwhile_is_delivered():
    def work() -> tuple[bool, tuple[IntervalTimer, ...]]:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        timer = IntervalTimer(which=Itimer.REAL, value=1_000 * MS, interval=1_000_000 * MS)
        rebuild(IntervalTimers(timers=(timer,)), elapsed=5_000 * MS)
        return signal.SIGALRM in signal.sigpending(), capture(IntervalTimers).timers

    pending, (timer,) = in_child(work)
    assert pending
    # in phase: the next one comes 1000 s after the one that was due 4 s ago
    assert 990_000 * MS < timer.value <= 996_000 * MS


def test_an_alarm_that_expires_between_its_reading_and_that_of_the_signals_counts_once():
    def work() -> tuple[IntervalTimer, ...]:
        signal.setitimer(signal.ITIMER_REAL, 1000)
        thread = OwnThread(os.getpid())
        thread.queued[True].append(siginfo(signal.SIGALRM, SiCode.KERNEL))
        return capture(IntervalTimers, own_view(thread)).timers

    assert in_child(work) == ()


def _timer_create(clock: int, sig: int, notify: int, tid: int, value: int) -> int:
    event = ctypes.create_string_buffer(struct.pack("<QiiI44x", value, sig, notify, tid), 64)
    timer = ctypes.c_int()
    _syscall(SYS.timer_create, ctypes.c_long(clock), event, ctypes.byref(timer))
    return timer.value


def _timer_settime(timer: int, value: int, interval: int) -> None:
    _syscall(SYS.timer_settime, ctypes.c_long(timer), 0, struct.pack("<4q", interval, 0, value, 0), None)


def _posix_timers() -> None:
    gone = _timer_create(1, 40, 0, 0, 1)
    _timer_settime(_timer_create(1, 41, 4, os.getpid(), 2), 1000, 30)
    none = _timer_create(7, 0, 1, 0, 0)
    cpu = _timer_create(2, 42, 0, 0, 0xFFFF_FFFF_FFFF_FFF0)
    _timer_settime(cpu, 500, 0)
    _syscall(SYS.timer_delete, ctypes.c_long(gone))
    assert none < cpu


def _without_values(state: PosixTimers) -> list[tuple[int, ...]]:
    # a thread's number differs between the two processes of the test
    return [(t.id, t.clock, t.notify, bool(t.thread), t.signal, t.data, t.interval, t.overrun) for t in state.timers]


@pytest.mark.parametrize("wanted_ids", [True, False])
def test_posix_timers(wanted_ids: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not wanted_ids:
        monkeypatch.setattr(posix_timers, "creates_wanted_ids", lambda: False)
    elif not posix_timers.creates_wanted_ids():
        pytest.fail("this kernel cannot create timers under wanted numbers: run the other parameter only")
    first = in_child(lambda: (_posix_timers(), capture(PosixTimers))[1])

    def again() -> PosixTimers:
        own = [dataclasses.replace(t, thread=os.getpid() if t.thread else 0) for t in first.timers]
        rebuild(PosixTimers(timers=tuple(own)))
        return capture(PosixTimers)

    second = in_child(again)
    assert _without_values(first) == _without_values(second)
    for thread, none, cpu in (first.timers, second.timers):
        assert 990_000 * MS < thread.value <= 1_000_000 * MS
        assert none.value == 0
        assert 490_000 * MS < cpu.value <= 500_000 * MS
        assert cpu.data == 0xFFFF_FFFF_FFFF_FFF0
    assert [t.id for t in first.timers] == [1, 2, 3]


def test_a_posix_timer_that_was_due_meanwhile_sends_one_signal_and_keeps_its_phase():
    def work() -> tuple[bool, bool, int]:
        _timer_settime(_timer_create(1, 40, 0, 0, 5), 10, 100)
        state = capture(PosixTimers)
        _syscall(SYS.timer_delete, ctypes.c_long(0))
        signal.pthread_sigmask(signal.SIG_BLOCK, [40])
        rebuild(state, elapsed=250_000 * MS)
        info = signal.sigtimedwait([40], 0)
        assert info is not None
        again = signal.sigtimedwait([40], 0)
        return info.si_code == SiCode.TIMER, again is None, capture(PosixTimers).timers[0].value

    from_timer, once, left = in_child(work)
    assert from_timer
    assert once
    # due at 10, 110, 210, and next at 310: 60 s after the 250 that have passed
    assert 30_000 * MS < left <= 60_000 * MS


def test_a_posix_timer_whose_signal_is_pending_has_expired():
    def work() -> int:
        _timer_settime(_timer_create(1, 40, 0, 0, 5), 1000, 0)
        thread = OwnThread(os.getpid())
        thread.queued[True].append(timer_siginfo(40, 0, 0, 5))
        return capture(PosixTimers, own_view(thread)).timers[0].value

    assert in_child(work) == 0


def test_a_timer_on_some_threads_cpu_time_is_told():
    def work() -> tuple[list[str], list[str]]:
        _timer_create(3, 40, 0, 0, 0)
        state = capture(PosixTimers)
        _syscall(SYS.timer_delete, ctypes.c_long(0))
        alone = rebuild(state)
        _syscall(SYS.timer_delete, ctypes.c_long(0))
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait)
        thread.start()
        among_others = rebuild(state)
        stop.set()
        return alone, among_others

    alone, among_others = in_child(work)
    assert alone == []
    assert len(among_others) == 1
    assert "CPU time" in among_others[0]


def test_a_timer_number_out_of_reach_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posix_timers, "creates_wanted_ids", lambda: False)
    timer = posix_timers.PosixTimer(
        id=10_001, clock=1, notify=1, thread=0, signal=0, data=0, value=0, interval=0, overrun=0
    )
    with pytest.raises(TimerOutOfReach):
        rebuild(PosixTimers(timers=(timer,)))


def test_pending_signals_are_queued_with_what_they_carry():
    value = struct.pack("<iii4xiiQ", 40, 0, SiCode.QUEUE, 4711, 0, 99).ljust(SIGINFO_SIZE, b"\0")

    def work() -> list[tuple[int, int, int]]:
        signal.pthread_sigmask(signal.SIG_BLOCK, [40, signal.SIGUSR1])
        rebuild(PendingForProcess(signals=(value, value)))
        rebuild(PendingForThread(signals=(siginfo(signal.SIGUSR1, SiCode.KERNEL),)))
        found = []
        while (info := signal.sigtimedwait([40, signal.SIGUSR1], 0)) is not None:
            found.append((info.si_signo, info.si_code, info.si_pid))
        return found

    assert in_child(work) == [(10, SiCode.KERNEL, 0), (40, SiCode.QUEUE, 4711), (40, SiCode.QUEUE, 4711)]


def test_a_stop_that_is_pending_waits_for_the_end():
    stop, user = siginfo(signal.SIGSTOP, SiCode.USER), siginfo(signal.SIGUSR1, SiCode.USER)
    assert late((user, stop)) == [signal.SIGSTOP]
    # it is not queued from inside: this process would stop
    in_child(lambda: rebuild(PendingForProcess(signals=(stop,))))


def test_our_own_sigstop_is_no_part_of_the_state():
    ours = struct.pack("<iii4xii", signal.SIGSTOP, 0, SiCode.TKILL, os.getpid(), 0).ljust(SIGINFO_SIZE, b"\0")
    theirs = struct.pack("<iii4xii", signal.SIGSTOP, 0, SiCode.USER, 1, 0).ljust(SIGINFO_SIZE, b"\0")
    thread = OwnThread(os.getpid())
    thread.queued[False] += [ours, theirs]
    assert capture(PendingForThread, own_view(thread)).signals == (theirs,)


def test_a_pending_signal_without_details_is_kept():
    def work() -> tuple[bytes, ...]:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        os.kill(os.getpid(), signal.SIGUSR2)
        return capture(PendingForProcess).signals  # the fake thread's queue is empty

    assert in_child(work) == (siginfo(signal.SIGUSR2, SiCode.USER),)
