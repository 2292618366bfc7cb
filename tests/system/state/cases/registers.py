"""Registers, in programs that use them all the time."""

from __future__ import annotations

from collections.abc import Iterator

from tests.system.state.case import Here, case


@case("state/registers")
def counting_without_rest(here: Here) -> Iterator[None]:
    here.execute("registers")
    yield
