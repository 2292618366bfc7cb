"""Instances of frozen dataclasses, made quickly out of values that were looked at already.

Thousands of records are made while peers wait.  A frozen dataclass sets each field by a call of
``object.__setattr__`` and then checks everything; that is most of the cost of a record.  A twin with the same slots
that is not frozen sets them directly, and its instance becomes one of the real class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["maker"]

T = TypeVar("T")


def maker(cls: type[T], *fields: str) -> Callable[..., T]:
    """A function that takes the values of all fields, in this order, and returns an instance without checking them.

    ``fields`` are named where it is used, so that nobody confuses their order: TypeError unless they are exactly those
    of the class, a dataclass with slots.
    """
    declared = tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
    if fields != declared or "__slots__" not in cls.__dict__:
        raise TypeError(f"{cls.__name__} has slots, and fields {' '.join(declared)}")
    twin: Any = dataclasses.make_dataclass(
        f"_{cls.__name__}", [(name, object) for name in fields], slots=True, eq=False, repr=False
    )

    def make(*values: Any) -> T:
        made = twin(*values)
        made.__class__ = cls
        return made  # type: ignore[no-any-return]

    return make
