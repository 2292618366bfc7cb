"""Dataclasses to msgpack and back: the one codec of records, images and messages.

A captured thing is a dataclass; its type annotations are its schema.  ``pack`` writes a map of field names to values,
``unpack`` checks everything it reads against the annotations and raises :class:`~tcpstate.errors.BadRecord` for what
does not fit, naming the path to it.  Fields that the reader does not know are skipped, fields that the writer did not
know take their defaults: that is how records outlive versions.

Allowed annotations: ``bool int float str bytes None``, enums, ``X | None``, ``tuple[X, ...]``, ``tuple[X, Y]``,
``list[X]``, ``dict[K, V]``, ``frozenset[X]``, dataclasses, and *families*: a base class made with :func:`family` whose
members are told apart by a ``kind`` entry.  Rules beyond the type belong in ``__post_init__`` (raise ``ValueError``).

Records are written and read while processes stand still, thousands of dataclasses at a time.  So msgpack walks what it
knows by itself and asks us for dataclasses only; scalars are compared by class in their field, without a call; and the
path to a misfit is put together only when there is one.  What is worked out for a class at its first use takes longer
than the use: :func:`prepare` does that beforehand.  A command that reads a few records of many classes, once, would
spend a third of its time on it: there a class is read by its fields, one after the other, until it has been read often.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, NoReturn, TypeVar

import msgpack

from tcpstate import trusted
from tcpstate.annotations import annotation
from tcpstate.errors import BadRecord

__all__ = ["family", "from_plain", "member", "members", "pack", "prepare", "to_plain", "unpack"]

T = TypeVar("T")

# name of the map entry that tells the members of a family apart
_KIND = "kind"
_families: dict[type, dict[str, type]] = {}
_kind_of: dict[type, str] = {}


def family(base: type[T]) -> type[T]:
    """Class decorator: values annotated with ``base`` are written with the kind of their own class."""
    _families[base] = {}
    return base


def member(base: type[Any], kind: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: the class belongs to the family ``base`` under the name ``kind``."""

    def add(cls: type[T]) -> type[T]:
        if kind in _families[base]:
            raise RuntimeError(f"two members of {base.__name__} are called {kind!r}")
        _families[base][kind] = cls
        _kind_of[cls] = kind
        return cls

    return add


def members(base: type[T]) -> dict[str, type[T]]:
    """The family's table: kind to class."""
    return dict(_families[base])


def kind_of(cls: type) -> str:
    """The name that the class has in its family."""
    return _kind_of[cls]


