"""Timers of every sort, and the clocks that they run by."""

from __future__ import annotations

import ctypes
import signal
import struct
import time
from collections.abc import Iterator

from tests.system.state.calls import call, prctl, threaded
from tests.system.state.case import Here, case

TIMER_CREATE, TIMER_SETTIME, TIMER_GETTIME, TIMER_DELETE, RT_SIGTIMEDWAIT = 222, 223, 224, 226, 128
MONOTONIC, PROCESS_CPU, BOOTTIME, REALTIME = 1, 2, 7, 0
SIGNAL, NONE, THREAD_ID = 0, 1, 4


def create(clock: int, notify: int, number: int, tid: int = 0, value: int = 0) -> int:
    event = struct.pack("<Qiii", value, number, notify, tid).ljust(64, b"\0")
    made = ctypes.c_int(-1)
    call(TIMER_CREATE, clock, ctypes.create_string_buffer(event, 64), ctypes.byref(made))
    return made.value


def arm(timer: int, seconds: float, interval: float = 0, flags: int = 0) -> None:
    def split(value: float) -> tuple[int, int]:
        return int(value), int(value % 1 * 1e9)

    spec = struct.pack("<qqqq", *split(interval), *split(seconds))
    call(TIMER_SETTIME, timer, flags, ctypes.create_string_buffer(spec, 32), None)


def remaining(timer: int) -> tuple[float, float]:
    """(until it expires, interval)"""
    spec = ctypes.create_string_buffer(32)
    call(TIMER_GETTIME, timer, spec)
    a, b, c, d = struct.unpack("<qqqq", spec.raw)
    return c + d / 1e9, a + b / 1e9


def taken(number: int) -> bytes:
    """siginfo_t of the next such signal."""
    info = ctypes.create_string_buffer(128)
    mask = ctypes.create_string_buffer(struct.pack("<Q", 1 << (number - 1)), 8)
    call(RT_SIGTIMEDWAIT, mask, info, ctypes.create_string_buffer(struct.pack("<qq", 30, 0), 16), 8)
    return info.raw


@case("state/posix-timers")
def numbers_with_gaps(here: Here) -> Iterator[None]:
    made = [create(MONOTONIC, SIGNAL, 34) for _ in range(6)]
    for timer in made[:2] + made[3:5]:
        call(TIMER_DELETE, timer)
    left = [made[2], made[5]]
    for timer in left:
        arm(timer, 5000)
    yield
    for timer in left:
        assert 4000 < remaining(timer)[0] < 5000
    for timer in made[:2] + made[3:5]:
        try:
            remaining(timer)
        except OSError:
            continue
        raise AssertionError(f"timer {timer} exists")


@case("state/posix-timers")
def each_clock(here: Here) -> Iterator[None]:
    made = {clock: create(clock, SIGNAL, 35) for clock in (MONOTONIC, BOOTTIME, REALTIME, PROCESS_CPU)}
    for timer in made.values():
        arm(timer, 7000, 3)
    yield
    for timer in made.values():
        left, interval = remaining(timer)
        assert 6000 < left <= 7000.1
        assert interval == 3


@case("state/posix-timers", "state/signal-handlers")
def one_that_ticks(here: Here) -> Iterator[None]:
    ticks = [0]

    def tick(*_: object) -> None:
        ticks[0] += 1

    signal.signal(36, tick)
    timer = create(MONOTONIC, SIGNAL, 36)
    arm(timer, 0.004, 0.004)
    yield
    before = ticks[0]
    while ticks[0] < before + 3:
        time.sleep(0.001)


@case("state/posix-timers")
def one_that_signals_a_thread(here: Here) -> Iterator[None]:
    signal.pthread_sigmask(signal.SIG_BLOCK, [37])
    other = threaded(lambda: None, lambda _: None)
    timer = create(MONOTONIC, SIGNAL | THREAD_ID, 37, other.tid, 4711)
    arm(timer, 5000)

    def pending() -> int:
        with open(f"/proc/self/task/{other.tid}/status") as file:
            return int(next(line for line in file if line.startswith("SigPnd")).split()[1], 16)

    yield
    arm(timer, 0.001)
    while not pending() >> 36 & 1:
        time.sleep(0.001)
    assert 37 not in signal.sigpending()
    other.verify()


@case("state/posix-timers")
def one_that_signals_nobody(here: Here) -> Iterator[None]:
    timer = create(MONOTONIC, NONE, 0)
    arm(timer, 5000, 9)
    disarmed = create(BOOTTIME, SIGNAL, 38)
    yield
    left, interval = remaining(timer)
    assert 4000 < left < 5000
    assert interval == 9
    assert remaining(disarmed) == (0, 0)


@case("state/pending-signals-of-the-process")
def its_signal_waits(here: Here) -> Iterator[None]:
    """It has expired, the signal is blocked: the signal stays, with its value."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [39])
    timer = create(MONOTONIC, SIGNAL, 39, value=0x1234_5678_9ABC)
    arm(timer, 0.001)
    while 39 not in signal.sigpending():
        time.sleep(0.001)
    yield
    info = taken(39)
    assert struct.unpack_from("<i", info, 8)[0] == -2  # SI_TIMER
    assert struct.unpack_from("<i", info, 16)[0] == timer
    assert struct.unpack_from("<Q", info, 24)[0] == 0x1234_5678_9ABC


@case("state/posix-timers")
def overruns_are_counted(here: Here) -> Iterator[None]:
    signal.pthread_sigmask(signal.SIG_BLOCK, [40])
    timer = create(MONOTONIC, SIGNAL, 40)
    arm(timer, 0.001, 0.001)
    while 40 not in signal.sigpending():
        time.sleep(0.001)
    began = time.monotonic()
    yield
    # In one signal or in several, but no expiration more than there can have been.
    count = 0
    while 40 in signal.sigpending() and count < 1_000_000:
        count += 1 + struct.unpack_from("<i", taken(40), 20)[0]
    passed = 1000 * (time.monotonic() - began)
    assert 2 < count <= passed + 50, (count, passed)
    call(225, timer)


@case("state/interval-timers")
def the_three_of_old(here: Here) -> Iterator[None]:
    wanted = {signal.ITIMER_REAL: (4000, 0), signal.ITIMER_VIRTUAL: (5000, 7), signal.ITIMER_PROF: (6000, 8)}
    for which, (value, interval) in wanted.items():
        signal.setitimer(which, value, interval)
    yield
    for which, (value, interval) in wanted.items():
        left, found = signal.getitimer(which)
        assert value - 900 < left <= value + 0.1
        assert found == interval


@case("state/interval-timers", "state/signal-handlers")
def an_alarm_that_comes(here: Here) -> Iterator[None]:
    seen: list[int] = []
    signal.signal(signal.SIGALRM, lambda number, _: seen.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    yield
    count = len(seen)
    while len(seen) < count + 2:
        time.sleep(0.001)


@case("state/timer-slack")
def slack_of_each_thread(here: Here) -> Iterator[None]:
    def slack(nanoseconds: int) -> threaded:
        def look(_: object) -> None:
            assert prctl(30) == nanoseconds

        return threaded(lambda: prctl(29, nanoseconds), look)

    threads = [slack(n) for n in (1, 60_000, 1_000_000)]
    yield
    for each in threads:
        each.verify()
