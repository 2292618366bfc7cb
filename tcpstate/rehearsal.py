"""Everything done once, on a connection that is none: what a first use costs is paid before the stop.

Tables of calls, this kernel's defaults, programs, code that was never run: some ten milliseconds, which would otherwise
be spent while peers wait.  The connection is made in repair mode between loopback addresses and ends in it, so that
nothing is ever sent.
"""

from __future__ import annotations

import logging
from typing import Final

from tcpstate import capture, halfopen, options
from tcpstate.comparison import differences
from tcpstate.connid import ConnId
from tcpstate.early import read_early
from tcpstate.errors import TcpmigError
from tcpstate.export import export_connections
from tcpstate.freeze import quiet, read_originals
from tcpstate.kernel import columns
from tcpstate.kernel.bpf.urgentmode import urgent_bytes
from tcpstate.kernel.sockets import SO, Level
from tcpstate.rebuild import rebuild_connections
from tcpstate.record import Buffers, ConnectionRecord, Family, Negotiated, SoftState, State, Timestamps, Windows

__all__ = ["rehearse"]

log = logging.getLogger(__name__)

#: both ends; nothing real has these ports
_ENDS: Final = (("127.0.0.1", Family.IPV4), ("::1", Family.IPV6))
_PORTS: Final = (1, 2)
_WINDOW: Final = 65535
_BUFFER: Final = 1 << 16


def rehearse() -> None:
    """Do it, for both families, in the calling thread and its network namespace.

    It is no check: where it cannot be done (no loopback, no privilege), the real thing says so itself.
    """
    columns.make_all()
    capture.make_ready()
    try:
        # programs that read the kernel, and where its structures have what they read: a quarter of a second at first
        halfopen.capture(_PORTS)
        urgent_bytes()
    except (TcpmigError, OSError) as error:
        log.debug("no rehearsal of what BPF reads: %s", error)
    for address, family in _ENDS:
        try:
            _rehearse(_record(address, family))
        except (TcpmigError, OSError) as error:
            log.debug("no rehearsal over %s: %s", address, error)


def _rehearse(record: ConnectionRecord) -> None:
    socks = rebuild_connections([record])
    try:
        differences(socks, [record])
        for sock in socks:
            # what a rebuilt connection has until its release cannot be read back
            sock.setsockopt(Level.SOCKET, SO.DETACH_FILTER, 0)
        states = quiet(socks, read_originals(socks))
        # only looked at: in repair mode nothing can be read without choosing a queue
        read_early(socks, [None], _BUFFER)
        (again,) = export_connections(socks, states, saved_options=options.save(socks))
        ConnectionRecord.from_bytes(again.to_bytes())
    finally:
        for sock in socks:
            sock.close()


def _record(address: str, family: Family) -> ConnectionRecord:
    return ConnectionRecord(
        conn_id=ConnId.tcp(address, _PORTS[0], address, _PORTS[1]),
        family=family,
        state=State.ESTABLISHED,
        snd_una=1,
        snd_nxt=1,
        send_queue=b"",
        rcv_nxt=2,
        receive_queue=b"x",
        windows=Windows(snd_wl1=1, snd_wnd=_WINDOW, max_window=_WINDOW, rcv_wnd=_WINDOW, rcv_wup=1),
        negotiated=Negotiated(mss=1460, snd_wscale=7, rcv_wscale=7, sack=True, timestamps=True),
        buffers=Buffers(send=_BUFFER, receive=_BUFFER, send_locked=False, receive_locked=False),
        congestion="reno",
        timestamps=Timestamps(value=2, microseconds=False),
        options={"tcp.nodelay": (1,)},
        soft=SoftState(cwnd=10, ssthresh=10, srtt=1000, rttvar=500, rto=201_000),
    )
