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
)


def _enter(call: str) -> None:
    def program(here: Here) -> Iterator[None]:
        here.execute("in_call", call)
        yield

    name = f"calls_in_flight.{call.replace(' ', '_').replace('-', '_')}"
    # a flock belongs to an open file; the kernel shows who took it, which is tcpmig
    differs = ("FLOCK",) if call == "flock" else ()
    CASES[name] = Case(name, program, ("state/registers",), differs=differs)


for each in CALLS:
    _enter(each)
