"""The campaign of broken lines as a test. TMH_SEED (1) changes it."""

import os

from tests.campaign.breaks import breaks_of_line, deaths_at_steps, run
from tests.campaign.run import STATE
from tests.workloads.steps import PLACES


def test_breaks() -> None:
    seed = int(os.environ.get("TMH_SEED", "1"))
    names = [*breaks_of_line(stalls=True), *deaths_at_steps(list(PLACES), most=1000, seed=seed)]
    found = run(names, STATE / f"breaks-{seed}.json")["cases"]
    assert [problem for each in found.values() for problem in each["problems"]] == []
    assert set(names) <= set(found)
    assert all(each["reached"] for name, each in found.items() if not name.startswith("call"))
