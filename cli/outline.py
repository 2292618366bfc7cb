"""Plain maps and lists as an indented outline, for a person: whatever a record holds, nothing needs to know of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["outline"]

_INDENT = "  "
# a list of scalars up to this many characters stays on one line
_WIDTH = 100


def outline(value: Any, depth: int = 0) -> Iterator[str]:
    """The lines of the outline of ``value``."""
    pad = _INDENT * depth
    if isinstance(value, dict):
        for key, inner in value.items():
            if (flat := _flat(inner)) is not None:
                yield f"{pad}{key}: {flat}"
            else:
                yield f"{pad}{key}:"
                yield from outline(inner, depth + 1)
    elif isinstance(value, list):
        for item in value:
            if (flat := _flat(item)) is not None:
                yield f"{pad}- {flat}"
                continue
            lines = list(outline(item, depth + 1))
            yield f"{pad}- {lines[0].removeprefix(pad + _INDENT)}"
            yield from lines[1:]
    else:
        yield f"{pad}{_scalar(value)}"


def _flat(value: Any) -> str | None:
    """``value`` on one line, or None if it takes more."""
    if isinstance(value, dict):
        return None if value else "{}"
    if not isinstance(value, list):
        return _scalar(value)
    if any(isinstance(item, dict | list) for item in value):
        return None
    line = "[" + ", ".join(_scalar(item) for item in value) + "]"
    return line if len(line) <= _WIDTH else None


def _scalar(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) and value else repr(value)
