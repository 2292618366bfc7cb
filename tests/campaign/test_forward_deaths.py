"""tcpmig killed at each moment of a move that begins or ends a forwarding."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts import ThreeHosts
from tests.system.test_forward import MOMENTS, die_and_recover


@pytest.mark.parametrize("way", ["there", "home"])
@pytest.mark.parametrize(("side", "moment", "state"), MOMENTS)
def test_a_death_is_settled_by_recover(
    hosts: ThreeHosts, tmp_path: Path, side: str, moment: str, state: str, way: str
) -> None:
    die_and_recover(hosts, tmp_path, side, moment, state, way)
