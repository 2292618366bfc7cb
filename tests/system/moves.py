"""What the tests of migrations under load say of a move."""

from __future__ import annotations

from tests.workloads.move import MoveReport, Stage

__all__ = ["there_and_back"]


def there_and_back(stage: Stage, moves: int = 2) -> list[MoveReport]:
    """Move so many times, source to target first; nobody may notice; the clients are finished after it."""
    reports = []
    for number in range(moves):
        report = stage.move()
        reports.append(report)
        print(report.json())
        assert report.problems == [], f"move {number + 1}: {report.problems}\n{report.log}"
    assert stage.finish() == []
    return reports
