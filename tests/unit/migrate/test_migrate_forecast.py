"""A migration played through: rounds, bytes and stop from what was seen of memory and line."""

from __future__ import annotations

import pytest

from checkpoint.memory.forecast import Observed
from migrate.forecast import forecast

MB = 1_000_000
LINE = 100 * MB


def seen(megabytes: int, *, per_second: int = 0, still: int = 0) -> Observed:
    """A process that writes evenly."""
    writes = tuple((when, round(when * per_second * MB)) for when in (0.05, 0.25))
    return Observed(pid=7, bytes=megabytes * MB, still=still * MB, writes=writes)


def test_what_is_not_written_goes_in_one_round() -> None:
    told = forecast([seen(500)], rate=LINE, budget_ms=10, precopy=True)
    assert [one.bytes for one in told.rounds] == [500 * MB, 0]
    assert told.rounds[0].ms == pytest.approx(5000)
    assert (told.bytes_sent, told.write_rate, told.busy) == (500 * MB, 0, False)
    assert told.total_ms == pytest.approx(5000 + told.stop_ms)


def test_rounds_shrink_as_the_line_is_faster_than_the_writes() -> None:
    told = forecast([seen(500, per_second=20)], rate=LINE, budget_ms=10, precopy=True)
    # each leaves a fifth of the one before, until 10 ms are enough, and what is left is hardly worth a round
    assert [round(one.bytes / MB, 1) for one in told.rounds] == [500, 100, 20, 4, 0.8, 0.2]
    assert told.write_rate == pytest.approx(20 * MB)
    assert not told.busy


def test_who_writes_faster_than_the_line_stands_still_for_all_of_it() -> None:
    told = forecast([seen(500, per_second=200)], rate=LINE, budget_ms=10, precopy=True)
    assert told.busy
    assert told.rounds[-1].bytes == 500 * MB
    assert told.stop_ms > 5000


def test_shared_memory_and_shipped_files_are_of_the_stop() -> None:
    told = forecast([seen(10, still=3)], rate=LINE, budget_ms=10, precopy=True, shipped=4 * MB)
    assert [one.bytes for one in told.rounds] == [10 * MB, 7 * MB]
    assert told.stop_ms >= 70


def test_without_rounds_all_is_of_the_stop() -> None:
    told = forecast([seen(10), seen(20)], rate=LINE, budget_ms=10, precopy=False)
    assert [one.bytes for one in told.rounds] == [30 * MB]


@pytest.mark.parametrize(
    ("seconds", "written"), [(0, 0), (0.025, 5), (0.05, 10), (0.15, 15), (0.25, 20), (0.45, 30), (60, 100)]
)
def test_what_is_written_often_counts_once(seconds: float, written: int) -> None:
    hot = Observed(pid=7, bytes=100, writes=((0.05, 10), (0.25, 20)))
    assert hot.written(seconds) == written
