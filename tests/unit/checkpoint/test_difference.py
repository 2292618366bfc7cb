"""Listings compared in stretches: what differs is what one would find row by row."""

import random

import pytest

from checkpoint.kernel.difference import differing

SIZE = 8


def key(row):
    return int.from_bytes(row[:4], "big")


def row(number, value=0):
    return number.to_bytes(4, "big") + value.to_bytes(4, "big")


def changed(chance, rows):
    kept = {number: value for number, value in rows.items() if chance.random() > 0.02}
    for number in chance.sample(sorted(kept), min(len(kept), chance.randrange(20))):
        kept[number] = chance.randrange(3)
    for _ in range(chance.randrange(20)):
        kept[chance.randrange(6000)] = 7
    return kept


def joined(rows):
    return b"".join(row(*one) for one in sorted(rows.items()))


@pytest.mark.parametrize("seed", range(30))
def test_it_finds_what_is_in_one_only(seed):
    chance = random.Random(seed)
    rows = dict.fromkeys(chance.sample(range(5000), chance.choice([0, 1, 15, 16, 17, 500, 3000])), 0)
    now = changed(chance, rows)
    gone, fresh = differing(joined(rows), joined(now), SIZE, key)
    assert gone == sorted(row(*one) for one in rows.items() - now.items())
    assert fresh == sorted(row(*one) for one in now.items() - rows.items())


@pytest.mark.parametrize("seed", range(10))
def test_in_any_order_nothing_is_taken_for_the_same_that_is_not(seed):
    chance = random.Random(seed)
    old = [row(chance.randrange(9), chance.randrange(3)) for _ in range(60)]
    new = chance.sample(old, 40) + [row(chance.randrange(9), 5) for _ in range(5)]
    chance.shuffle(new)
    gone, fresh = differing(b"".join(old), b"".join(new), SIZE, key)
    for found, one, other in ((gone, old, new), (fresh, new, old)):
        left = list(one)
        for each in found:
            left.remove(each)
        for each in left:
            assert each in other


def test_the_same_differ_in_nothing():
    rows = joined(dict.fromkeys(range(10_000), 1))
    assert differing(rows, bytes(rows), SIZE, key) == ([], [])
    assert differing(b"", b"", SIZE, key) == ([], [])
