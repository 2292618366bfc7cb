"""Records of asynchronous I/O contexts are checked: they come from files and wires."""

from __future__ import annotations

import dataclasses

import pytest

from checkpoint.kernel import aio
from checkpoint.memory.aio import Ring, require_apart

AT = 0x7F0000000000


def ring(*, number: int = 0, nr: int = 127, head: int = 0, tail: int = 0, magic: int = aio.RING_MAGIC) -> Ring:
    content = aio.RING.pack(number, nr, head, tail, magic, 1, 0, 32)
    return Ring(start=AT, end=AT + 4096, number=number, limit=1, content=content)


@pytest.mark.parametrize(("head", "tail", "unread"), [(0, 0, 0), (5, 9, 4), (120, 3, 10), (0, 126, 126)])
def test_what_nobody_has_fetched(head: int, tail: int, unread: int) -> None:
    assert ring(head=head, tail=tail).unread == unread


@pytest.mark.parametrize(
    "wrong",
    [{"nr": 126}, {"head": 127}, {"tail": 127}, {"magic": 1}, {"number": aio.MOST}],
)
def test_a_head_that_does_not_fit_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"ring|context"):
        ring(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": AT + 1},
        {"end": AT},
        {"end": 1 << 60},
        {"limit": 0},
        {"number": 1},
        {"content": b"short"},
        {"content": bytes(5000)},
    ],
)
def test_a_record_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"ring|context"):
        dataclasses.replace(ring(), **wrong)


def test_rings_overlap_nothing_and_have_numbers_of_their_own() -> None:
    one, area = ring(), (AT, AT + 4096)
    require_apart([one], [area, (AT + 4096, AT + 8192)])
    require_apart([], [area, area])
    with pytest.raises(ValueError, match="overlaps"):
        require_apart([one], [area, (AT + 2048, AT + 8192)])
    with pytest.raises(ValueError, match="same number"):
        require_apart([one, one], [area])
