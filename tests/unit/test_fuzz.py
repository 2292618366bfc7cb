"""A little fuzzing in every run of the tests; ``make fuzz`` does a million."""

from __future__ import annotations

import random
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.mutate import mutated
from tests.fuzz.run import chunk
from tests.fuzz.targets import TARGETS

names = pytest.mark.parametrize("name", TARGETS)


@names
def test_right_inputs_are_taken(name: str) -> None:
    for seed in TARGETS[name].seeds:
        TARGETS[name].run(seed)


@names
def test_wrong_inputs_give_the_one_error(name: str) -> None:
    assert chunk(name, f"every day/{name}", 500) == []


@names
@settings(max_examples=150)
@given(st.binary(max_size=300), st.randoms(use_true_random=False))
def test_any_bytes_give_the_one_error(name: str, data: bytes, chance: random.Random) -> None:
    TARGETS[name].run(data)
    TARGETS[name].run(mutated(TARGETS[name], chance))


def test_the_same_seed_makes_the_same_inputs() -> None:
    for target in TARGETS.values():
        one, other = (
            [mutated(target, chance) for _ in range(50)] for chance in (random.Random("s"), random.Random("s"))
        )
        assert one == other
        assert len(set(one)) > 25


def test_a_decoder_that_trusts_what_it_reads_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def trusting(data: bytes) -> None:
        plain = msgpack.unpackb(data[4:], strict_map_key=False)
        if not isinstance(plain["kind"], str):
            raise LookupError("what kind is that?")

    monkeypatch.setitem(TARGETS, "chaperone", replace(TARGETS["chaperone"], run=trusting))
    errors = {error.splitlines()[-1].partition(":")[0] for _, error in chunk("chaperone", "seed", 500)}
    assert {"KeyError", "LookupError", "TypeError"} <= errors
