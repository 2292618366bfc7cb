"""The table of a campaign's stops."""

from __future__ import annotations

from typing import Any

from tests.campaign.figures import STEPS, row, table


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
