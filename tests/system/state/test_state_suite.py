"""A sample of the suite: a case per module, in common trees, through one cycle.

`make campaign` runs every case alone, through three, and each without its modules.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.hosts import three_hosts
from tests.system.state.case import Case, load_all
from tests.system.state.suite import Bench, bench
from tests.system.state.without import modules

#: cases in one tree: at most so many
TOGETHER = 12
SEED = os.environ.get("TMH_SEED") or str(int.from_bytes(os.urandom(4), "little"))


def sample() -> list[Case]:
    """For every module that any case names, the first that does."""
    named: set[str] = set()
    taken = []
    for case in load_all().values():
        if not named.issuperset(case.exercises):
            named.update(case.exercises)
            taken.append(case)
    return taken


def groups() -> dict[str, list[Case]]:
    """Cases of one module share trees; those that cannot have their own."""
    found: dict[str, list[Case]] = {}
    for case in sample():
        module = case.name.partition(".")[0]
        if case.alone:
            found[case.name] = [case]
            continue
        number = 0
        while len(found.setdefault(f"{module} {number}", [])) == TOGETHER:
            number += 1
        found[f"{module} {number}"].append(case)
    return found


GROUPS = groups()


@pytest.fixture(scope="module")
def place() -> Iterator[Bench]:
    with three_hosts() as hosts, bench(hosts.source) as made:
        yield made


@pytest.mark.parametrize("group", GROUPS)
def test_cases(place: Bench, group: str) -> None:
    found = place.run(GROUPS[group], seed=f"{SEED}/{group}", cycles=1)
    bad = {name: problems for name, problems in found.items() if problems}
    assert not bad, "\n".join(f"{name}: {problem}" for name, problems in bad.items() for problem in problems)


def test_every_case_names_modules_that_exist() -> None:
    known = modules()
    for case in load_all().values():
        assert case.exercises, case.name
        assert not {*case.exercises} - {*known}, case.name
