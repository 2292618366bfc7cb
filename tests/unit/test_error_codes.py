"""The error classes: one code each, in the range of their room, explained, and listed in the reference."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from cli.errors import every_error
from tcpstate.errors import Outcome, TcpmigError

ROOT = Path(__file__).resolve().parent.parent.parent
# those of the rooms: a test may define others
ERRORS = {code: error for code, error in every_error().items() if ".errors" in error.__module__}
# first digits of the code -> rooms that may own it (the docstring of tcpstate/errors)
RANGES = {
    "01": {"tcpstate", "cli"},
    "02": {"tcpstate"},
    "03": {"checkpoint"},
    "04": {"checkpoint"},
    "05": {"checkpoint"},
    "06": {"migrate"},
    "07": {"checkpoint", "migrate"},
    "08": {"checkpoint"},
}


def _codes_in_source() -> list[tuple[str, str, str]]:
    """(code, class, file) of every class body that gives itself a code."""
    found = []
    for room in ("tcpstate", "checkpoint", "migrate", "cli"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.ClassDef):
                    continue
                for line in node.body:
                    value = line.value if isinstance(line, ast.Assign | ast.AnnAssign) else None
                    if isinstance(value, ast.Constant) and str(value.value).startswith("TM-"):
                        found.append((str(value.value), node.name, str(path.relative_to(ROOT))))
    return found


def test_a_code_belongs_to_one_class() -> None:
    codes = [code for code, _, _ in _codes_in_source()]
    assert sorted(codes) == sorted(set(codes))


def test_errors_are_defined_where_the_catalogue_looks() -> None:
    # an error class elsewhere would be unknown to `tcpmig explain`
    assert {str(Path(path).parent) for _, _, path in _codes_in_source() if path != "cli/errors.py"} == {
        f"{room}/errors" for room in ("tcpstate", "checkpoint", "migrate")
    }
    assert {code for code, _, _ in _codes_in_source()} == set(ERRORS)


@pytest.mark.parametrize("code", ERRORS)
def test_an_error_explains_itself(code: str) -> None:
    error = ERRORS[code]
    assert error.__doc__
    assert len(error.__doc__.split()) >= 8, "why it happens takes a sentence"
    assert error.fix.strip()
    assert error.fix.endswith("."), "the fix ends the one-line message"
    assert isinstance(error.outcome, Outcome)
    assert error.outcome is not Outcome.DONE


@pytest.mark.parametrize("code", ERRORS)
def test_a_code_lies_in_the_range_of_its_room(code: str) -> None:
    assert ERRORS[code].__module__.split(".")[0] in RANGES[code[3:5]]


@pytest.mark.parametrize("code", ERRORS)
def test_an_error_class_has_its_own_words(code: str) -> None:
    error = ERRORS[code]
    if error is not TcpmigError:
        assert "__doc__" in vars(error)
        assert "code" in vars(error)
        assert error.fix != TcpmigError.fix, "general advice is no advice"


def test_the_reference_is_up_to_date() -> None:
    # in a process of its own: other tests define errors, too
    script = [sys.executable, str(ROOT / "scripts/errors_reference.py")]
    page = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs/reference/errors.md").read_text(encoding="utf-8") == page, "run `make docs`"
