"""Writing state items: several at once, or none.

Options are set on the socket, and what they were is set again if a later item fails.  Hard state goes through repair
mode: it is an edit of the connection's record (:func:`edit_of`), which :mod:`tcpstate.replacement` makes true.  So does
soft state that the kernel gives no option for: a connection that is made anew gets what its record says it has learned
(:mod:`tcpstate.softstate`).
"""

from __future__ import annotations

import dataclasses
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from tcpstate import frozen, options, softstate
from tcpstate.access import capable
from tcpstate.attach import Attached
from tcpstate.errors import (
    BadStateItem,
    KernelFeatureMissing,
    NotFrozen,
    NotPermitted,
    NotSettable,
    StateNotSet,
    UnknownStateKeyword,
)
from tcpstate.frozen import FrozenConnection
from tcpstate.kernel.capability import Cap
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import CONGESTION_NAME_SIZE, INFO_SIZE, TCP, InfoOption, TcpInfo
from tcpstate.keywords import KEYWORDS, Change, Keyword, Kind, Life
from tcpstate.record import LOCALLY_FINISHED, ConnectionRecord, LocalFin, Negotiated, SoftState, State, Timestamps
from tcpstate.replacement import Edit, replace
from tcpstate.segment import SEQ_MASK
from tcpstate.stateitem import StateItem, Value, check_value
from tcpstate.stateread import Reader

__all__ = ["checked", "edit_of", "settable", "write_values"]

#: soft state that only BPF writes
_BY_BPF: Final = frozenset({"cwnd", "ssthresh"})
#: of a connection that is being put together (RFC 6928, RFC 5681 3.1, RFC 6298 2.1)
_UNLEARNED: Final = SoftState(cwnd=10, ssthresh=0x7FFFFFFF, srtt=0, rttvar=0, rto=1_000_000)
_TIMESTAMPS: Final = int(InfoOption.TIMESTAMPS)

#: the freeze has changed these on the socket: the originals are in the note
_IN_NOTE: Final[Mapping[str, str]] = {
    "so.mark": "mark",
    "so.keepalive": "keepalive",
    "tcp.user_timeout": "user_timeout",
    "ip.minttl": "minimum_ttl",
    "so.reuseaddr": "reuse_address",
}


def checked(items: Iterable[StateItem], found: Attached) -> dict[Change, dict[str, Value]]:
    """The values by the way in which they are set, all of them looked at first.

    What the connection has anyway (its name) may be among them. UnknownStateKeyword, NotSettable, BadStateItem,
    NotPermitted.
    """
    reader = Reader(found)
    plan: dict[Change, dict[str, Value]] = {change: {} for change in Change}
    seen = set()
    for item in items:
        keyword = KEYWORDS.get(item.keyword)
        if keyword is None:
            raise UnknownStateKeyword("there is no such keyword", object=item.keyword)
        if item.keyword in seen:
            raise BadStateItem("it is given twice", object=item.keyword)
        seen.add(item.keyword)
        if item.value is None:
            raise BadStateItem("it has no value", object=item.keyword)
        check_value(keyword.name, keyword.datatype, item.value)
        if keyword.change is Change.NONE:
            if keyword.life is Life.FIXED and reader.value(keyword) == item.value:
                continue
            raise NotSettable("it cannot be set", object=item.keyword)
        plan[keyword.change][item.keyword] = item.value
    need = next((k for k in seen if KEYWORDS[k].privileged and KEYWORDS[k].change is not Change.NONE), None)
    if need is not None and not capable(Cap.NET_ADMIN):
        raise NotPermitted("setting it takes CAP_NET_ADMIN", object=need, fix="Ask the chaperone, or run as root.")
    by_bpf = _BY_BPF & plan[Change.SOFT].keys()
    if by_bpf and (lack := softstate.missing()):
        raise KernelFeatureMissing(f"there is no way to write it here: {lack.message}", object=min(by_bpf))
    return plan


def write_values(found: Attached, plan: Mapping[Change, Mapping[str, Value]]) -> None:
    """Set what :func:`checked` gave; all of it, or nothing.

    A connection that is not frozen is frozen for that moment. NotSettable, StateNotSet, and what
    :func:`~tcpstate.replacement.replace` and :func:`~tcpstate.frozen.freeze` raise.
    """
    repair = {**plan[Change.REPAIR], **plan[Change.SOFT]}
    try:
        entry = frozen.entry_of(found.conn_id)
    except NotFrozen:
        entry = None
    if entry is not None and entry.record:
        # it is being put together: all of it is in its record
        repair |= plan[Change.OPTION]
        replace(found.sock, entry, edit_of(repair))
        return
    taught = sorted(plan[Change.SOFT].keys() - _BY_BPF)
    if taught and not TcpInfo.unpack(found.sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE)).options & _TIMESTAMPS:
        raise NotSettable("it cannot be given to a connection without timestamps", object=taught[0])
    undo = _Undo(found.sock, entry)
    try:
        undo.set(plan[Change.OPTION])
        if repair:
            _with_frozen(found, entry, edit_of(repair))
    except BaseException:
        undo.back()
        raise


