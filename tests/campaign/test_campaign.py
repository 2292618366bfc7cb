"""The campaigns as tests. TMH_SEED (1) and TMH_RATE (MB/s in each direction, 0 = full speed) change them."""

import os

import pytest

from tests.campaign import restores, sessions
from tests.campaign.run import CAMPAIGNS, Campaign, run


@pytest.mark.parametrize("campaign", CAMPAIGNS, ids=lambda campaign: campaign.name)
def test_campaign(campaign: Campaign) -> None:
    state = run(campaign, seed=int(os.environ.get("TMH_SEED", "1")), rate=float(os.environ.get("TMH_RATE", "0")))
    problems = [problem for leg in state["legs"] for problem in leg["problems"]]
    assert problems == []
    assert sum(len(leg["moves"]) for leg in state["legs"]) == campaign.moves


def test_sshd_with_a_live_session() -> None:
    state = sessions.run(seed=int(os.environ.get("TMH_SEED", "1")))
    assert [problem for leg in state["legs"] for problem in leg["problems"]] == []
    assert sum(len(leg["moves"]) for leg in state["legs"]) == state["moves"]


@pytest.mark.parametrize("name", restores.NAMES)
def test_through_a_file(name: str) -> None:
    state = restores.run(name, seed=int(os.environ.get("TMH_SEED", "1")))
    assert [problem for leg in state["legs"] for problem in leg["problems"]] == []
    assert sum(len(leg["restores"]) for leg in state["legs"]) == state["times"]
