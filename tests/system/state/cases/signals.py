"""Signals: handlers, masks, what is pending, alternate stacks."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import threading
from collections.abc import Iterator

from tests.system.state.calls import call, status, threaded
from tests.system.state.case import Here, case

RT_SIGACTION, SIGALTSTACK, RT_SIGQUEUEINFO, RT_TGSIGQUEUEINFO, RT_SIGTIMEDWAIT = 13, 131, 129, 297, 128


@case("state/signal-handlers")
def a_handler(here: Here) -> Iterator[None]:
    seen: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    yield
    os.kill(os.getpid(), signal.SIGUSR1)
    assert seen == [signal.SIGUSR1]


@case("state/signal-handlers")
def ignored_signals(here: Here) -> Iterator[None]:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGRTMAX, signal.SIG_IGN)
    yield
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGRTMAX)
    assert int(status("SigIgn"), 16) >> (signal.SIGRTMAX - 1) & 1


@case("state/signal-handlers")
def flags_and_mask_of_an_action(here: Here) -> Iterator[None]:
    signal.signal(signal.SIGUSR2, lambda *_: None)
    action = ctypes.create_string_buffer(32)
    call(RT_SIGACTION, signal.SIGUSR2, None, action, 8)
    handler, flags, restorer, _ = struct.unpack("<QQQQ", action.raw)
    # SA_NODEFER | SA_ONSTACK | SA_RESETHAND
    wanted = struct.pack("<QQQQ", handler, flags | 0x40000000 | 0x08000000 | 0x80000000, restorer, 0x4200)
    call(RT_SIGACTION, signal.SIGUSR2, ctypes.create_string_buffer(wanted, 32), None, 8)
    yield
    call(RT_SIGACTION, signal.SIGUSR2, None, action, 8)
    assert action.raw == wanted


@case("state/registers")
def the_mask_of_each_thread(here: Here) -> Iterator[None]:
    def block(*numbers: int) -> threaded:
        def set_up() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, numbers)

        def look(_: object) -> None:
            assert {int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])} == set(numbers)

        return threaded(set_up, look)

    threads = [block(10, 12), block(34, 64), block()]
    yield
    for each in threads:
        each.verify()


@case("state/pending-signals-of-the-process")
def queued_for_the_process(here: Here) -> Iterator[None]:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN + 3, signal.SIGUSR1])
    for value in (11, 22, 33):
        info = struct.pack("<iii4xiiQ", signal.SIGRTMIN + 3, 0, -1, os.getpid(), 0, value).ljust(128, b"\0")
        call(RT_SIGQUEUEINFO, os.getpid(), signal.SIGRTMIN + 3, ctypes.create_string_buffer(info, 128))
    os.kill(os.getpid(), signal.SIGUSR1)
    yield
    assert signal.SIGUSR1 in signal.sigpending()
    # in their order, with their values
    for value in (11, 22, 33):
        info = ctypes.create_string_buffer(128)
        mask = ctypes.create_string_buffer(struct.pack("<Q", 1 << (signal.SIGRTMIN + 2)), 8)
        call(RT_SIGTIMEDWAIT, mask, info, ctypes.create_string_buffer(16), 8)
        assert struct.unpack_from("<Q", info.raw, 24)[0] == value
        assert struct.unpack_from("<i", info.raw, 8)[0] == -1  # SI_QUEUE
    assert signal.SIGRTMIN + 3 not in signal.sigpending()


@case("state/pending-signals-of-the-thread")
def queued_for_a_thread(here: Here) -> Iterator[None]:
    numbers = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGRTMIN + 4]
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def own(number: int) -> threaded:
        def set_up() -> None:
            signal.pthread_kill(threading.get_ident(), number)

        def look(_: object) -> None:
            assert signal.sigpending() == {number}

        return threaded(set_up, look)

    threads = [own(number) for number in numbers]
    yield
    assert not signal.sigpending()
    for each in threads:
        each.verify()


@case("state/pending-signals-of-the-process")
def a_stop_waits_behind_a_mask(here: Here) -> Iterator[None]:
    """SIGTSTP is blocked, so it is pending, and the process runs."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTSTP])
    os.kill(os.getpid(), signal.SIGTSTP)
    yield
    assert signal.sigpending() == {signal.SIGTSTP}


@case("state/alternate-signal-stack")
def an_alternate_stack_for_each_thread(here: Here) -> Iterator[None]:
    def stack(size: int) -> threaded:
        room = ctypes.create_string_buffer(size)
        wanted = struct.pack("<QiiQ", ctypes.addressof(room), 0, 0, size)

        def set_up() -> None:
            call(SIGALTSTACK, ctypes.create_string_buffer(wanted, 24), None)

        def look(_: object) -> None:
            found = ctypes.create_string_buffer(24)
            call(SIGALTSTACK, None, found)
            assert found.raw == wanted, room

        return threaded(set_up, look)

    threads = [stack(size) for size in (8192, 16384, 65536)]
    yield
    for each in threads:
        each.verify()


@case("state/registers", "state/signal-handlers", "state/alternate-signal-stack")
def inside_a_handler(here: Here) -> Iterator[None]:
    """The cycles find the thread in a signal handler of the C level's choice: its frame is on the stack."""
    here.execute("in_handler")
    yield
