"""What Linux does with POSIX timers and their numbers."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import threading

from kernel_child import child, in_child, stopped

from checkpoint.kernel import ptrace
from checkpoint.kernel.signals import SiCode, SigInfo
from checkpoint.kernel.timers import Clock, Notify, sigevent
from tcpstate.kernel.batch import libc, syscall
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.prctl import Pr, TimerIds


def _create(wanted: int = 0, sig: int = 0, notify: int = Notify.NONE, clock: int = Clock.MONOTONIC) -> int:
    event = ctypes.create_string_buffer(sigevent(0, sig, notify, 0), 64)
    number = ctypes.c_int(wanted)
    syscall(SYS.timer_create, clock, ctypes.addressof(event), ctypes.addressof(number))
    return number.value


def _arm(timer: int, value_ns: int, interval_ns: int = 0) -> None:
    spec = ctypes.create_string_buffer(struct.pack("<4q", 0, interval_ns, 0, value_ns), 32)
    syscall(SYS.timer_settime, timer, 0, ctypes.addressof(spec), 0)


def test_numbers_count_upwards_from_0_and_are_not_used_again():
    def work() -> int:
        first, second = _create(), _create()
        syscall(SYS.timer_delete, second)
        return 0 if (first, second, _create()) == (0, 1, 2) else 1

    assert in_child(work) == 0


def test_a_timer_is_created_under_a_wanted_number():
    def work() -> int:
        assert libc.prctl(Pr.TIMER_CREATE_RESTORE_IDS, TimerIds.ON, 0, 0, 0) == 0
        number = _create(wanted=4711)
        assert libc.prctl(Pr.TIMER_CREATE_RESTORE_IDS, TimerIds.OFF, 0, 0, 0) == 0
        return 0 if number == 4711 else 1

    assert in_child(work) == 0


def test_a_number_in_use_is_refused():
    def work() -> int:
        _create()
        assert libc.prctl(Pr.TIMER_CREATE_RESTORE_IDS, TimerIds.ON, 0, 0, 0) == 0
        try:
            _create(wanted=0)
        except OSError:
            return 0
        return 1

    assert in_child(work) == 0


def test_the_signal_of_a_timer_names_it_while_it_is_pending():
    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [40])
        _create()
        _arm(_create(sig=40, notify=Notify.SIGNAL), 1)
        while 40 not in signal.sigpending():
            os.sched_yield()

    with child(prepare) as pid, stopped(pid):
        infos = [SigInfo.unpack(info) for info in ptrace.peek_signals(pid, shared=True)]
        assert infos == [SigInfo(40, SiCode.TIMER, timer=1)]


def test_proc_tells_the_timers():
    def prepare() -> None:
        _create(sig=40, notify=Notify.SIGNAL)

    with child(prepare) as pid, open(f"/proc/{pid}/timers", encoding="ascii") as file:
        assert file.read() == f"ID: 0\nsignal: 40/0000000000000000\nnotify: signal/pid.{pid}\nClockID: 1\n"


def test_proc_does_not_tell_whose_cpu_time_a_timer_counts():
    def prepare() -> None:
        _create(clock=Clock.THREAD_CPUTIME_ID)
        thread = threading.Thread(target=_create, kwargs={"clock": Clock.THREAD_CPUTIME_ID})
        thread.start()
        thread.join()

    with child(prepare) as pid, open(f"/proc/{pid}/timers", encoding="ascii") as file:
        lines = file.read().splitlines()
    assert lines[3] == lines[7] == f"ClockID: {int(Clock.CREATING_THREAD)}"
    assert lines[2] == lines[6]
