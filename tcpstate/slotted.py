"""``dataclass``: that of the standard library, made without compiling text when a module is imported.

The standard library writes the text of ``__init__``, ``__repr__``, ``__eq__``, ``__hash__``, ``__setattr__`` and
``__delattr__`` of each class and compiles it.  We have some 450 classes: that was half of the time in which a command
imports itself.  Here all methods are functions that go by the fields; ``__init__``, which is called most, until so
many instances were made that it is worth it to compile one.  :func:`complete` compiles those that are left, so that no
stop has to.

A class is the same otherwise, :func:`dataclasses.fields`, :func:`dataclasses.replace`, matching and pickling included.
Two limits: slots are a must, and who inherits from such a class uses this decorator, too (the standard library's says
TypeError).
"""

from __future__ import annotations

import dataclasses
import operator
import reprlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

__all__ = ["complete", "dataclass"]

T = TypeVar("T")

_MISSING = dataclasses.MISSING
_ORDER = {
    "__lt__": operator.lt,
    "__le__": operator.le,
    "__gt__": operator.gt,
    "__ge__": operator.ge,
}

#: instances of a class that are made by its fields: to compile what makes them takes as long as so many
_FEW = 50
#: classes whose __init__ is not compiled yet, and what compiles it
_waiting: dict[type, Callable[[], Any]] = {}


def complete() -> None:
    """Compile every ``__init__`` that is not yet: what is timed must not meet one."""
    for compiled in list(_waiting.values()):
        compiled()


def _slotted(
    *,
    frozen: bool = False,
    slots: bool = False,
    kw_only: bool = False,
    eq: bool = True,
    order: bool = False,
) -> Callable[[type[T]], type[T]]:
    """The arguments of :func:`dataclasses.dataclass`. TypeError without slots."""
    if not slots:
        raise TypeError("it has to have slots")

    def wrap(cls: type[T]) -> type[T]:
        own = dict(cls.__dict__)
        if cls.__doc__ is None:
            # else the standard library makes one of the signature, which takes its time
            cls.__doc__ = cls.__name__
        # Not frozen to the standard library, which would compile what refuses to set a field.
        made: Any = dataclasses.dataclass(init=False, repr=False, eq=False, slots=True, kw_only=kw_only)(cls)
        fields = dataclasses.fields(made)
        if "__init__" not in own:
            _init_later(made, fields, frozen)
        if "__repr__" not in own:
            made.__repr__ = _repr
        compared = _values([field.name for field in fields if field.compare])
        if eq and "__eq__" not in own:
            made.__eq__ = _equality(compared)
        if order:
            for name, compare in _ORDER.items():
                setattr(made, name, _comparison(compared, compare))
        # a class that defines __eq__ alone has got a __hash__ of None by that
        if eq and (own.get("__hash__") is None if "__eq__" in own else "__hash__" not in own):
            chosen = [field.name for field in fields if (field.compare if field.hash is None else field.hash)]
            made.__hash__ = _hashing(_values(chosen)) if frozen else None
        if frozen:
            made.__setattr__, made.__delattr__ = _no_setting, _no_deleting
            for name, method in (("__getstate__", _get_state), ("__setstate__", _set_state)):
                if name not in own:
                    setattr(made, name, method)
        return made  # type: ignore[no-any-return]

    return wrap


def _init_later(made: Any, fields: tuple[dataclasses.Field[Any], ...], frozen: bool) -> None:
    def compiled() -> Callable[..., None]:
        init = _init(made, fields, frozen)
        made.__init__ = init
        _waiting.pop(made, None)
        return init

    uses = 0
    steps: list[_Step] | None = None

    def by_fields(self: Any, *values: Any, **named: Any) -> None:
        nonlocal uses, steps
        uses += 1
        if steps is None:
            steps = [_step(made, field) for field in fields]
        if uses > _FEW or not _filled(self, steps, values, named):
            # a mistake of the caller's is told as by any function
            compiled()(self, *values, **named)
        elif hasattr(made, "__post_init__"):
            self.__post_init__()

    made.__init__ = by_fields
    _waiting[made] = compiled


class _Step(NamedTuple):
    """How a field is set, by its slot: also where the class is frozen."""

    name: str
    place: bool
    named: bool
    set: Callable[[Any, Any], None]
    default: Any
    new: Any


