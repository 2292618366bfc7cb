"""What the tests of migrations under load say of a move."""

from __future__ import annotations

from typing import Any

from tests.hosts import Host
from tests.hosts.tcpmig import MigrationFailed, migrate
from tests.workloads.move import MoveReport, Stage

__all__ = ["moved", "there_and_back"]


def moved(here: Host, pid: int, there: Host, looks_at: str) -> dict[str, Any]:
    """A migration of a program that looks at itself in /proc now and then, at a path with ``looks_at`` in it: who looks
    just then sees a file that does not move, and refuses. The program runs on then."""
    while True:
        try:
            return migrate(here, pid, there)
        except MigrationFailed as error:
            if "TM-0340" not in str(error) or looks_at not in str(error):
                raise


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