def to_plain(value: Any) -> Any:
    """``value`` as maps, lists, numbers, text and bytes (what msgpack and, bytes apart, JSON can write)."""
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, dict):
        return {to_plain(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    return to_plain(_outermost(value))


def _outermost(value: Any) -> Any:
    """One step of to_plain(), for what msgpack does not write by itself: the things inside stay what they are."""
    cls = type(value)
    if dataclasses.is_dataclass(cls):
        return _encoder(cls)(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, frozenset | set):
        return sorted(value)
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, int):
        raise OverflowError(f"{value} has more than 64 bits")
    raise TypeError(f"{cls.__name__} is not a recordable type")


@functools.cache
def _encoder(cls: type) -> Callable[[Any], dict[str, Any]]:
    """What makes the map of a dataclass: names to its values, and its kind."""
    names = tuple(field.name for field, _ in _fields(cls))
    kind = {_KIND: _kind_of[cls]} if cls in _kind_of else {}
    if len(names) > 1:
        values = operator.attrgetter(*names)
        return lambda value: dict(zip(names, values(value), strict=True), **kind)
    # an attrgetter of one name does not give a tuple
    return lambda value: {name: getattr(value, name) for name in names} | kind


def from_plain(cls: Any, plain: Any) -> Any:
    """A value of the annotated type ``cls`` out of what :func:`to_plain` made; BadRecord if it does not fit."""
    try:
        return _decoder(cls).decode(plain)
    except _Misfit as misfit:
        raise BadRecord(f"{misfit.path.removeprefix('.') or misfit.subject}: {misfit.text}") from None


def pack(value: Any) -> bytes:
    """msgpack bytes of a dataclass (or any other recordable value)."""
    # paths are text in which bytes that are no UTF-8 are escaped, as everywhere in Python (os.fsdecode)
    packed: bytes = msgpack.packb(value, default=_outermost, use_bin_type=True, unicode_errors="surrogateescape")
    return packed


def unpack(cls: type[T], data: bytes | memoryview) -> T:
    """The value of type ``cls`` in ``data``; BadRecord for anything that is not exactly one such value."""
    try:
        # the limits follow from the length of the data: a short message cannot ask for a large allocation
        plain = msgpack.unpackb(data, raw=False, strict_map_key=False, use_list=True, unicode_errors="surrogateescape")
    except (ValueError, msgpack.exceptions.UnpackException, TypeError, RecursionError) as error:
        raise BadRecord(f"not a msgpack record: {error}") from None
    value: T = from_plain(cls, plain)
    return value


def prepare(*classes: Any, unpacked: bool = True) -> None:
    """Work out beforehand all that packing values annotated with these takes, and, if they are ``unpacked`` here, what
    unpacking them takes: that is most of it."""
    todo, seen = list(classes), set[Any]()
    while todo:
        hint = todo.pop()
        if hint in seen or hint is Ellipsis:
            continue
        seen.add(hint)
        if unpacked:
            _decoder_written(hint)
        todo += typing.get_args(hint)
        todo += _families.get(hint, {}).values()
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint not in _families:
            _encoder(hint)
            todo += [inner for _, inner in _fields(hint)]


def _decoder_written(hint: Any) -> None:
    _often.append(True)
    try:
        _decoder(hint)
    finally:
        _often.pop()
    if hint in _unwritten:
        _unwritten[hint]()


@functools.cache
def _fields(cls: type) -> tuple[tuple[dataclasses.Field[Any], Any], ...]:
    """(field, annotation) of each that is written and read."""
    return tuple((field, annotation(cls, field.name)) for field in dataclasses.fields(cls) if field.init)


class _Misfit(Exception):
    """Something does not fit; the path to it grows on the way out.

    subject  what is named if the path is empty
    """

    def __init__(self, text: str, subject: str = "record") -> None:
        super().__init__(text)
        self.text = text
        self.subject = subject
        self.path = ""

    def inside(self, step: str) -> _Misfit:
        """The same, as seen from one step further out."""
        self.path = step + self.path
        return self


class _Decoder(NamedTuple):
    """How values of one annotation are read.

    exact   values of this very class are taken as they are; None: none are
    decode  all others: a value, or _Misfit
    """

    exact: type | None
    decode: Callable[[Any], Any]


def _misfit(want: str, got: Any) -> NoReturn:
    raise _Misfit(f"expected {want}, found {type(got).__name__}")


def _scalar(kind: type) -> _Decoder:
    def decode(plain: Any) -> Any:
        # bool is a subclass of int, and must not pass for one
        if type(plain) is not kind:
            _misfit(kind.__name__, plain)
        return plain

    return _Decoder(kind, decode)


def _float(plain: Any) -> float:
    if type(plain) not in (int, float):
        _misfit("float", plain)
    return float(plain)


def _none(plain: Any) -> None:
    if plain is not None:
        _misfit("nothing", plain)


def _enum(cls: type[enum.Enum]) -> _Decoder:
    def decode(plain: Any) -> Any:
        if isinstance(plain, bool) or not isinstance(plain, int | str):
            _misfit(cls.__name__, plain)
        try:
            return cls(plain)
        except ValueError:
            raise _Misfit(f"{plain!r} is not a {cls.__name__}", "") from None

    return _Decoder(None, decode)


def _sequence(item: Any, make: Callable[[list[Any]], Any]) -> _Decoder:
    exact, inner = _decoder(item)

    def decode(plain: Any) -> Any:
        if type(plain) is not list:
            _misfit("list", plain)
        values: list[Any] = []
        try:
            for value in plain:
                values.append(value if value.__class__ is exact else inner(value))
            return make(values)
        except _Misfit as misfit:
            raise misfit.inside(f"[{len(values)}]") from None
        except TypeError:
            raise _Misfit("items of this kind cannot be in a set", "") from None

    return _Decoder(None, decode)


def _fixed_tuple(items: tuple[Any, ...]) -> _Decoder:
    inner = [_decoder(item).decode for item in items]

    def decode(plain: Any) -> Any:
        if type(plain) is not list or len(plain) != len(inner):
            _misfit(f"list of {len(inner)}", plain)
        values: list[Any] = []
        try:
            for one, value in zip(inner, plain, strict=True):
                values.append(one(value))
        except _Misfit as misfit:
            raise misfit.inside(f"[{len(values)}]") from None
        return tuple(values)

    return _Decoder(None, decode)


def _mapping(key: Any, value: Any) -> _Decoder:
    keys, values = _decoder(key).decode, _decoder(value).decode

    def decode(plain: Any) -> Any:
        if type(plain) is not dict:
            _misfit("map", plain)
        found = {}
        for k, v in plain.items():
            try:
                made = keys(k)
            except _Misfit as misfit:
                raise misfit.inside(" key") from None
            try:
                found[made] = values(v)
            except _Misfit as misfit:
                raise misfit.inside(f"[{k!r}]") from None
        return found

    return _Decoder(None, decode)


def _union(options: tuple[Any, ...]) -> _Decoder:
    rest = [o for o in options if o is not type(None)]
    if len(rest) != 1 or len(rest) == len(options):
        raise TypeError(f"only X | None is a recordable union, not {options}; use a family")
    exact, inner = _decoder(rest[0])
    return _Decoder(exact, lambda plain: None if plain is None else inner(plain))


_ABSENT: Final = object()
_EXACT: Final = frozenset({bool, int, float, str, bytes})


def _absent_or(cls: type, field: dataclasses.Field[Any], hint: Any) -> Callable[[Any], Any]:
    """What reads a field's value if it is not of the very class that is usual: also the one that is not there."""
    inner: Callable[[Any], Any] | None = None
    name = field.name

    def decode(value: Any) -> Any:
        nonlocal inner
        if value is _ABSENT:
            if field.default is not dataclasses.MISSING:
                return field.default
            if field.default_factory is not dataclasses.MISSING:
                return field.default_factory()
            raise _Misfit(f"{name} is missing", cls.__name__)
        if inner is None:
            # looked up at the first use: dataclasses may refer to each other
            inner = _decoder(hint).decode
        try:
            return inner(value)
        except _Misfit as misfit:
            raise misfit.inside(f".{name}") from None

    return decode


class _Step(NamedTuple):
    """How a field is read: a value of one of these classes is taken as it is."""

    name: str
    exact: frozenset[type]
    other: Callable[[Any], Any]


#: how often a class is read by its fields before a function is written for it
_SELDOM: Final = 100
#: not empty: classes will be read often
_often: list[bool] = []
#: what writes it, of those for which none is written yet
_unwritten: dict[type, Callable[[], Any]] = {}


def _dataclass(cls: type) -> _Decoder:
    """By the fields, until it is worth it to write a function for the class."""
    steps = [_step(cls, field, hint) for field, hint in _fields(cls)]
    if _often:
        return _Decoder(None, _written(cls, steps))
    names = [step.name for step in steps]
    rules = getattr(cls, "__post_init__", None)
    slots = trusted.slots(cls, names)
    uses = 0
    written: Callable[[Any], Any] | None = None

    def write() -> Callable[[Any], Any]:
        nonlocal written
        _unwritten.pop(cls, None)
        written = _written(cls, steps)
        return written

    def decode(plain: Any) -> Any:
        nonlocal uses
        if written is not None:
            return written(plain)
        uses += 1
        if uses > _SELDOM:
            return write()(plain)
        if type(plain) is not dict:
            _misfit(cls.__name__, plain)
        values = []
        for name, exact, other in steps:
            value = plain.get(name, _ABSENT)
            values.append(value if value.__class__ in exact else other(value))
        try:
            if slots is None:
                return cls(**dict(zip(names, values, strict=True)))
            made: Any = object.__new__(cls)
            for slot, value in zip(slots, values, strict=True):
                slot(made, value)
            if rules is not None:
                rules(made)
        except ValueError as error:
            raise _Misfit(str(error), cls.__name__) from None
        return made

    _unwritten[cls] = write
    return _Decoder(None, decode)


def _step(cls: type, field: dataclasses.Field[Any], hint: Any) -> _Step:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    usual = _EXACT.intersection(options) | {type(None)}.intersection(options)
    return _Step(field.name, frozenset(usual), _absent_or(cls, field, hint))


def _written(cls: type, steps: Sequence[_Step]) -> Callable[[Any], Any]:
    """A function written for the class, as dataclasses write theirs: field after field, without a loop and a map of
    values.  What was checked is put into an instance directly (:mod:`tcpstate.trusted`); rules of the class's own come
    last."""
    names = [step.name for step in steps]
    known: dict[str, Any] = {"absent": _ABSENT, "cls": cls, "misfit": _misfit, "Misfit": _Misfit}
    lines = ["def decode(plain):", " if type(plain) is not dict:", "  misfit(cls.__name__, plain)", " get = plain.get"]
    for i, step in enumerate(steps):
        unusual = [f"v{i} is not None"] if type(None) in step.exact else []
        for kind in step.exact - {type(None)}:
            known[f"kind{i}"] = kind
            unusual.append(f"v{i}.__class__ is not kind{i}")
        known[f"other{i}"] = step.other
        lines.append(f" v{i} = get({step.name!r}, absent)")
        if unusual:
            lines.append(f" if {' and '.join(unusual)}:")
        lines.append(f"{'  ' if unusual else ' '}v{i} = other{i}(v{i})")
    values = ", ".join(f"v{i}" for i in range(len(steps)))
    rules = getattr(cls, "__post_init__", None)
    try:
        known["make"] = trusted.maker(cls, *names)
    except TypeError:
        # one that inherits fields, or has no slots
        values = ", ".join(f"{name}=v{i}" for i, name in enumerate(names))
        known["make"], rules = cls, None
        lines += [" try:", f"  return make({values})"]
    else:
        lines += [f" made = make({values})"]
        if rules is None:
            lines += [" return made"]
        else:
            known["rules"] = rules
            lines += [" try:", "  rules(made)", "  return made"]
    if lines[-1].startswith("  "):
        lines += [" except ValueError as error:", "  raise Misfit(str(error), cls.__name__) from None"]
    exec("\n".join(lines), known)
    decode: Callable[[Any], Any] = known["decode"]
    return decode


def _family(base: type) -> _Decoder:
    table = _families[base]

    def decode(plain: Any) -> Any:
        if type(plain) is not dict:
            _misfit(base.__name__, plain)
        kind = plain.get(_KIND)
        if not isinstance(kind, str) or kind not in table:
            raise _Misfit(f"unknown kind {kind!r}", base.__name__)
        return _dataclass_decoder(table[kind]).decode(plain)

    return _Decoder(None, decode)


@functools.cache
def _dataclass_decoder(cls: type) -> _Decoder:
    return _dataclass(cls)


@functools.cache
def _decoder(hint: Any) -> _Decoder:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _union(args)
    if origin is tuple:
        return _sequence(args[0], tuple) if args[1:] == (Ellipsis,) else _fixed_tuple(args)
    if origin is list:
        return _sequence(args[0], list)
    if origin is frozenset:
        return _sequence(args[0], frozenset)
    if origin is dict:
        return _mapping(*args)
    if hint is type(None):
        return _Decoder(None, _none)
    if hint is float:
        return _Decoder(float, _float)
    if hint in (bool, int, str, bytes):
        return _scalar(hint)
    if hint in _families:
        return _family(hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enum(hint)
    if dataclasses.is_dataclass(hint):
        return _dataclass_decoder(typing.cast(type, hint))
    raise TypeError(f"{hint!r} is not a recordable annotation")
