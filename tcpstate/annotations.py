"""What the annotation of a field means: :func:`typing.get_type_hints`, for one field, and without working out the same
text of a module again and again."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import typing
from typing import Any

__all__ = ["annotation"]

#: text in text, and what get_type_hints() makes simpler
_unusual = re.compile("[\"']|Annotated").search


def annotation(cls: type, name: str) -> Any:
    """That of an attribute, wherever it was inherited from. KeyError."""
    for base in cls.__mro__:
        own = _own(base)
        if name not in own:
            continue
        text = own[name]
        if isinstance(text, str) and not _unusual(text):
            return _evaluated(text, base.__module__)
        return typing.get_type_hints(cls)[name]
    raise KeyError(name)


# it looks long at what it is given
_own = functools.cache(inspect.get_annotations)


@functools.cache
def _evaluated(text: str, module: str) -> Any:
    found = eval(text, vars(sys.modules[module]))
    return type(None) if found is None else found
