"""The rules of the house that a machine can check (docs/design, CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# from the ground up: an import may point to a room further left, or into its own
ROOMS = ["tcpstate", "checkpoint", "migrate", "cli"]
MOST_LINES = 500
# Machine names may stand where the machine is the subject.
MACHINE_PLACES = ("tcpstate/kernel/machine/", "checkpoint/arch/")
MACHINE_WORDS = re.compile(r"x86|amd64|aarch64|arm64", re.IGNORECASE)

FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


@pytest.fixture(params=FILES, ids=NAMES)
def source(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imported(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, ("." * node.level) + (node.module or "")


def test_every_room_is_found() -> None:
    assert {name.split("/")[0] for name in NAMES} == set(ROOMS)


def test_imports_point_down_only(source: Path) -> None:
    room = source.relative_to(ROOT).parts[0]
    above = ROOMS[ROOMS.index(room) + 1 :]
    wrong = [f"line {line}: {name}" for line, name in _imported(source) if name.split(".")[0] in [*above, "tests"]]
    assert not wrong


def test_imports_name_their_room(source: Path) -> None:
    # a relative import would hide from the test above
    assert not [f"line {line}" for line, name in _imported(source) if name.startswith(".")]


def test_one_subject_fits_in_500_lines(source: Path) -> None:
    assert len(source.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_one_subject_of_the_tests_fits_in_500_lines() -> None:
    counts = {path: path.read_text(encoding="utf-8").count("\n") for path in (ROOT / "tests").rglob("*.py")}
    assert not [str(path.relative_to(ROOT)) for path, count in counts.items() if count > MOST_LINES]


def test_no_error_is_swallowed(source: Path) -> None:
    wrong = []
    for node in ast.walk(_tree(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
        if node.type is None or silent:
            wrong.append(f"line {node.lineno}: " + ("bare except" if node.type is None else "except: pass"))
    assert not wrong


def test_no_assert_checks_input(source: Path) -> None:
    # python -O removes them
    tree = _tree(source)
    assert not [f"line {node.lineno}" for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def test_no_work_is_put_off(source: Path) -> None:
    marks = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b")
    lines = source.read_text(encoding="utf-8").splitlines()
    assert not [f"line {number}: {line.strip()}" for number, line in enumerate(lines, 1) if marks.search(line)]


def test_the_machine_is_named_in_its_own_place(source: Path) -> None:
    # comments and docstrings may tell where a layout comes from; code must not ask which machine this is
    if str(source.relative_to(ROOT)).startswith(MACHINE_PLACES):
        return
    tree = _tree(source)
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    wrong = [f"line {line}: {name}" for line, name in _imported(source) if MACHINE_WORDS.search(name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            words = node.value
        elif isinstance(node, ast.Name | ast.Attribute):
            words = ast.unparse(node)
        else:
            continue
        if MACHINE_WORDS.search(words):
            wrong.append(f"line {node.lineno}: {words}")
    assert not wrong


def test_heavy_imports_are_made_where_they_are_needed(source: Path) -> None:
    heavy = {"pyroute2", "rich", "cryptography"}
    tree = _tree(source)
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [a.name for n in top if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in top if isinstance(n, ast.ImportFrom)]
    assert not heavy & {name.split(".")[0] for name in names}


@pytest.mark.parametrize("room", ROOMS)
def test_the_room_says_that_it_is_typed(room: str) -> None:
    assert (ROOT / room / "py.typed").is_file()


@pytest.mark.parametrize("room", ROOMS)
def test_every_package_is_one(room: str) -> None:
    # setuptools leaves out a directory without __init__.py
    bare = {path.parent for path in (ROOT / room).rglob("*.py")} - {
        p.parent for p in (ROOT / room).rglob("__init__.py")
    }
    assert not bare