def _step(made: Any, field: dataclasses.Field[Any]) -> _Step:
    place, named = field.init and not field.kw_only, field.init
    return _Step(field.name, place, named, getattr(made, field.name).__set__, field.default, field.default_factory)


def _filled(self: Any, steps: list[_Step], values: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether these were arguments for the fields, and all of them are set."""
    given = iter(values)
    used = 0
    for name, place, by_name, put, default, new in steps:
        value = next(given, _MISSING) if place else _MISSING
        if by_name and name in named:
            if value is not _MISSING:
                return False
            value = named[name]
            used += 1
        if value is _MISSING:
            value = default if new is _MISSING else new()
        if value is not _MISSING:
            put(self, value)
        elif by_name:
            return False
    return used == len(named) and next(given, _MISSING) is _MISSING


def _init(made: Any, fields: tuple[dataclasses.Field[Any], ...], frozen: bool) -> Callable[..., None]:
    """The function, compiled. A frozen class sets its fields by their slots: that is quicker than
    ``object.__setattr__``."""
    known: dict[str, Any] = {"_absent": _MISSING}
    places: list[str] = []
    named: list[str] = []
    lines: list[str] = []
    for field in fields:
        name, value = field.name, field.name
        default = ""
        if field.default is not _MISSING:
            known[f"_default_{name}"] = field.default
            default = f"_default_{name}"
        elif field.default_factory is not _MISSING:
            known[f"_new_{name}"] = field.default_factory
            value = f"_new_{name}() if {name} is _absent else {name}"
            default = "_absent"
        if field.init:
            (named if field.kw_only else places).append(f"{name}={default}" if default else name)
        elif default:
            value = f"_new_{name}()" if default == "_absent" else default
        else:
            continue
        if frozen:
            known[f"_set_{name}"] = getattr(made, name).__set__
            lines.append(f" _set_{name}(self, {value})")
        else:
            lines.append(f" self.{name} = {value}")
    if hasattr(made, "__post_init__"):
        lines.append(" self.__post_init__()")
    if named:
        named.insert(0, "*")
    exec(f"def __init__(self, {', '.join(places + named)}):\n" + "\n".join(lines or [" pass"]), known)
    init: Callable[..., None] = known["__init__"]
    init.__qualname__ = f"{made.__qualname__}.__init__"
    return init


def _values(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    if len(names) > 1:
        return operator.attrgetter(*names)
    # an attrgetter of one name does not give a tuple
    return lambda value: tuple([getattr(value, name) for name in names])


def _equality(values: Callable[[Any], tuple[Any, ...]]) -> Callable[[Any, Any], bool]:
    def equal(self: Any, other: Any) -> bool:
        return values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented

    return equal


def _comparison(
    values: Callable[[Any], tuple[Any, ...]], compare: Callable[[Any, Any], bool]
) -> Callable[[Any, Any], bool]:
    def ordered(self: Any, other: Any) -> bool:
        return compare(values(self), values(other)) if other.__class__ is self.__class__ else NotImplemented

    return ordered


def _hashing(values: Callable[[Any], tuple[Any, ...]]) -> Callable[[Any], int]:
    def hashed(self: Any) -> int:
        return hash(values(self))

    return hashed


@reprlib.recursive_repr("...")
def _repr(self: Any) -> str:
    shown = [f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self) if field.repr]
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _is_frozen_in(self: Any, name: str) -> bool:
    # a class that merely inherits may have attributes of its own
    return "__dataclass_fields__" in type(self).__dict__ or name in self.__dataclass_fields__


def _no_setting(self: Any, name: str, value: object) -> None:
    if _is_frozen_in(self, name):
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
    object.__setattr__(self, name, value)


def _no_deleting(self: Any, name: str) -> None:
    if _is_frozen_in(self, name):
        raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")
    object.__delattr__(self, name)


# pickling would set the fields as anybody does
def _get_state(self: Any) -> list[Any]:
    return [getattr(self, field.name) for field in dataclasses.fields(self)]


def _set_state(self: Any, state: list[Any]) -> None:
    for field, value in zip(dataclasses.fields(self), state, strict=True):
        object.__setattr__(self, field.name, value)


if TYPE_CHECKING:
    # to a checker it is the one that it knows
    from dataclasses import dataclass
else:
    dataclass = _slotted
