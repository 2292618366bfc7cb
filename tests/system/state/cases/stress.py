"""Everything at once; the campaign (tests/campaign/stress.py) does nothing else, a thousand times."""

from __future__ import annotations

from collections.abc import Iterator

from tests.system.state.case import Here, case


@case("state/registers", alone=True)
def everything_at_once(here: Here) -> Iterator[None]:
    here.execute("stress")
    yield
