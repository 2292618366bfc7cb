"""Recorded socket options, set on rebuilt sockets and compared there: what :mod:`tcpstate.options` has saved."""

from __future__ import annotations

import errno
import itertools
import logging
import socket
from collections.abc import Mapping, Sequence

from tcpstate.kernel.columns import Column, RowError, Rows
from tcpstate.options import BY_KEYWORD, TABLE, Format, Option, Stage
from tcpstate.record import ConnectionRecord

__all__ = ["Alike", "alike", "give", "unlike"]

log = logging.getLogger(__name__)

_ORDER: Mapping[str, int] = {option.keyword: place for place, option in enumerate(TABLE)}
#: connections that have the same options: their places, and those options
Alike = tuple[list[int], Mapping[str, tuple[int, ...]], Mapping[str, bytes]]


def alike(records: Sequence[ConnectionRecord]) -> list[Alike]:
    """Connections by what options they have: most of a server have the same."""
    groups: dict[object, Alike] = {}
    for row, record in enumerate(records):
        key = (*record.options.items(), *record.option_data.items())
        group = groups.get(key)
        if group is None:
            groups[key] = [row], record.options, record.option_data
        else:
            group[0].append(row)
    return list(groups.values())


def give(
    socks: Sequence[socket.socket], groups: Sequence[Alike], stage: Stage, *, skip: frozenset[str] = frozenset()
) -> None:
    """Set the recorded options of one stage.

    What this kernel or version does not know is left out with a warning in the log.  RowError (``row`` counts among
    ``socks``) when the kernel refuses a value, ValueError when a value has the wrong shape.
    """
    tables: dict[tuple[str, ...], list[tuple[int, list[bytes]]]] = {}
    for places, numbers, data in groups:
        values = _wanted(numbers, data, stage, skip)
        keywords = tuple(sorted(values, key=_ORDER.__getitem__))
        if keywords:
            in_order = [values[k] for k in keywords]
            tables.setdefault(keywords, []).extend([(row, in_order) for row in places])
    for keywords, rows in tables.items():
        _set(socks, [BY_KEYWORD[k] for k in keywords], rows)


def _wanted(
    numbers: Mapping[str, Sequence[int]], data: Mapping[str, bytes], stage: Stage, skip: frozenset[str]
) -> dict[str, bytes]:
    """The options of one stage as the kernel wants them. ValueError."""
    values = {}
    for keyword, value in numbers.items():
        option = _known(keyword)
        if option is not None and option.stage is stage and keyword not in skip:
            values[keyword] = option.encode(value)
    for keyword, raw in data.items():
        option = _known(keyword)
        if option is not None and option.stage is stage and keyword not in skip:
            if option.format is not Format.BYTES or len(raw) > option.size:
                raise ValueError(f"{keyword}: {len(raw)} bytes do not fit")
            values[keyword] = raw
    return values


def _known(keyword: str) -> Option | None:
    option = BY_KEYWORD.get(keyword)
    if option is None:
        log.warning("socket option %s of the record is unknown to this version, and was left out", keyword)
    return option


def _set(socks: Sequence[socket.socket], options: Sequence[Option], wanted: Sequence[tuple[int, list[bytes]]]) -> None:
    """Set the same options, each with its own values, of the sockets with these numbers."""
    rows = Rows(len(wanted))
    fd = rows.numbers(socks[i].fileno() for i, _ in wanted)
    done = []
    for at, option in enumerate(options):
        values = [raws[at] for _, raws in wanted]
        size: int | Column = len(values[0])
        if any(len(raw) != size for raw in values):
            size = rows.numbers(map(len, values))
        # one value for all is the usual case, and the cheaper
        value = rows.shared(values[0]) if values.count(values[0]) == len(values) else rows.data(values)
        done.append(rows.setsockopt(fd, option.level, option.number, value, size=size, ignore=True))
    rows.run()
    for option, result in zip(options, done, strict=True):
        failed = next(((row, -code) for row, code in enumerate(result.values()) if code < 0), None)
        if failed is None:
            continue
        row, code = failed
        if code not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):
            raise RowError(code, wanted[row][0], f"setting {option.keyword}")
        log.warning("this kernel does not take socket option %s; it was left out", option.keyword)


def unlike(socks: Sequence[socket.socket], numbers: Sequence[Mapping[str, Sequence[int]]]) -> set[int]:
    """Which of the sockets do not read back what :func:`give` was to set before the release."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for row, of_numbers in enumerate(numbers):
        known = (BY_KEYWORD.get(keyword) for keyword in of_numbers)
        keywords = tuple(o.keyword for o in known if o is not None and o.stage is not Stage.RELEASED)
        if keywords:
            alike.setdefault(keywords, []).append(row)
    found = set()
    for keywords, mine in alike.items():
        options = [BY_KEYWORD[k] for k in keywords]
        rows = Rows(len(mine))
        fd = rows.numbers(socks[i].fileno() for i in mine)
        fields = [rows.getsockopt(fd, o.level, o.number, o.size, ignore=True) for o in options]
        rows.run()
        reader = rows.reader(*((place, o.format.value) for place, o in zip(fields, options, strict=True)))
        for i, values in zip(mine, reader.iter_unpack(rows.memory), strict=True):
            if values != tuple(itertools.chain.from_iterable(numbers[i][k] for k in keywords)):
                found.add(i)
    return found
