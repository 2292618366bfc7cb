"""Inputs that are almost right: bytes changed, and, where msgpack is inside, values changed."""

from __future__ import annotations

import functools
import random
from typing import Any, Final

import msgpack

from tests.fuzz.targets import Target

__all__ = ["mutated"]

_NUMBERS: Final = (0, 1, -1, 2, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1)
_VALUES: Final = (
    *_NUMBERS,
    -(2**63),
    None,
    True,
    False,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "x" * 300,
    "tcp:10.0.0.1:80-10.0.0.2:4000",
    "fe80::1%eth0",
    "ESTABLISHED",
    "ipv6",
    "\x00",
    "\udcff",
    "\U0001f600",
    b"",
    b"\xff" * 40,
    [],
    {},
    [[[[]]]],
    functools.reduce(lambda inner, _: [inner], range(300), []),
    {"kind": "hello"},
    {1: 2},
)


def mutated(target: Target, chance: random.Random) -> bytes:
    """One input."""
    seed = chance.choice(target.seeds)
    if chance.random() < 0.5:
        found = _as_value(seed, target.tail, chance)
        if found is not None:
            seed = found
            if chance.random() < 0.7:
                return _refit(target, seed, chance)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        seed = _as_bytes(seed, chance.choice(target.seeds), chance)
    return _refit(target, seed, chance)


def _refit(target: Target, data: bytes, chance: random.Random) -> bytes:
    return target.refit(data) if target.refit is not None and chance.random() < 0.8 else data


def _as_bytes(data: bytes, other: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    at = chance.randrange(len(changed) + 1)
    until = min(len(changed), at + chance.choice((1, 2, 4, 8, 64, 4096)))
    match chance.randrange(8):
        case 0 if at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        case 1 if at < len(changed):
            changed[at] = chance.randrange(256)
        case 2:
            del changed[at:until]
        case 3:
            changed[at:at] = changed[at:until]
        case 4:
            changed[at:at] = chance.randbytes(chance.choice((1, 2, 8, 64)))
        case 5:
            del changed[at:]
        case 6:
            begin = chance.randrange(len(other) + 1)
            changed[at:until] = other[begin : begin + 64]
        case _:
            size = chance.choice((1, 2, 4, 8))
            order = chance.choice(("little", "big"))
            value = chance.choice(_NUMBERS) % (1 << 8 * size)
            changed[at : at + size] = value.to_bytes(size, order)  # type: ignore[arg-type]
    return bytes(changed)


def _as_value(data: bytes, tail: int, chance: random.Random) -> bytes | None:
    """With one value in its msgpack changed; None if there is none inside."""
    try:
        plain = msgpack.unpackb(data[tail:], strict_map_key=False)
    except ValueError:
        return None
    for _ in range(chance.choice((1, 1, 2, 4))):
        plain = _changed(plain, chance)
    return data[:tail] + msgpack.packb(plain, unicode_errors="surrogateescape")


def _changed(value: Any, chance: random.Random) -> Any:
    """A copy in which one thing, at any depth, is another."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        changed = dict(value)
        match chance.randrange(8):
            case 0:
                del changed[key]
            case 1:
                changed[chance.choice(("kind", "new", 7, b"raw"))] = chance.choice(_VALUES)
            case _:
                changed[key] = _changed(value[key], chance)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.9:
        at = chance.randrange(len(value))
        items = list(value)
        match chance.randrange(6):
            case 0:
                del items[at]
            case 1:
                items.insert(at, chance.choice(_VALUES))
            case _:
                items[at] = _changed(value[at], chance)
        return items
    if isinstance(value, int) and chance.random() < 0.5:
        return chance.choice(_NUMBERS)
    return chance.choice(_VALUES)
