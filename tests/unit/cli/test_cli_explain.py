"""`tcpmig explain`: every code has an answer."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from cli.errors import every_error
from cli.main import tcpmig
from tcpstate.errors import Outcome


@pytest.mark.parametrize("code", every_error())
def test_every_code_is_explained(code: str) -> None:
    result = CliRunner().invoke(tcpmig, ["explain", code])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{code} ")
    assert "What to do: " in result.stdout


@pytest.mark.parametrize("spelled", ["TM-0202", "tm-0202", "0202", "202", "TM0202"])
def test_a_code_may_be_spelled_loosely(spelled: str) -> None:
    result = CliRunner().invoke(tcpmig, ["explain", spelled, "--json"])
    found = json.loads(result.stdout)
    assert (found["outcome"], found["code"], found["name"], found["status"]) == (
        "done",
        "TM-0202",
        "NoSuchConnection",
        3,
    )


@pytest.mark.parametrize("spelled", ["TM-9999", "x", "", "TM-\u0661"])
def test_an_unknown_code_is_a_usage_mistake(spelled: str) -> None:
    result = CliRunner().invoke(tcpmig, ["explain", spelled])
    assert result.exit_code == Outcome.USAGE
    assert result.stderr.startswith("TM-0112: ")


def test_without_a_code_all_are_listed() -> None:
    result = CliRunner().invoke(tcpmig, ["explain", "--json"])
    assert json.loads(result.stdout)["codes"]["TM-0202"] == "NoSuchConnection"
    assert list(json.loads(result.stdout)["codes"]) == list(every_error())
