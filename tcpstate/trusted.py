"""Instances of frozen dataclasses, made quickly out of values that were looked at already.

Thousands of records are made while peers wait.  A frozen dataclass sets each field by a call of
``object.__setattr__`` and then checks everything; that is most of the cost of a record.  A twin with the same slots
that is not frozen sets them directly, and its instance becomes one of the real class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

__all__ = ["maker", "slots"]

T = TypeVar("T")


def slots(cls: type[Any], fields: Sequence[str]) -> list[Callable[[Any, Any], None]] | None:
    """What sets these fields of an instance, where one is made field by field; None unless they are exactly those of
    the class, a dataclass with slots."""
    if [field.name for field in dataclasses.fields(cls)] != list(fields) or "__slots__" not in cls.__dict__:
        return None
    return [getattr(cls, name).__set__ for name in fields]


def maker(cls: type[T], *fields: str) -> Callable[..., T]:
    """A function that takes the values of all fields, in this order, and returns an instance without checking them.

    ``fields`` are named where it is used, so that nobody confuses their order: TypeError unless they are exactly those
    of the class, a dataclass with slots.
    """
    declared = tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
    if fields != declared or "__slots__" not in cls.__dict__:
        raise TypeError(f"{cls.__name__} has slots, and fields {' '.join(declared)}")
    # Beside the class, on the same bases: only so can one's instance become the other's.  They may be frozen, too.
    known: dict[str, Any] = {}
    exec(
        f"def init(self, {', '.join(fields)}):\n" + "".join(f" self.{name} = {name}\n" for name in fields) + " pass",
        known,
    )
    body = {"__slots__": cls.__dict__["__slots__"], "__setattr__": object.__setattr__, "__init__": known["init"]}
    kind: Any = type(cls)
    twin: Any = kind(f"_{cls.__name__}", cls.__bases__, body)
    twin.__abstractmethods__ = frozenset()  # it has none of the class's methods, and needs none

    def make(*values: Any) -> T:
        made = twin(*values)
        made.__class__ = cls
        return made  # type: ignore[no-any-return]

    return make
