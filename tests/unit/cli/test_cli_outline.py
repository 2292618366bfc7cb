"""The outline of plain data for a person: complete, whatever it is given."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cli.outline import outline

SCALARS = st.none() | st.booleans() | st.integers(0, 9999) | st.text(alphabet="abc", min_size=1, max_size=5)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["x", "y", "z"]), inner, max_size=4),
    max_leaves=20,
)


def numbers(value: Any) -> list[int]:
    """Every scalar that is a number, in order."""
    if isinstance(value, dict):
        return [n for inner in value.values() for n in numbers(inner)]
    if isinstance(value, list):
        return [n for inner in value for n in numbers(inner)]
    return [value] if type(value) is int else []


@given(PLAIN)
def test_nothing_is_left_out(value: Any) -> None:
    text = "\n".join(outline(value))
    assert [int(found) for found in re.findall(r"\d+", text)] == numbers(value)


def test_a_record_reads_as_one_would_write_it() -> None:
    record = {
        "pid": 12,
        "name": "",
        "gone": None,
        "stopped": False,
        "fds": [1, 2],
        "files": [{"kind": "pipe", "data": {"size": 3}}, {"kind": "eventfd"}],
        "empty": {},
        "none": [],
    }
    assert list(outline(record)) == [
        "pid: 12",
        "name: ''",
        "gone: -",
        "stopped: no",
        "fds: [1, 2]",
        "files:",
        "  - kind: pipe",
        "    data:",
        "      size: 3",
        "  - kind: eventfd",
        "empty: {}",
        "none: []",
    ]
