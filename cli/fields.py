"""Summaries of the library as the fields of a result."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["fields"]


def fields(summary: Any) -> dict[str, object]:
    """The fields of a summary (a dataclass). Its outcome is left out: the session prints that."""
    return {f.name: getattr(summary, f.name) for f in dataclasses.fields(summary) if f.name != "outcome"}
