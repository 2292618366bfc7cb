"""System calls in flight: the thread goes on waiting, and gets what it waits for; no EINTR that only the stop made."""

from __future__ import annotations

from collections.abc import Iterator

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


for each in CALLS:
    _enter("in_call", each, each)
for each in TIMED:
    _enter("in_time", each, f"time of {each}")
