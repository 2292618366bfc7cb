"""The campaign of deaths as a test. TMH_SEED (1) changes it."""

import os

import pytest

from tests.campaign.deaths import COUNTS, run


@pytest.mark.parametrize("kind", COUNTS)
def test_deaths(kind: str) -> None:
    state = run(kind, COUNTS[kind], int(os.environ.get("TMH_SEED", "1")))
    assert [problem for death in state["deaths"] for problem in death["problems"]] == []
    assert len(state["deaths"]) == COUNTS[kind]
    if kind != "precopy":
        # many hit it while it is stopped or seized
        assert sum(death["inside"] for death in state["deaths"]) > COUNTS[kind] / 4
