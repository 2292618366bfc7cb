"""Dataclasses to msgpack and back: the one codec of records, images and messages.

A captured thing is a dataclass; its type annotations are its schema.  ``pack`` writes a map of field names to values,
``unpack`` checks everything it reads against the annotations and raises :class:`~tcpstate.errors.BadRecord` for what
does not fit, naming the path to it.  Fields that the reader does not know are skipped, fields that the writer did not
know take their defaults: that is how records outlive versions.

Allowed annotations: ``bool int float str bytes None``, enums, ``X | None``, ``tuple[X, ...]``, ``tuple[X, Y]``,
``list[X]``, ``dict[K, V]``, ``frozenset[X]``, dataclasses, and *families*: a base class made with :func:`family` whose
members are told apart by a ``kind`` entry.  Rules beyond the type belong in ``__post_init__`` (raise ``ValueError``).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import msgpack

from tcpstate.errors import BadRecord

__all__ = ["family", "from_plain", "member", "members", "pack", "to_plain", "unpack"]

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
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {name: to_plain(getattr(value, name)) for name, _, _ in _fields(type(value))}
        kind = _kind_of.get(type(value))
        if kind is not None:
            plain[_KIND] = kind
        return plain
    if isinstance(value, dict):
        return {to_plain(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, frozenset | set):
        return [to_plain(v) for v in sorted(value)]
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    raise TypeError(f"{type(value).__name__} is not a recordable type")


def from_plain(cls: Any, plain: Any, path: str = "") -> Any:
    """A value of the annotated type ``cls`` out of what :func:`to_plain` made; BadRecord if it does not fit."""
    return _decoder(cls)(plain, path)


def pack(value: Any) -> bytes:
    """msgpack bytes of a dataclass (or any other recordable value)."""
    # paths are text in which bytes that are no UTF-8 are escaped, as everywhere in Python (os.fsdecode)
    packed: bytes = msgpack.packb(to_plain(value), use_bin_type=True, unicode_errors="surrogateescape")
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


@functools.cache
def _fields(cls: type) -> tuple[tuple[str, Any, bool], ...]:
    """(name, annotation, required) of each field."""
    hints = typing.get_type_hints(cls)
    return tuple(
        (f.name, hints[f.name], f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)
        for f in dataclasses.fields(cls)
        if f.init
    )


_Decoder = Callable[[Any, str], Any]


def _bad(path: str, want: str, got: Any) -> BadRecord:
    return BadRecord(f"{path or 'record'}: expected {want}, found {type(got).__name__}")


def _scalar(kind: type) -> _Decoder:
    def decode(plain: Any, path: str) -> Any:
        # bool is a subclass of int, and must not pass for one
        if type(plain) is not kind:
            raise _bad(path, kind.__name__, plain)
        return plain

    return decode


def _float(plain: Any, path: str) -> float:
    if type(plain) not in (int, float):
        raise _bad(path, "float", plain)
    return float(plain)


def _none(plain: Any, path: str) -> None:
    if plain is not None:
        raise _bad(path, "nothing", plain)


def _enum(cls: type[enum.Enum]) -> _Decoder:
    def decode(plain: Any, path: str) -> Any:
        if isinstance(plain, bool) or not isinstance(plain, int | str):
            raise _bad(path, cls.__name__, plain)
        try:
            return cls(plain)
        except ValueError:
            raise BadRecord(f"{path}: {plain!r} is not a {cls.__name__}") from None

    return decode


def _sequence(item: Any, make: Callable[[list[Any]], Any]) -> _Decoder:
    inner = _decoder(item)

    def decode(plain: Any, path: str) -> Any:
        if not isinstance(plain, list):
            raise _bad(path, "list", plain)
        try:
            return make([inner(v, f"{path}[{i}]") for i, v in enumerate(plain)])
        except TypeError:
            raise BadRecord(f"{path}: items of this kind cannot be in a set") from None

    return decode


def _fixed_tuple(items: tuple[Any, ...]) -> _Decoder:
    inner = [_decoder(i) for i in items]

    def decode(plain: Any, path: str) -> Any:
        if not isinstance(plain, list) or len(plain) != len(inner):
            raise _bad(path, f"list of {len(inner)}", plain)
        return tuple(d(v, f"{path}[{i}]") for i, (d, v) in enumerate(zip(inner, plain, strict=True)))

    return decode


def _mapping(key: Any, value: Any) -> _Decoder:
    keys, values = _decoder(key), _decoder(value)

    def decode(plain: Any, path: str) -> Any:
        if not isinstance(plain, dict):
            raise _bad(path, "map", plain)
        return {keys(k, f"{path} key"): values(v, f"{path}[{k!r}]") for k, v in plain.items()}

    return decode


def _union(options: tuple[Any, ...]) -> _Decoder:
    rest = [o for o in options if o is not type(None)]
    if len(rest) != 1 or len(rest) == len(options):
        raise TypeError(f"only X | None is a recordable union, not {options}; use a family")
    inner = _decoder(rest[0])
    return lambda plain, path: None if plain is None else inner(plain, path)


def _dataclass(cls: type) -> _Decoder:
    # decoders of the fields are looked up at the first use: dataclasses may refer to each other
    decoders: dict[str, tuple[_Decoder, bool]] = {}

    def decode(plain: Any, path: str) -> Any:
        if not isinstance(plain, dict):
            raise _bad(path, cls.__name__, plain)
        if not decoders:
            decoders.update({name: (_decoder(hint), required) for name, hint, required in _fields(cls)})
        values = {}
        for name, (inner, required) in decoders.items():
            if name in plain:
                values[name] = inner(plain[name], f"{path}.{name}" if path else name)
            elif required:
                raise BadRecord(f"{path or cls.__name__}: {name} is missing")
        try:
            return cls(**values)
        except ValueError as error:
            raise BadRecord(f"{path or cls.__name__}: {error}") from None

    return decode


def _family(base: type) -> _Decoder:
    table = _families[base]

    def decode(plain: Any, path: str) -> Any:
        if not isinstance(plain, dict):
            raise _bad(path, base.__name__, plain)
        kind = plain.get(_KIND)
        if not isinstance(kind, str) or kind not in table:
            raise BadRecord(f"{path or base.__name__}: unknown kind {kind!r}")
        return _dataclass_decoder(table[kind])(plain, path)

    return decode


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
        return _none
    if hint is float:
        return _float
    if hint in (bool, int, str, bytes):
        return _scalar(hint)
    if hint in _families:
        return _family(hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enum(hint)
    if dataclasses.is_dataclass(hint):
        return _dataclass_decoder(typing.cast(type, hint))
    raise TypeError(f"{hint!r} is not a recordable annotation")
