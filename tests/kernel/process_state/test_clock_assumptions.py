"""What Linux does with time namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from kernel_child import in_child

from checkpoint.kernel.timers import NS
from checkpoint.state.clocks import Clocks, Offsets, enter, read
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS

NEWTIME = 0x80
DAY = 86_400 * NS


def _now() -> Clocks:
    return Clocks(
        monotonic=time.clock_gettime_ns(time.CLOCK_MONOTONIC), boottime=time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    )


def _seen_by_a_new_program() -> int:
    """CLOCK_MONOTONIC as a program sees it that is started by vfork and exec."""
    return int(subprocess.check_output([sys.executable, "-Ic", "import time; print(time.monotonic_ns())"]))


def test_a_new_program_enters_the_namespace_and_the_maker_does_not():
    def work() -> int:
        before = time.monotonic_ns()
        syscall(SYS.unshare, NEWTIME)
        with open("/proc/self/timens_offsets", "w", encoding="ascii") as file:
            file.write(Offsets(monotonic=DAY, boottime=DAY).format())
        seen, own = _seen_by_a_new_program(), time.monotonic_ns()
        return 0 if before + DAY < seen < own + DAY and own < before + 60 * NS else 1

    assert in_child(work) == 0


def test_offsets_cannot_be_changed_once_the_namespace_is_in_use():
    def work() -> int:
        syscall(SYS.unshare, NEWTIME)
        _seen_by_a_new_program()
        try:
            with open("/proc/self/timens_offsets", "w", encoding="ascii") as file:
                file.write(Offsets(monotonic=DAY, boottime=DAY).format())
        except PermissionError:
            return 0
        return 1

    assert in_child(work) == 0


def test_clocks_go_on_from_any_value_forwards_and_backwards():
    for difference in (-30 * NS, 3 * DAY):

        def work(difference: int = difference) -> int:
            now = _now()
            wanted = Clocks(monotonic=now.monotonic + difference, boottime=now.boottime + difference)
            offsets = enter(wanted, elapsed=5 * NS)
            seen, after = _seen_by_a_new_program(), time.monotonic_ns()
            lowest, highest = wanted.monotonic + 5 * NS, wanted.monotonic + 5 * NS + after - now.monotonic
            return 0 if offsets is not None and lowest <= seen <= highest else 1

        assert in_child(work) == 0


def test_no_namespace_is_made_where_the_clocks_are_right():
    def work() -> int:
        before = os.readlink("/proc/self/ns/time_for_children")
        none = enter(_now(), elapsed=0)
        return 0 if none is None and os.readlink("/proc/self/ns/time_for_children") == before else 1

    assert in_child(work) == 0


def test_the_clocks_inside_are_read_from_outside():
    def work() -> int:
        now = _now()
        enter(Clocks(monotonic=now.monotonic + DAY, boottime=now.boottime + 2 * DAY), elapsed=0)
        inside = subprocess.Popen(["sleep", "60"])
        try:
            # exec has to have happened: before, it is still in our namespace
            deadline = time.monotonic() + 10
            while os.readlink(f"/proc/{inside.pid}/ns/time") == os.readlink("/proc/self/ns/time"):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            seen = read(inside.pid)
            expected = (now.monotonic + DAY, now.boottime + 2 * DAY)
            late = (seen.monotonic - expected[0], seen.boottime - expected[1])
            return 0 if all(0 <= each < 20 * NS for each in late) else 1
        finally:
            inside.kill()
            inside.wait()

    assert in_child(work) == 0


def test_reading_our_own_clocks():
    low, seen, high = _now(), read(os.getpid()), _now()
    assert low.monotonic <= seen.monotonic <= high.monotonic
    assert low.boottime <= seen.boottime <= high.boottime
