"""Which images of a row stay, and what each builds on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.errors import ImageNotWritten, ParentMissing
from migrate.errors import RotationName
from migrate.rotating import Plan, Rotation
from migrate.snapsummary import CheckpointSummary


def summary(file: str) -> CheckpointSummary:
    return CheckpointSummary(
        pid=1, pids=(1,), file=file, bytes=1, connections=0, addresses=(), hold="", running=True, stop_ms=1, total_ms=1
    )


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 40))
def test_the_newest_stay_with_all_that_they_build_on(keep: int, full: int, count: int) -> None:
    plan, there, parents = Plan(keep, full), set[int](), dict[int, int | None]()
    for number in range(1, count + 1):
        parent = plan.parent
        assert parent in (None, number - 1)
        parents[number] = parent
        there |= {number}
        there -= set(plan.made(number, parent))
        wanted = set(range(max(1, number - keep + 1), number + 1))
        for one in list(wanted):
            length = 1
            while (older := parents[one]) is not None:
                wanted.add(one := older)
                length += 1
            assert length <= full
        assert there == wanted
    assert sum(parent is None for parent in parents.values()) == -(-count // full)


class Maker:
    def __init__(self) -> None:
        self.made: list[tuple[str, str]] = []
        self.fails: list[Exception] = []

    def __call__(self, file: str, parent: str) -> CheckpointSummary:
        if self.fails:
            raise self.fails.pop()
        Path(file).write_text("image")
        self.made.append((Path(file).name, Path(parent).name if parent else ""))
        return summary(file)


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def test_files_come_and_go_and_the_link_is_the_newest(tmp_path: Path) -> None:
    make = Maker()
    rotation = Rotation(str(tmp_path / "image"), Plan(keep=2, full=2))
    for _ in range(5):
        rotation.another(make)
    assert make.made == [
        ("image.000001", ""),
        ("image.000002", "image.000001"),
        ("image.000003", ""),
        ("image.000004", "image.000003"),
        ("image.000005", ""),
    ]
    # 4 builds on 3
    assert names(tmp_path) == ["image", "image.000003", "image.000004", "image.000005"]
    assert (tmp_path / "image").readlink() == Path("image.000005")


def test_an_earlier_run_is_counted_on_from(tmp_path: Path) -> None:
    for name in ("image.000007", "image.0000x1", "image.3", "other.000009"):
        (tmp_path / name).write_text("")
    make = Maker()
    rotation = Rotation(str(tmp_path / "image"), Plan(keep=1, full=1))
    rotation.another(make)
    rotation.another(make)
    assert [name for name, _ in make.made] == ["image.000008", "image.000009"]
    assert "image.000007" in names(tmp_path)
    assert "image.000008" not in names(tmp_path)


def test_one_that_fails_takes_no_number_and_leaves_the_others(tmp_path: Path) -> None:
    make = Maker()
    rotation = Rotation(str(tmp_path / "image"), Plan())
    rotation.another(make)
    make.fails = [ImageNotWritten("no room")]
    with pytest.raises(ImageNotWritten):
        rotation.another(make)
    rotation.another(make)
    assert make.made[1:] == [("image.000002", "image.000001")]


def test_without_its_parent_one_begins_anew(tmp_path: Path) -> None:
    make = Maker()
    rotation = Rotation(str(tmp_path / "image"), Plan())
    rotation.another(make)
    make.fails = [ParentMissing("gone")]
    rotation.another(make)
    rotation.another(make)
    assert make.made[1:] == [("image.000002", ""), ("image.000003", "image.000002")]


def test_something_else_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "image").write_text("mine")
    with pytest.raises(RotationName):
        Rotation(str(tmp_path / "image"), Plan())
    assert (tmp_path / "image").read_text() == "mine"
