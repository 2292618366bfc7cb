"""docs/reference/tcpstate.md: what its examples import exists, and they are Python."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs/reference/tcpstate.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_uses_what_there_is(example: str) -> None:
    for node in ast.walk(ast.parse(example)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


def test_every_call_of_the_paper_is_told_of() -> None:
    transport = importlib.import_module("tcpstate.transport")
    text = PAGE.read_text(encoding="utf-8")
    assert not [name for name in transport.__all__ if name.startswith("transport_") and name not in text]
