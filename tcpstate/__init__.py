"""One connection to a portable record and back: the paper's API as a library of its own.

::

    located  = find(ConnId.parse("tcp:10.0.0.5:6379-10.0.0.9:51514"))
    owner    = located.owners[0]
    sock     = take(owner.pid, owner.fd)             # our own descriptor; stop the owner's process first
    with blackhole(), Capture(ports={6379}) as capture:
        states  = quiet([sock])                      # nothing in, nothing out
        records = export_connections([sock], states)
        ...                                          # record.to_bytes(), to another host: from_bytes()
        made    = rebuild_connections(records, elapsed=seconds_since_export)
        ...                                          # the address moves
        release_connections(made, records)
        replay(capture.segments(), records)
        discard_connections([sock])                  # at the source, once the address has left it
        # or, instead of moving: thaw([sock], states)

::

    send queue   snd_una ........ snd_nxt ........ end of send_queue  [FIN]
                     sent, unacked      not yet sent
    recv queue   start of receive_queue .......... rcv_nxt            [peer's FIN]
                     arrived, acknowledged, not yet read

Everything works on the calling thread's network namespace and on many connections at once.  Names are imported when
they are first used, so that importing one module of the package costs only that.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tcpstate.capture import Capture, replay
    from tcpstate.connid import ConnId
    from tcpstate.discard import discard_connections
    from tcpstate.errors import TcpmigError
    from tcpstate.export import export_connections
    from tcpstate.filters import drop_syns, undo_drop_syns
    from tcpstate.freeze import quiet, thaw
    from tcpstate.locate import connections, find, listener_backlog, take
    from tcpstate.pairs import retuple, settle
    from tcpstate.preflight import refusal, supported
    from tcpstate.rebuild import compare, rebuild_connections, release_connections
    from tcpstate.record import ConnectionRecord
    from tcpstate.release import open_connections
    from tcpstate.segment import Segment
    from tcpstate.silence import blackhole
    from tcpstate.single import discard_connection, export_connection, rebuild_connection

__all__ = [
    "Capture",
    "ConnId",
    "ConnectionRecord",
    "Segment",
    "TcpmigError",
    "blackhole",
    "compare",
    "connections",
    "discard_connection",
    "discard_connections",
    "drop_syns",
    "export_connection",
    "export_connections",
    "find",
    "listener_backlog",
    "open_connections",
    "quiet",
    "rebuild_connection",
    "rebuild_connections",
    "refusal",
    "release_connections",
    "replay",
    "retuple",
    "settle",
    "supported",
    "take",
    "thaw",
    "undo_drop_syns",
]

_HOME = {
    "Capture": "capture",
    "ConnId": "connid",
    "ConnectionRecord": "record",
    "Segment": "segment",
    "TcpmigError": "errors",
    "blackhole": "silence",
    "compare": "comparison",
    "connections": "locate",
    "discard_connection": "single",
    "discard_connections": "discard",
    "drop_syns": "filters",
    "export_connection": "single",
    "export_connections": "export",
    "find": "locate",
    "listener_backlog": "locate",
    "open_connections": "release",
    "quiet": "freeze",
    "rebuild_connection": "single",
    "rebuild_connections": "rebuild",
    "refusal": "preflight",
    "release_connections": "rebuild",
    "replay": "capture",
    "retuple": "pairs",
    "settle": "pairs",
    "supported": "preflight",
    "take": "locate",
    "thaw": "freeze",
    "undo_drop_syns": "filters",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
