"""A thousand checkpoints at random moments. TMH_SEED (1) changes the moments."""

import os

from tests.campaign import stress


def test_a_thousand_checkpoints_at_random_moments() -> None:
    found = stress.run(seed=int(os.environ.get("TMH_SEED", "1")))
    assert {name: problems for name, problems in found.items() if problems} == {}
