"""How a thread competes: policy, niceness, CPUs, disk, memory nodes; limits of a process."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Callable, Iterator

from tests.system.state.calls import call, threaded
from tests.system.state.case import Here, case

SCHED_SETATTR, SCHED_GETATTR, IOPRIO_SET, IOPRIO_GET, SET_MEMPOLICY, GET_MEMPOLICY = 314, 315, 251, 252, 238, 239
OTHER, FIFO, RR, BATCH, IDLE, DEADLINE = 0, 1, 2, 3, 5, 6
RESET_ON_FORK = 0x40000000


def together(*pairs: tuple[Callable[[], object], Callable[[object], None]]) -> Iterator[None]:
    """Threads that set up and look, one for each pair."""
    threads = [threaded(first, then) for first, then in pairs]
    yield
    for each in threads:
        each.verify()


@case("state/scheduling")
def a_policy_for_each_thread(here: Here) -> Iterator[None]:
    def policy(which: int, priority: int) -> tuple[Callable[[], object], Callable[[object], None]]:
        def look(_: object) -> None:
            assert os.sched_getscheduler(0) == which
            assert os.sched_getparam(0).sched_priority == priority

        return lambda: os.sched_setscheduler(0, which, os.sched_param(priority)), look

    yield from together(policy(BATCH, 0), policy(IDLE, 0), policy(FIFO, 5), policy(RR | RESET_ON_FORK, 1))


@case("state/scheduling")
def niceness_of_each_thread(here: Here) -> Iterator[None]:
    def nice(value: int) -> tuple[Callable[[], object], Callable[[object], None]]:
        def look(_: object) -> None:
            assert os.getpriority(os.PRIO_PROCESS, 0) == value

        return lambda: os.setpriority(os.PRIO_PROCESS, 0, value), look

    yield from together(nice(-20), nice(5), nice(19))


@case("state/scheduling")
def niceness_below_another_policy(here: Here) -> Iterator[None]:
    os.setpriority(os.PRIO_PROCESS, 0, 7)
    os.sched_setscheduler(0, FIFO, os.sched_param(3))
    yield
    assert os.sched_getscheduler(0) == FIFO
    os.sched_setscheduler(0, OTHER, os.sched_param(0))
    assert os.getpriority(os.PRIO_PROCESS, 0) == 7


@case("state/scheduling")
def a_deadline(here: Here) -> Iterator[None]:
    wanted = (1_000_000, 90_000_000, 100_000_000)

    def set_up() -> None:
        attr = struct.pack("<IIQiIQQQ", 48, DEADLINE, 0, 0, 0, *wanted)
        call(SCHED_SETATTR, 0, ctypes.create_string_buffer(attr, 48), 0)

    def look(_: object) -> None:
        attr = ctypes.create_string_buffer(48)
        call(SCHED_GETATTR, 0, attr, 48, 0)
        assert struct.unpack("<IIQiIQQQ", attr.raw)[1] == DEADLINE
        assert struct.unpack("<IIQiIQQQ", attr.raw)[5:] == wanted

    yield from together((set_up, look))


@case("state/scheduling")
def a_slice_of_its_own(here: Here) -> Iterator[None]:
    def set_up() -> None:
        attr = struct.pack("<IIQiIQQQ", 48, OTHER, 0, 0, 0, 1_500_000, 0, 0)
        call(SCHED_SETATTR, 0, ctypes.create_string_buffer(attr, 48), 0)

    def look(_: object) -> None:
        attr = ctypes.create_string_buffer(48)
        call(SCHED_GETATTR, 0, attr, 48, 0)
        assert struct.unpack("<IIQiIQQQ", attr.raw)[5] == 1_500_000

    yield from together((set_up, look))


@case("state/cpu-affinity")
def bound_to_one_processor(here: Here) -> Iterator[None]:
    def bound(cpu: int) -> tuple[Callable[[], object], Callable[[object], None]]:
        def look(_: object) -> None:
            assert os.sched_getaffinity(0) == {cpu}

        return lambda: os.sched_setaffinity(0, [cpu]), look

    cpus = sorted(os.sched_getaffinity(0))
    yield from together(*(bound(cpu) for cpu in cpus[:4]))


@case("state/io-priority")
def disk_priority_of_each_thread(here: Here) -> Iterator[None]:
    def disk(value: int) -> tuple[Callable[[], object], Callable[[object], None]]:
        def look(_: object) -> None:
            assert call(IOPRIO_GET, 1, 0) == value

        return lambda: call(IOPRIO_SET, 1, 0, value), look

    # class (1: real time, 2: best effort, 3: idle) << 13 | level
    yield from together(disk(1 << 13 | 3), disk(2 << 13 | 7), disk(3 << 13))


@case("state/numa-policy")
def a_memory_policy_for_each_thread(here: Here) -> Iterator[None]:
    def policy(mode: int) -> tuple[Callable[[], object], Callable[[object], None]]:
        def set_up() -> None:
            call(SET_MEMPOLICY, mode, ctypes.create_string_buffer(struct.pack("<Q", 1), 8), 64)

        def look(_: object) -> None:
            found, nodes = ctypes.c_int(-1), ctypes.create_string_buffer(128)
            call(GET_MEMPOLICY, ctypes.byref(found), nodes, 1024, 0, 0)
            assert found.value == mode
            assert nodes.raw[0] == 1

        return set_up, look

    yield from together(policy(1), policy(2), policy(3))  # preferred, bind, interleave


@case("state/resource-limits")
def limits(here: Here) -> Iterator[None]:
    wanted = {
        resource.RLIMIT_NOFILE: (77, 99),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_STACK: (4 << 20, resource.RLIM_INFINITY),
        resource.RLIMIT_DATA: (1 << 40, 1 << 41),
        resource.RLIMIT_NPROC: (1234, 5678),
        resource.RLIMIT_MEMLOCK: (65536, 131072),
        resource.RLIMIT_SIGPENDING: (400, 500),
        resource.RLIMIT_MSGQUEUE: (1000, 2000),
        resource.RLIMIT_NICE: (3, 30),
        resource.RLIMIT_RTPRIO: (1, 9),
        resource.RLIMIT_RTTIME: (1_000_000_000, 2_000_000_000),
        resource.RLIMIT_FSIZE: (1 << 33, 1 << 34),
        resource.RLIMIT_CPU: (7200, 9000),
    }
    for which, value in wanted.items():
        most = resource.getrlimit(which)[1]
        if most != resource.RLIM_INFINITY:  # nobody here may raise it
            value = (min(value[0], most), most if value[1] == resource.RLIM_INFINITY else min(value[1], most))
        resource.setrlimit(which, value)
        wanted[which] = value
    yield
    for which, value in wanted.items():
        assert resource.getrlimit(which) == value


@case("state/resource-limits")
def an_address_space_that_is_nearly_full(here: Here) -> Iterator[None]:
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + (16 << 20), resource.RLIM_INFINITY))
    yield
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == size + (16 << 20)


@case("state/oom-score-adjustment")
def who_is_killed_first(here: Here) -> Iterator[None]:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("123")
    yield
    with open("/proc/self/oom_score_adj") as file:
        assert file.read() == "123\n"


@case("state/coredump-filter")
def what_a_core_file_holds(here: Here) -> Iterator[None]:
    with open("/proc/self/coredump_filter", "w") as file:
        file.write("0x1a5")
    yield
    with open("/proc/self/coredump_filter") as file:
        assert int(file.read(), 16) == 0x1A5
