"""The campaign of broken lines as a test. TMH_SEED (1) changes it."""

import os

from tests.campaign.breaks import cases, run
from tests.campaign.run import STATE


def test_breaks() -> None:
    seed = int(os.environ.get("TMH_SEED", "1"))
    names = list(cases(stalls=True, calls=1000, seed=seed))
    found = run(names, STATE / f"breaks-{seed}.json")["cases"]
    assert [problem for each in found.values() for problem in each["problems"]] == []
    assert set(names) <= set(found)
    assert all(each["reached"] for name, each in found.items() if not name.startswith("call"))
