"""The measurements: all of them are run, and a run that was ended goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.__main__ import ALL, begun
from tests.bench.plots import PLOTS
from tests.bench.results import VARIABLE, measured, note, read, spread

FOLDER = Path(__file__).parents[1] / "bench"


def test_every_measurement_is_run() -> None:
    assert {path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")} == set(ALL)


def test_every_picture_is_shown_once() -> None:
    assert sorted(table for bench in ALL.values() for table in bench.plots) == sorted(PLOTS)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "rows"
    monkeypatch.setenv(VARIABLE, str(path))
    return path


def test_a_row_is_measured_once(rows: Path) -> None:
    asked: list[int] = []

    def work(size: int) -> dict[str, float]:
        asked.append(size)
        return spread([1.0 * size, 2.0 * size, 6.0 * size])

    for size in (1, 10, 1):
        row = measured("copies", {"mib": size}, lambda size=size: work(size))  # type: ignore[misc]
        assert row == {"mib": size, "median": 2.0 * size, "min": 1.0 * size, "max": 6.0 * size}
    assert asked == [1, 10]
    with rows.open("a") as file:
        file.write('{"table": "copies", "mib": 100, "med')  # the run was killed here
    assert [row["mib"] for row in read(rows)["copies"]] == [1, 10]


def test_only_a_run_of_the_same_kind_goes_on(rows: Path) -> None:
    begun(rows, {"commit": "a"}, resume=True)
    note("copies", mib=1)
    begun(rows, {"commit": "a"}, resume=True)
    assert "copies" in read(rows)
    begun(rows, {"commit": "b"}, resume=True)
    assert "copies" not in read(rows)
    note("copies", mib=1)
    begun(rows, {"commit": "b"}, resume=False)
    assert "copies" not in read(rows)