def _with_frozen(found: Attached, entry: FrozenConnection | None, edit: Edit) -> None:
    if entry is not None:
        replace(found.sock, frozen.entry_of(found.conn_id), edit)
        return
    entry = frozen.freeze(found.sock)
    try:
        replace(found.sock, entry, edit)
    finally:
        frozen.resume(entry.conn_id)


class _Undo:
    """Options that are set, and what they were."""

    def __init__(self, sock: socket.socket, entry: FrozenConnection | None) -> None:
        self.sock = sock
        self.entry = entry
        self.noted = False
        self._before: list[tuple[Level, int, bytes]] = []

    def set(self, values: Mapping[str, Value]) -> None:
        """Set them; StateNotSet at the first that fails."""
        noted: dict[str, Value] = {}
        for keyword, value in values.items():
            if self.entry is not None and keyword in _IN_NOTE:
                noted[_IN_NOTE[keyword]] = value
                continue
            try:
                level, option, raw = self._option(keyword, value)
                before = self._present(keyword, level, option, len(raw))
                self.sock.setsockopt(level, option, raw)
            except OSError as error:
                raise StateNotSet(f"the kernel did not take it: {error.strerror}", object=keyword) from None
            self._before.append((level, option, before))
            if keyword in _BUFFERS and (made := self.sock.getsockopt(Level.SOCKET, _BUFFERS[keyword])) != value:
                raise StateNotSet(f"the kernel made {made} of {_number(value)}", object=keyword)
        if noted and self.entry is not None:
            state = self.entry.state
            whole = {name: type(getattr(state, name))(value) for name, value in noted.items()}
            frozen.rewrite(self.entry, state=dataclasses.replace(state, **whole))
            self.noted = True

    def _option(self, keyword: str, value: Value) -> tuple[Level, int, bytes]:
        """(level, option, bytes) of what is to be set."""
        if isinstance(value, str):
            # the congestion control: the only text that can be set
            return Level.TCP, TCP.CONGESTION, value.encode("ascii", "replace")
        if keyword in _BUFFERS:
            option = _FORCED[keyword] if capable(Cap.NET_ADMIN) else _BUFFERS[keyword]
            # the kernel doubles what it is given, and reports the double
            return Level.SOCKET, option, _INT.pack(_number(value) // 2)
        if keyword in _PLAIN:
            return Level.SOCKET, _PLAIN[keyword], _INT.pack(_number(value))
        known = options.BY_KEYWORD[keyword]
        if isinstance(value, bytes):
            return known.level, known.number, value
        try:
            return known.level, known.number, known.encode(value if isinstance(value, tuple) else (_number(value),))
        except ValueError as error:
            raise BadStateItem(str(error), object=keyword) from None

    def _present(self, keyword: str, level: Level, option: int, size: int) -> bytes:
        """What setting it back takes."""
        if keyword in _BUFFERS:
            return _INT.pack(self.sock.getsockopt(Level.SOCKET, _BUFFERS[keyword]) // 2)
        known = options.BY_KEYWORD.get(keyword)
        found = self.sock.getsockopt(level, option, max(size, CONGESTION_NAME_SIZE, known.size if known else 0))
        return found.rstrip(b"\0") if keyword in ("congestion", "so.bindtodevice") else found

    def back(self) -> None:
        """Set what was before. OSError."""
        while self._before:
            self.sock.setsockopt(*self._before.pop())
        if self.noted and self.entry is not None:
            # as it is noted now: what else has changed meanwhile stays
            frozen.rewrite(frozen.entry_of(self.entry.conn_id), state=self.entry.state)


_INT: Final = struct.Struct("i")
_BUFFERS: Final[Mapping[str, int]] = {"send_buffer": SO.SNDBUF, "receive_buffer": SO.RCVBUF}
_FORCED: Final[Mapping[str, int]] = {"send_buffer": SO.SNDBUFFORCE, "receive_buffer": SO.RCVBUFFORCE}
_PLAIN: Final[Mapping[str, int]] = {"buffer_locks": SO.BUF_LOCK, "so.reuseaddr": SO.REUSEADDR}


def _number(value: Value) -> int:
    if not isinstance(value, int):
        raise BadStateItem("its value is not a number", object=repr(type(value).__name__))
    return int(value)


def edit_of(values: Mapping[str, Value]) -> Edit:
    """What makes the record of a connection with these values out of its record.

    Numbers that belong together keep their distance where only one of them is given: ``snd_nxt`` to ``snd_una``,
    ``rcv_wup`` and ``snd_wl1`` to ``rcv_nxt``.
    """

    def edit(record: ConnectionRecord) -> ConnectionRecord:
        fields = _Fields(record)
        for name, value in values.items():
            fields.give(KEYWORDS[name], value)
        return fields.record(values)

    return edit


class _Fields:
    """A record taken apart, to be put together again."""

    def __init__(self, record: ConnectionRecord) -> None:
        self.old = record
        self.parts: dict[str, dict[str, Any]] = {name: {} for name in ("", "windows", "negotiated", "buffers", "soft")}
        self.clock: dict[str, Any] = {}
        self.options = dict(record.options)
        self.option_data = dict(record.option_data)

    def give(self, keyword: Keyword, value: Value) -> None:
        """One value. ValueError."""
        option = options.BY_KEYWORD.get(keyword.name)
        if option is not None:
            self.options.pop(keyword.name, None)
            self.option_data.pop(keyword.name, None)
            if isinstance(value, bytes):
                self.option_data[keyword.name] = value
            else:
                self.options[keyword.name] = value if isinstance(value, tuple) else (_number(value),)
            return
        if keyword.name == "buffer_locks":
            self.parts["buffers"] |= {
                "send_locked": bool(_number(value) & 1),
                "receive_locked": bool(_number(value) & 2),
            }
            return
        if keyword.change is Change.SOFT:
            self._learned(keyword.name, _number(value))
            return
        path = keyword.source(Kind.REPAIR)
        if path is None:
            raise ValueError(f"{keyword.name} is no part of a record")
        part, _, name = path.rpartition(".")
        if part == "timestamps":
            self.clock[name] = bool(value) if name == "microseconds" else value
        elif path == "state":
            self.parts[""]["state"] = State(value)
        elif path == "local_fin":
            self.parts[""]["local_fin"] = LocalFin(value)
        else:
            present = getattr(getattr(self.old, part) if part else self.old, name)
            self.parts[part][name] = bool(value) if isinstance(present, bool) else value

    def _learned(self, name: str, value: int) -> None:
        """One thing that the connection has learned about its path. ValueError."""
        if name in _BY_BPF and not value:
            raise ValueError(f"{name} is at least 1")
        self.parts["soft"][name] = value

    def record(self, given: Mapping[str, Value]) -> ConnectionRecord:
        """The whole. ValueError where the parts contradict each other."""
        old, top, windows = self.old, self.parts[""], self.parts["windows"]
        if "snd_una" in top and "snd_nxt" not in top:
            top["snd_nxt"] = (top["snd_una"] + old.sent) & SEQ_MASK
        moved = (top.get("rcv_nxt", old.rcv_nxt) - old.rcv_nxt) & SEQ_MASK
        for name in ("rcv_wup", "snd_wl1"):
            windows.setdefault(name, (getattr(old.windows, name) + moved) & SEQ_MASK)
        if "max_window" not in windows:
            windows["max_window"] = max(old.windows.max_window, windows.get("snd_wnd", 0))
        new_windows = dataclasses.replace(old.windows, **windows)
        if new_windows.max_window < new_windows.snd_wnd:
            raise ValueError("max_window is smaller than snd_wnd")
        state = top.get("state", old.state)
        if "local_fin" not in top and (state in LOCALLY_FINISHED) != (old.local_fin is not LocalFin.NONE):
            acked = LocalFin.ACKED if state is State.FIN_WAIT_2 else LocalFin.SENT
            top["local_fin"] = acked if state in LOCALLY_FINISHED else LocalFin.NONE
        negotiated = dataclasses.replace(old.negotiated, **self.parts["negotiated"])
        top["required"] = ("urgent_in",) if top.get("urgent_in", old.urgent_in) is not None else ()
        return dataclasses.replace(
            old,
            **top,
            windows=new_windows,
            negotiated=negotiated,
            buffers=dataclasses.replace(old.buffers, **self.parts["buffers"]),
            soft=dataclasses.replace(old.soft or _UNLEARNED, **self.parts["soft"]) if self.parts["soft"] else old.soft,
            timestamps=self._timestamps(negotiated),
            options=self.options,
            option_data=self.option_data,
        )

    def _timestamps(self, negotiated: Negotiated) -> Timestamps | None:
        if not negotiated.timestamps:
            if self.clock:
                raise ValueError("a timestamp clock for a connection without timestamps")
            return None
        present = self.old.timestamps or Timestamps(value=0, microseconds=False)
        return dataclasses.replace(present, **self.clock)


def settable(items: Sequence[StateItem]) -> list[StateItem]:
    """Those of the items that can be set: what a get of one connection gives, for a set of another."""
    return [item for item in items if item.value is not None and KEYWORDS[item.keyword].change is not Change.NONE]
