"""How many rounds of pre-copy, on numbers alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from migrate.rounds import Pace, Round

MB = 1 << 20


def run(pace: Pace, size: int, line: float, writes: float) -> int:
    """Rounds over a line of ``line`` bytes/s of a process of ``size`` bytes that writes ``writes`` bytes/s, or less if
    it is slowed down."""
    left = float(size)
    for number in range(1, 1000):
        seconds = left / line
        sent = Round(bytes=int(left), ms=1e3 * seconds)
        left = min(float(size), writes * pace.share * seconds)
        if not pace.another(sent, {1: int(left)}):
            return number
    raise AssertionError("the rounds never end")


def test_a_quiet_process_takes_one_round() -> None:
    pace = Pace(10)
    assert run(pace, 1000 * MB, 1e9, 0) == 1
    assert not pace.busy


def test_rounds_go_on_until_the_rest_fits() -> None:
    pace = Pace(10)
    assert 1 < run(pace, 1000 * MB, 1e9, 2e8) < 8
    assert not pace.busy
    assert pace.predicted_ms() <= 10


def test_who_writes_faster_than_the_line_is_named() -> None:
    pace = Pace(10)
    assert run(pace, 1000 * MB, 1e8, 5e8) < 10
    assert pace.busy
    assert pace.write_rate(1) > 9e7


def test_who_is_slowed_down_enough_fits() -> None:
    pace = Pace(10, throttles=True)
    assert run(pace, 1000 * MB, 1e8, 5e8) <= 30
    assert not pace.busy
    assert 0.05 <= pace.share <= 0.2
    assert pace.predicted_ms() <= 10


def test_who_need_not_be_is_not_slowed_down() -> None:
    pace = Pace(10, throttles=True)
    run(pace, 1000 * MB, 1e9, 2e8)
    assert pace.share == 1


def test_who_writes_too_fast_even_so_is_named() -> None:
    pace = Pace(1, throttles=True)
    run(pace, 1000 * MB, 1e7, 5e9)
    assert pace.busy
    assert pace.share == 0.05


def test_a_longer_stop_takes_fewer_rounds() -> None:
    assert run(Pace(500), 1000 * MB, 1e9, 6e8) < run(Pace(1), 1000 * MB, 1e9, 6e8)


def test_what_fits_is_made_smaller_as_long_as_that_is_cheap() -> None:
    pace = Pace(300)
    run(pace, 1000 * MB, 1e9, 2e8)
    assert pace.predicted_ms() < 1
    fits = next(i for i, one in enumerate(pace.rounds) if one.ms <= 300)
    assert sum(one.ms for one in pace.rounds[fits:]) < 2 * 300


def test_rounds_that_have_a_least_length_end_when_they_do_not_shrink() -> None:
    pace, left, sent = Pace(100), 20 * MB, Round(bytes=1000 * MB, ms=1000.0)
    # what is written in 50 ms, however little there is to send
    while pace.another(sent, {1: left}):
        sent, left = Round(bytes=left, ms=50.0), MB
    assert [one.bytes for one in pace.rounds] == [1000 * MB, 20 * MB, MB]
    assert not pace.busy


@given(st.integers(0, 1 << 34), st.floats(1e6, 1e10), st.floats(0, 1e10), st.floats(0, 1e4))
def test_the_rounds_end(size: int, line: float, writes: float, budget: float) -> None:
    pace = Pace(budget)
    assert run(pace, size, line, writes) <= 30
    assert len(pace.rounds) <= 30


def test_nothing_is_divided_by_nothing() -> None:
    pace = Pace(0)
    assert not pace.another(Round(bytes=0, ms=0.0), {})
    assert pace.write_rate(1) == 0
    assert pace.predicted_ms() == 0
