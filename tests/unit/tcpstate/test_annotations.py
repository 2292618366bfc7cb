"""What the annotations of our records mean is what the standard library says, class by class."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import typing
from typing import Annotated, Any

import pytest

from tcpstate.annotations import annotation

ROOMS = ("tcpstate", "checkpoint", "migrate")


def ours() -> set[type]:
    importlib.import_module("cli.commands.restore")
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in ROOMS]
    return {x for one in modules for x in vars(one).values() if isinstance(x, type) and dataclasses.is_dataclass(x)}


def test_it_is_what_the_standard_library_says() -> None:
    compared = 0
    for cls in ours():
        try:
            hints = typing.get_type_hints(cls)
        except (NameError, TypeError):
            continue  # something that only a checker knows: no record
        for field in dataclasses.fields(cls):
            assert annotation(cls, field.name) == hints[field.name], (cls, field.name)
            compared += 1
    assert compared > 1000


class Base:
    inherited: int | None


class Odd(Base):
    quoted: tuple["Base", ...]  # noqa: UP037
    nothing: None
    told: Annotated[int, "of something"]


@pytest.mark.parametrize(
    ("name", "meaning"),
    [("inherited", int | None), ("quoted", tuple[Base, ...]), ("nothing", type(None)), ("told", int)],
)
def test_what_is_seldom_in_an_annotation_is_understood(name: str, meaning: Any) -> None:
    assert annotation(Odd, name) == meaning


def test_who_has_no_such_attribute_is_told() -> None:
    with pytest.raises(KeyError):
        annotation(Odd, "absent")
