"""Several moves with one result: their exit status, and what a person reads."""

import pytest

from cli.several import Moved, gathered, worst
from tcpstate.errors import Outcome

DONE = {"connections": 2, "bytes_sent": 10, "stop_ms": 5.0, "lost": (), "pids": {1: 1}}


@pytest.mark.parametrize(
    ("outcomes", "together"),
    [
        ([Outcome.DONE, Outcome.DONE], Outcome.DONE),
        ([Outcome.DONE, Outcome.PARTIAL], Outcome.PARTIAL),
        ([Outcome.REFUSED, Outcome.REFUSED], Outcome.REFUSED),
        ([Outcome.REFUSED, Outcome.DONE], Outcome.FAILED),
        ([Outcome.FAILED, Outcome.REFUSED], Outcome.FAILED),
        ([Outcome.DONE, Outcome.IN_DOUBT, Outcome.FAILED], Outcome.IN_DOUBT),
    ],
)
def test_the_exit_status_of_several(outcomes: list[Outcome], together: Outcome) -> None:
    assert worst(outcomes) is together


def test_sums_and_the_longest_stop() -> None:
    moved = [
        Moved(pids=(1,), outcome=Outcome.DONE, told=DONE),
        Moved(pids=(2, 3), outcome=Outcome.DONE, told=DONE | {"stop_ms": 9.0, "connections": 3}),
        Moved(pids=(4,), outcome=Outcome.REFUSED, told={"code": "TM-0312", "message": "it is init"}),
    ]
    result = gathered(moved, seconds=1.5)
    assert (result.data["moved"], result.data["connections"], result.data["bytes_sent"]) == (2, 5, 20)
    assert result.data["stop_ms"] == 9.0
    assert [move["pids"] for move in result.data["moves"]] == [(1,), (2, 3), (4,)]
    assert result.data["moves"][2]["outcome"] == "refused"
    assert any("pid 4" in str(line) and "it is init" in str(line) for line in result.body)
    assert result.outcome is Outcome.FAILED
