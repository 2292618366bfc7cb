"""A thread that is urgent for a while: what the kernel makes of it, of its children and of its threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from checkpoint import urgency
from checkpoint.kernel.sched import default_slice, get_attributes
from tcpstate.kernel.beside import Beside

OURS = (os.SCHED_OTHER, 0)
URGENT = (os.SCHED_RR | os.SCHED_RESET_ON_FORK, 1)


def policy() -> tuple[int, int]:
    return os.sched_getscheduler(0), os.sched_getparam(0).sched_priority


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    assert policy() == OURS
    yield
    urgency.end()
    assert policy() == OURS


def test_it_is_urgent_until_the_end() -> None:
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    before = get_attributes(0)
    urgency.begin()
    assert policy() == URGENT
    urgency.begin()
    urgency.end()
    assert policy() == OURS
    urgency.end()
    assert os.getpriority(os.PRIO_PROCESS, 0) == nice
    assert get_attributes(0) == before


def test_it_waits_as_it_was() -> None:
    with urgency.relaxed():
        assert policy() == OURS
    urgency.begin()
    with urgency.relaxed():
        assert policy() == OURS
    assert policy() == URGENT


def test_an_error_on_the_way_changes_nothing() -> None:
    urgency.begin()
    with pytest.raises(ValueError, match="it broke"), urgency.relaxed():
        raise ValueError("it broke")
    assert policy() == URGENT


def test_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying gigabytes is not to keep a processor from everybody."""
    monkeypatch.setattr(urgency, "_LONGEST", 0.0)
    urgency.begin()
    with urgency.relaxed():
        pass
    assert policy() == OURS


def test_its_children_and_threads_are_ordinary() -> None:
    urgency.begin()
    found: list[object] = []

    def look() -> None:
        found.append(policy())
        # another thread's urgency is none of its own
        with urgency.relaxed():
            found.append(policy())
        found.append(policy())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [OURS] * 3
    program = "import os; print(os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0))"
    told = subprocess.run([sys.executable, "-IS", "-c", program], capture_output=True, check=True, text=True)
    assert told.stdout.split() == ["0", "0"]


def test_what_is_waited_for_is_as_urgent() -> None:
    assert Beside(policy).result() == OURS
    urgency.begin()
    assert Beside(policy).result() == URGENT


def test_the_slice_that_threads_have_by_default_is_told_all_the_same() -> None:
    """What is captured of a thread is compared with it."""
    default_slice.cache_clear()
    urgency.begin()
    assert get_attributes(0).runtime == 0
    assert default_slice() > 0
    urgency.end()
    assert default_slice() == get_attributes(0).runtime


def test_who_has_such_a_policy_keeps_it() -> None:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(7))
    try:
        urgency.begin()
        assert policy() == (os.SCHED_FIFO, 7)
        urgency.end()
        assert policy() == (os.SCHED_FIFO, 7)
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def test_who_may_not_stays_as_it_is() -> None:
    program = (
        "import os, resource; from checkpoint import urgency\n"
        "resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0)); os.setuid(65534); urgency.begin()\n"
        "with urgency.relaxed(): pass\n"
        "print(os.sched_getscheduler(0)); urgency.end()"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert told.stdout == "0\n"
