"""Pairs over loopback, moved many times. TMH_SEED (1) changes the moments."""

import os

from tests.system.test_local_pairs import Pair, move_often, pair

__all__ = ["pair"]


def test_pairs(pair: Pair) -> None:
    move_often(pair, 50, int(os.environ.get("TMH_SEED", "1")))
