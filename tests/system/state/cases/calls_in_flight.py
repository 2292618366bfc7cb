"""System calls in flight: the thread goes on waiting, and gets what it waits for; no EINTR that only the stop made."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import struct
import threading
import time
from collections.abc import Iterator

from tests.system.state import calls
from tests.system.state.case import CASES, Case, Here

CALLS = (
    "read",
    "readv",
    "write",
    "recv",
    "recvmsg",
    "recv with a time-out",
    "poll",
    "poll with a time-out",
    "ppoll",
    "select",
    "pselect",
    "epoll_wait",
    "epoll_wait with a time-out",
    "epoll_pwait2",
    "eventfd",
    "futex",
    "futex with a time-out",
    "futex until a time",
    "waitpid",
    "waitid",
    "flock",
    "record lock",
    "sigwaitinfo",
    "sigtimedwait",
    "pause",
    "sigsuspend",
    "nanosleep and a signal",
    "poll and a signal",
    "read and a signal",
    "clock_nanosleep and a signal",
    "clock_nanosleep until a time and a signal",
    "epoll_wait and a signal",
    "sigtimedwait and another signal",
    "recv with a time-out and a signal",
    "epoll_pwait",
    "accept",
    "accept with a time-out",
    "send",
    "send with a time-out",
    "sendfile with a time-out",
    "recvmmsg with a time-out",
    "splice",
    "semop",
    "semtimedop",
    "msgrcv",
    "io_getevents",
    "io_getevents with a time-out",
    "inotify",
    "signalfd",
    "open of a fifo",
    "futex of priority inheritance",
    "futex_waitv",
)

#: calls with a time-out that passes: not before its time
TIMED = (
    "nanosleep",
    "nanosleep with a rest",
    "clock_nanosleep",
    "clock_nanosleep of boottime",
    "clock_nanosleep until a time",
    "poll",
    "ppoll",
    "select",
    "pselect",
    "epoll_wait",
    "epoll_pwait",
    "epoll_pwait2",
    "sigtimedwait",
    "futex",
    "futex until a time",
    "futex_waitv",
    "io_getevents",
    "semtimedop",
    "recv",
    "accept",
    "send",
)


def _enter(program: str, call: str, name: str) -> None:
    def run(here: Here) -> Iterator[None]:
        here.execute(program, call)
        yield

    name = f"calls_in_flight.{name.replace(' ', '_').replace('-', '_')}"
    # a flock belongs to an open file; the kernel shows who took it, which is tcpmig
    differs = ("FLOCK",) if call == "flock" else ()
    CASES[name] = Case(name, run, ("state/registers",), differs=differs)


#: calls that go on with what was left: which argument tells the time, and whether it points to it
LEFT: dict[str, tuple[int, int, bool]] = {
    # number of the call it may be made as, argument
    "epoll_wait": (232, 3, False),
    "epoll_pwait2": (281, 3, False),
    "sigtimedwait": (128, 2, True),
    "semtimedop": (220, 3, True),
    "io_getevents": (208, 4, True),
    "ppoll": (271, 2, True),
    "pselect": (270, 4, True),
}
#: of these the kernel itself writes it down
WRITTEN_BACK = ("ppoll", "pselect")
_LONG = 1000  # seconds


def _wait(call: str) -> None:
    """Wait for long in that call."""
    span = struct.pack("=qq", _LONG, 0)
    reading, _ = os.pipe()
    with select.epoll() as poll:
        poll.register(reading, select.EPOLLIN)
        if call == "epoll_wait":
            poll.poll(_LONG)
        elif call == "epoll_pwait2":
            calls.call(441, poll.fileno(), ctypes.create_string_buffer(12), 1, span, None, 8)
        elif call == "sigtimedwait":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            signal.sigtimedwait([signal.SIGUSR1], _LONG)
        elif call == "semtimedop":
            semaphore = calls.call(64, 0, 1, 0o600)
            calls.call(220, semaphore, struct.pack("=HhhHhh", 0, 1, 0, 0, -1, 0), 2, span)
            calls.call(220, semaphore, struct.pack("=Hhh", 0, -1, 0), 1, span)
        elif call == "ppoll":
            calls.call(271, struct.pack("=ihh", reading, 1, 0), 1, ctypes.create_string_buffer(span, 16), None, 8)
        elif call == "pselect":
            wanted = (1 << reading).to_bytes(128, "little")
            calls.call(270, reading + 1, wanted, None, None, ctypes.create_string_buffer(span, 16), None)
        else:
            context = ctypes.c_ulong()
            calls.call(206, 1, ctypes.byref(context))
            calls.call(208, context, 1, 1, ctypes.create_string_buffer(32), span)


def _arguments(tid: int) -> list[int]:
    """Number and arguments of the call that a thread waits in; nothing if it runs."""
    with open(f"/proc/self/task/{tid}/syscall") as file:
        return [int(word, 0) for word in file.read().split()[:7] if word != "running"]


def _rests(call: str) -> None:
    number, argument, points = LEFT[call]

    def left(tid: int) -> float:
        """Seconds that the call was given; it waits in it."""
        while len(found := _arguments(tid)) < 7 or found[0] not in (number, 441):
            time.sleep(0.01)
        at = found[1 + argument]
        if points or found[0] == 441:
            seconds, rest = struct.unpack("=qq", ctypes.string_at(at, 16))
            return float(seconds + rest / 1e9)
        return at / 1e3

    def run(here: Here) -> Iterator[None]:
        thread = threading.Thread(target=_wait, args=(call,), daemon=True)
        thread.start()
        assert thread.native_id is not None
        assert left(thread.native_id) == _LONG
        yield
        assert _LONG - 900 < left(thread.native_id) < _LONG, (call, left(thread.native_id))

    name = f"calls_in_flight.rest_of_{call}"
    CASES[name] = Case(name, run, ("state/registers", *(() if call in WRITTEN_BACK else ("aspect/waits",))))


for each in LEFT:
    _rests(each)
for each in CALLS:
    _enter("in_call", each, each)
for each in TIMED:
    _enter("in_time", each, f"time of {each}")
