"""What a process has given up: system calls, speculation, time stamps, executable memory."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator

from tests.system.state.calls import anonymous, call, prctl, status, threaded
from tests.system.state.case import Here, case

SECCOMP, GETPPID, GETPGRP, SYSINFO, MPROTECT = 317, 110, 111, 99, 10
TSYNC, LOG, SPEC_ALLOW = 1, 2, 4
ALLOW, ERRNO = 0x7FFF0000, 0x00050000


def install(number: int, error: int, flags: int = 0) -> None:
    """A filter of the calling thread: this call fails with that error."""
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, ERRNO | error), (6, 0, 0, ALLOW)]
    code = b"".join(struct.pack("<HBBI", *step) for step in steps)
    text = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("<H6xQ", len(steps), ctypes.addressof(text)), 16)
    call(SECCOMP, 1, flags, program)


def refused(number: int, *args: int) -> int:
    """errno of a call, 0 if it works."""
    try:
        call(number, *args)
    except OSError as problem:
        return problem.errno or 0
    return 0


@case("state/seccomp")
def a_filter(here: Here) -> Iterator[None]:
    install(GETPPID, errno.EXDEV)
    yield
    assert refused(GETPPID) == errno.EXDEV
    assert refused(GETPGRP) == 0
    assert status("Seccomp_filters") == "1"


@case("state/seccomp")
def filters_upon_filters(here: Here) -> Iterator[None]:
    for error in (errno.ENOTTY, errno.EDOM, errno.EXDEV):
        install(GETPPID, error, LOG if error == errno.EDOM else 0)
    yield
    assert refused(GETPPID) == errno.EXDEV  # the last of equals wins
    assert status("Seccomp_filters") == "3"


@case("state/seccomp", "state/credentials")
def filters_of_an_unprivileged_user(here: Here) -> Iterator[None]:
    os.setresuid(2001, 2001, 2001)
    prctl(38, 1)
    install(GETPPID, errno.EDOM)
    yield
    assert refused(GETPPID) == errno.EDOM
    assert prctl(39) == 1


@case("state/seccomp")
def filters_of_single_threads(here: Here) -> Iterator[None]:
    def filtered(number: int, error: int) -> threaded:
        def look(_: object) -> None:
            assert refused(number) == error

        return threaded(lambda: install(number, error), look)

    threads = [filtered(GETPPID, errno.EDOM), filtered(GETPGRP, errno.EXDEV)]
    free = threaded(lambda: None, lambda _: None)
    yield
    for each in threads:
        each.verify()
    assert refused(GETPPID) == refused(GETPGRP) == 0
    assert status("Seccomp", free.tid) == "0"
    free.verify()


@case("state/seccomp")
def a_filter_of_all_threads(here: Here) -> Iterator[None]:
    def look(_: object) -> None:
        assert refused(GETPPID) == errno.EDOM

    threads = [threaded(lambda: None, look) for _ in range(2)]
    install(GETPPID, errno.EDOM, TSYNC)
    yield
    for each in threads:
        each.verify()
    look(None)


@case("state/speculation-controls")
def speculation(here: Here) -> Iterator[None]:
    modes = {}
    for which in (0, 1, 2):
        try:
            now = prctl(52, which)
        except OSError:
            continue
        if now & 1:  # PR_SPEC_PRCTL: it can be set
            prctl(53, which, 4)  # PR_SPEC_DISABLE
        modes[which] = prctl(52, which)
    assert modes
    yield
    assert {which: prctl(52, which) for which in modes} == modes


@case("state/time-stamp-counter")
def no_time_stamps(here: Here) -> Iterator[None]:
    """rdtsc faults. The C library's clocks read it too, so nobody here may ask for the time: the program is in C."""
    here.execute("no_tsc")
    yield


@case("state/machine-check-policy")
def what_a_memory_error_does(here: Here) -> Iterator[None]:
    def policy(value: int) -> threaded:
        def look(_: object) -> None:
            assert prctl(34) == value

        return threaded(lambda: prctl(33, 1, value), look)  # PR_MCE_KILL_SET

    threads = [policy(0), policy(1), policy(2)]
    yield
    for each in threads:
        each.verify()


@case("state/memory-deny-write-execute")
def no_new_executable_memory(here: Here) -> Iterator[None]:
    prctl(65, 1)
    yield
    assert prctl(66) == 1
    page = anonymous(1)
    assert refused(MPROTECT, page, 4096, 5) in (errno.EACCES, errno.EPERM)


@case("state/memory-switches")
def no_huge_pages(here: Here) -> Iterator[None]:
    prctl(41, 1)
    yield
    assert prctl(42) == 1


@case("state/memory-switches")
def equal_pages_may_be_merged(here: Here) -> Iterator[None]:
    try:
        prctl(67, 1)
    except OSError:
        # a kernel without KSM: then nobody has it
        yield
        return
    yield
    assert prctl(68) == 1


@case("state/membarrier")
def registered_for_barriers(here: Here) -> Iterator[None]:
    for register in (1 << 2, 1 << 4, 1 << 6):  # global expedited, private expedited, private expedited sync core
        call(324, register, 0, 0)
    yield
    assert call(324, 1 << 9, 0, 0) & 0x54 == 0x54  # MEMBARRIER_CMD_GET_REGISTRATIONS
    call(324, 1 << 3, 0, 0)  # PRIVATE_EXPEDITED: EPERM if it were not registered


@case("state/robust-list")
def a_thread_that_dies_with_a_lock(here: Here) -> Iterator[None]:
    here.execute("robust")
    yield


@case("state/clear-child-tid")
def a_thread_that_ends_is_joined(here: Here) -> Iterator[None]:
    here.execute("joined")
    yield


@case("state/restartable-sequences")
def sequences_of_each_thread(here: Here) -> Iterator[None]:
    here.execute("rseq")
    yield


@case("state/signal-handlers")
def a_fault_is_handled(here: Here) -> Iterator[None]:
    here.execute("fault")
    yield
