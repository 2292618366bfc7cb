"""What an image holds, as plain maps and lists for JSON. Derived from the records themselves: new kinds, new fields and
new members of families need nothing here."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

from checkpoint.errors import BadImageRecord
from checkpoint.image.frames import VERSION, Frame, Kind
from checkpoint.image.reader import ImageReader

__all__ = ["SECTIONS", "describe", "section"]

#: what can be asked for by name
SECTIONS = ("processes", "files", "connections", "memory")
#: the kinds of frames whose records make a section; a kind that is in none is shown under ``other``
_SECTION_OF = {
    Kind.TREE: "processes",
    Kind.STATES: "processes",
    Kind.FILES: "files",
    Kind.FILES_DELTA: "files",
    Kind.MAPPINGS: "memory",
    Kind.MAPS_DELTA: "memory",
}
#: these are counted, not shown one by one
_COUNTED = {Kind.PAGES, Kind.PAGES_DROP}
#: a connection's record is the map that has this entry, wherever it stands (that of its file only has its name)
_CONNECTION = "snd_una"
#: entries with this name are keys (tcpstate.md5keys.SigningKey)
_SECRET = "secret"
#: longer byte strings are told by their length and their beginning
_BYTES_SHOWN = 32


def describe(image: ImageReader) -> dict[str, Any]:
    """The whole image: ``image`` (version, root, size, frames per kind), each section, and ``other`` records.

    BadImageRecord if a record is no msgpack or runs and data do not fit together.
    """
    found: dict[str, Any] = {name: [] for name in SECTIONS} | {"other": {}}
    counts: dict[str, dict[str, int]] = {}
    for frame in image.frames:
        count = counts.setdefault(frame.kind, {"frames": 0, "bytes": 0})
        count["frames"] += 1
        count["bytes"] += len(frame.record) + len(frame.data)
        if frame.kind in _COUNTED:
            continue
        plain = _plain(frame)
        found["connections"] += [printable(c) for c in _connections(plain)]
        name = _SECTION_OF.get(Kind(frame.kind)) if frame.kind in set(Kind) else None
        into = found[name] if name else found["other"].setdefault(frame.kind, [])
        into.append(printable(plain))
    found["memory"] = {"mappings": found["memory"], "pages": _page_totals(image)}
    head = {
        "version": VERSION,
        "root": image.end.root.hex(),
        "signed": image.end.signature is not None,
        "size": image.size,
        "frames": counts,
    }
    return {"image": head, **found}


def section(image: ImageReader, name: str) -> Any:
    """One section of the description. ValueError if there is none of that name."""
    if name not in SECTIONS:
        raise ValueError(f"{name!r} is none of {', '.join(SECTIONS)}")
    return describe(image)[name]


def printable(value: Any) -> Any:
    """``value`` in terms of JSON: bytes become text, keys become text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        head = value[:_BYTES_SHOWN].hex()
        return head if len(value) <= _BYTES_SHOWN else f"{head}.. ({len(value)} bytes)"
    if isinstance(value, dict):
        return {k if isinstance(k, str) else str(printable(k)): _entry(k, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [printable(v) for v in value]
    return repr(value)  # msgpack's own types: no record of ours has them


def _entry(key: Any, value: Any) -> Any:
    if key == _SECRET and isinstance(value, bytes):
        return f"not shown ({len(value)} bytes)"
    return printable(value)


def _plain(frame: Frame) -> Any:
    import msgpack

    try:
        return msgpack.unpackb(frame.record, raw=False, strict_map_key=False)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise BadImageRecord(
            f"{frame.kind}: not a msgpack record: {error}", object=f"frame at {frame.offset}"
        ) from error


def _connections(plain: Any) -> Iterator[dict[str, Any]]:
    if isinstance(plain, dict):
        if _CONNECTION in plain:
            yield plain
        for value in plain.values():
            yield from _connections(value)
    elif isinstance(plain, list):
        for value in plain:
            yield from _connections(value)


def _page_totals(image: ImageReader) -> list[dict[str, Any]]:
    """Bytes and runs per process and per file content, superseded ones included."""
    totals: dict[tuple[str, int], list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for frame in image.frames:
        if frame.kind in _COUNTED:
            runs = frame.runs() if frame.kind == Kind.PAGES_DROP else frame.pages()
            total = totals[runs.space.value, runs.id]
            total[0] += len(frame.data)
            total[1] += len(runs.runs)
            total[2] += frame.kind == Kind.PAGES_DROP
    return [
        {"space": space, "id": number, "bytes": size, "runs": count, "drops": drops}
        for (space, number), (size, count, drops) in sorted(totals.items())
    ]
