"""The tables of what moves and restores took."""

from __future__ import annotations

from typing import Any

from tests.campaign.figures import CHECKPOINT, RESTORE, STEPS, restore_row, restores, row, table


def moved(stop: float, copy: float) -> dict[str, Any]:
    return {"stop_ms": stop, "phases": {"check": 500.0, "stop": 10.0, "copy": copy}}


STATE = {
    "name": "redis",
    "legs": [{"moves": [moved(20, 5), moved(40, 10)], "problems": ["x"]}, {"moves": [moved(50, 20)], "problems": []}],
}


def test_each_step_has_its_median_and_its_share_of_the_median_stop() -> None:
    cells = row(STATE)
    assert cells[:4] == ["redis", "3", "1", "40 (20-50)"]
    steps = dict(zip([*STEPS, "rest"], cells[4:], strict=True))
    assert (steps["stop"], steps["copy"], steps["freeze"]) == ("10.0 (25 %)", "10.0 (25 %)", "0.0 (0 %)")
    # 5, 20 and 20 ms are in no step
    assert steps["rest"] == "20.0 (50 %)"


def test_a_campaign_whose_moves_failed_has_a_line_as_well() -> None:
    lines = table([STATE, {"name": "nginx", "legs": [{"moves": [], "problems": ["y"]}]}]).splitlines()
    assert [len(line.split("|")) for line in lines] == [13] * 4
    assert lines[3].startswith("| nginx | 0 | 1 | - |")


def through_a_file(stop: float, run: float) -> dict[str, Any]:
    return {
        "checkpoint": {"stop_ms": stop, "phases": {"stop": 10.0, "write": 20.0, "hold": 5.0}, "bytes": 12_000_000},
        "restore": {"run_ms": run, "phases": {"check": run - 60, "build": 50.0, "release": 10.0}},
    }


def test_both_halves_of_a_restore_have_their_steps() -> None:
    state = {
        "name": "go",
        "legs": [{"restores": [through_a_file(50, 100), through_a_file(40, 200)], "problems": []}],
    }
    cells = restore_row(state)
    assert cells[:5] == ["go", "2", "0", "12", "45 (40-50)"]
    steps = dict(zip(CHECKPOINT, cells[5:8], strict=True))
    assert (steps["write"], steps["hold"]) == ("20.0 (44 %)", "5.0 (11 %)")
    assert cells[8] == "150 (100-200)"
    assert dict(zip(RESTORE, cells[9:], strict=True))["check"] == "90.0 (60 %)"
    lines = restores([state, {"name": "java", "legs": [{"restores": [], "problems": ["y"]}]}]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith("| java | 0 | 1 | - |")
