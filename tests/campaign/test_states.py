"""The suite of states whole, and with each module in turn made to do nothing. TMH_SEED (1) changes the moments."""

import os

from tests.campaign import mutations, states

SEED = int(os.environ.get("TMH_SEED", "1"))


def test_every_case_alone() -> None:
    bad = {name: problems for name, problems in states.run(seed=SEED).items() if problems}
    assert bad == {}


def test_every_case_fails_without_its_modules() -> None:
    found = mutations.run(seed=SEED)
    print(mutations.table(found))
    silent = {module: cases for module, cases in found.items() if not all(cases.values())}
    assert silent == {}
