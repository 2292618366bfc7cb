"""One cell of the table state x family x queues: a connection brought into a state, moved, and used to its end."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import itertools
import socket
import struct
import time
from dataclasses import dataclass

from tcpstate.capture import Capture, replay
from tcpstate.discard import discard_connections
from tcpstate.export import export_connections, state_of
from tcpstate.freeze import Blackhole, quiet, thaw
from tcpstate.kernel.bpf import DROP_ALL, attach
from tcpstate.kernel.route import is_local
from tcpstate.options import VOLATILE
from tcpstate.rebuild import differences, rebuild_connections
from tcpstate.record import ConnectionRecord, State
from tcpstate.release import open_connections, release_connections
from tests.tscnet import SERVICE, Watcher, net, pair, wait_until

SO_DETACH_FILTER, SO_ERROR, SO_LINGER = 27, 4, 13
EARLY, LATE = b"early" * 100, b"late" * 800
FAMILIES = {"ipv4": (socket.AF_INET, False), "ipv6": (socket.AF_INET6, False), "mapped": (socket.AF_INET, True)}


class Case(enum.Enum):
    """A state, and how it was reached where that matters."""

    ESTABLISHED = "ESTABLISHED"
    SYN_SENT = "SYN_SENT"
    SYN_SENT_ANSWERED = "SYN_SENT, SYN-ACK in the freeze"
    FIN_WAIT_1 = "FIN_WAIT_1"
    FIN_WAIT_2 = "FIN_WAIT_2"
    CLOSE_WAIT = "CLOSE_WAIT"
    CLOSING = "CLOSING"
    LAST_ACK = "LAST_ACK"
    ENDED = "CLOSED, both FINs (TIME_WAIT)"
    RESET = "CLOSED, reset"
    REFUSED = "CLOSED, refused"

    @property
    def state(self) -> State:
        name = self.name
        if name in ("ENDED", "RESET", "REFUSED"):
            return State.CLOSED
        return State[name.removesuffix("_ANSWERED")]


#: queues that a case can have: r unread data, s data that the peer has not acknowledged
_BOTH = ("", "r", "s", "rs")
QUEUES = {
    Case.SYN_SENT: ("",),
    Case.SYN_SENT_ANSWERED: ("",),
    Case.FIN_WAIT_2: ("", "r"),
    Case.ENDED: ("", "r"),
    Case.RESET: ("", "r"),
    Case.REFUSED: ("",),
}
CELLS = [(case, family, queues) for case in Case for family in FAMILIES for queues in QUEUES.get(case, _BOTH)]
#: no two connections have the same ports: the first of them may be in TIME_WAIT
_ports = itertools.count(7001)
_OPENING = (Case.SYN_SENT, Case.SYN_SENT_ANSWERED, Case.REFUSED)


@contextlib.contextmanager
def net_for_cells():
    """Hosts between which :func:`run` moves connections: the rules of a freeze stand at both."""
    with net() as made:
        for host in (made.a, made.b):
            with host:
                Blackhole().ensure()
        yield made


def name_of(cell: tuple[Case, str, str]) -> str:
    case, family, queues = cell
    return f"{case.name}-{family}-{queues or 'empty'}"


@dataclass
class Ends:
    """Both ends: ours, which moves, and the peer's (or its listener)."""

    served: socket.socket
    client: socket.socket


def bring(case: Case, hosts, family: socket.AddressFamily, mapped: bool, queues: str, port: int) -> Ends:
    """A connection of host a with a peer on c in this state."""
    if case in _OPENING:
        return _opening(case, hosts, family, mapped, port)
    served, client = pair(hosts.a, hosts.c, family, mapped=mapped, port=port)
    if "r" in queues:
        client.sendall(EARLY)
    if case in (Case.CLOSE_WAIT, Case.LAST_ACK):
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: state_of(served) is State.CLOSE_WAIT)
    if case in (Case.FIN_WAIT_1, Case.CLOSING, Case.LAST_ACK) or (
        "s" in queues and case in (Case.ESTABLISHED, Case.CLOSE_WAIT)
    ):
        # the client hears nothing any more: neither our data nor our FIN is acknowledged
        attach(client, DROP_ALL)
    if "s" in queues:
        served.sendall(LATE)
    if case in (Case.FIN_WAIT_1, Case.FIN_WAIT_2, Case.CLOSING, Case.LAST_ACK, Case.ENDED):
        served.shutdown(socket.SHUT_WR)
    if case in (Case.CLOSING, Case.ENDED):
        if case is Case.ENDED:
            wait_until(lambda: state_of(served) is State.FIN_WAIT_2)
        client.shutdown(socket.SHUT_WR)
    if case is Case.RESET:
        client.setsockopt(socket.SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    wait_until(lambda: state_of(served) is case.state)
    return Ends(served, client)


def _opening(case: Case, hosts, family: socket.AddressFamily, mapped: bool, port: int) -> Ends:
    listener = hosts.c.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((hosts.c.own(family), 7100))
    served = hosts.a.socket(socket.AF_INET6 if mapped else family, socket.SOCK_STREAM)
    if case is not Case.REFUSED:
        listener.listen(4)
        # the SYN, or its answer, is not heard
        attach(listener if case is Case.SYN_SENT else served, DROP_ALL)
    prefix = "::ffff:" if mapped else ""
    served.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    served.bind((prefix + SERVICE[family], port))
    served.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        served.connect((prefix + hosts.c.own(family), 7100))
    wait_until(lambda: state_of(served) is case.state)
    return Ends(served, listener)


def _read(sock: socket.socket, expected: bytes) -> None:
    sock.settimeout(10)
    found = b""
    while data := sock.recv(65536):
        found += data
    assert found == expected, f"{len(found)} bytes came, {len(expected)} were expected"


def finish(case: Case, moved: socket.socket, client: socket.socket, queues: str) -> None:
    """Both applications see what they would have seen without the move: all bytes, in order, then the end."""
    with contextlib.suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
    to_server = EARLY if "r" in queues else b""
    to_client = LATE if "s" in queues else b""
    if case is Case.REFUSED:
        assert moved.getsockopt(socket.SOL_SOCKET, SO_ERROR) == errno.ECONNREFUSED
        return
    if case is Case.RESET:
        moved.settimeout(10)
        assert moved.recv(65536) == to_server if to_server else True
        assert moved.getsockopt(socket.SOL_SOCKET, SO_ERROR) == errno.ECONNRESET
        assert moved.recv(1) == b""
        return
    if case is Case.ENDED:
        _read(moved, to_server)
        assert moved.getsockopt(socket.SOL_SOCKET, SO_ERROR) == 0
        _read(client, b"")
        return
    if case in (Case.SYN_SENT, Case.SYN_SENT_ANSWERED):
        listener, (client, _) = client, _accept(client)
        listener.close()
        wait_until(lambda: state_of(moved) is State.ESTABLISHED, 10)
        assert moved.getsockopt(socket.SOL_SOCKET, SO_ERROR) == 0
    if case in (Case.ESTABLISHED, Case.CLOSE_WAIT, *_OPENING):
        moved.setblocking(True)
        moved.sendall(b"new")
        moved.shutdown(socket.SHUT_WR)
        to_client += b"new"
    if case in (Case.ESTABLISHED, Case.FIN_WAIT_1, Case.FIN_WAIT_2, *_OPENING):
        client.sendall(b"more")
        client.shutdown(socket.SHUT_WR)
        to_server += b"more"
    _read(client, to_client)
    _read(moved, to_server)
    client.close()


def _accept(listener: socket.socket):
    listener.settimeout(10)
    return listener.accept()


def equal_again(record: ConnectionRecord, again: ConnectionRecord) -> list[str]:
    """What of a connection differs in its record after the move: nothing that the peer or the application can tell."""

    def fixed(one: ConnectionRecord) -> dict[str, object]:
        plain = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
        # clocks go on, soft state is learned anew, what the peer has acknowledged is gone from the queue
        for name in ("timestamps", "soft", "windows"):
            del plain[name]
        plain["options"] = {k: v for k, v in one.options.items() if k not in VOLATILE}
        return plain

    before, after = fixed(record), fixed(again)
    return [f"{name}: {before[name]!r} {after[name]!r}" for name in before if before[name] != after[name]]


def run(hosts, case: Case, family_name: str, queues: str) -> str:
    """Move one cell from host a to host b, with the service address. What was seen, for the table."""
    family, mapped = FAMILIES[family_name]
    port = next(_ports)
    a, b, c = hosts.hosts
    with contextlib.ExitStack() as ends, Watcher(c, keep=lambda s: s.flags & 4) as watcher:
        a.add(family)
        leave = ends.enter_context(contextlib.ExitStack())
        leave.callback(a.remove, family)
        with a:
            wait_until(lambda: is_local(SERVICE[family]))
            here = Capture(ports={port})
            if case is Case.SYN_SENT_ANSWERED:
                here.start()
        both = bring(case, hosts, family, mapped, queues, port)
        if case in (Case.RESET, Case.REFUSED):
            wait_until(watcher.resets)
        ends.callback(both.client.close)
        ends.callback(both.served.close)
        before = len(watcher.resets())
        with a:
            if case is Case.SYN_SENT_ANSWERED:
                # so that the answer has come
                time.sleep(0.05)
            else:
                here.start()
            ends.callback(here.close)
            (record,) = export_connections([both.served], quiet([both.served]))
        if case is Case.SYN_SENT_ANSWERED:
            # the filter that dropped the answer stands for the freeze
            record = dataclasses.replace(record, filter=())
        assert record.state is case.state, record.state
        record = ConnectionRecord.from_bytes(record.to_bytes())
        with b:
            there = ends.enter_context(Capture(ports={port}))
            (moved,) = rebuild_connections([record])
            ends.callback(moved.close)
            assert differences([moved], [record]) == []
        leave.close()
        b.add(family)
        leave.callback(b.remove, family)
        with b:
            wait_until(lambda: is_local(SERVICE[family]))
            arrived = here.segments()
            release_connections([moved], [record], connect=False)
            open_connections([moved], [record], arrived)
            replay(arrived + there.segments(), [record])
            equal = _export_again(case, moved, record)
        with a:
            discard_connections([both.served])
        finish(case, moved, both.client, queues)
        if case is Case.ENDED:
            # it answers should the peer repeat its FIN
            assert b.sh(f"ss -Htan state time-wait sport = {port}")
        resets = len(watcher.resets()) - before
    assert equal == [], equal
    assert resets == 0, f"{resets} resets: {watcher.resets()}"
    return "moved"


def _export_again(case: Case, moved: socket.socket, record: ConnectionRecord) -> list[str]:
    if case is Case.SYN_SENT_ANSWERED:
        wait_until(lambda: state_of(moved) is State.ESTABLISHED)
        return []
    if case is Case.REFUSED:
        # this host refused it: another peer
        return [] if moved.getsockname()[1] == record.conn_id.local_port else ["another port"]

    def same() -> bool:
        return not _differs(moved, record)

    # an acknowledgement may still be on its way
    with contextlib.suppress(AssertionError):
        wait_until(same, 2)
    return _differs(moved, record)


def _differs(moved: socket.socket, record: ConnectionRecord) -> list[str]:
    states = quiet([moved])
    (again,) = export_connections([moved], states)
    thaw([moved], states)
    return equal_again(record, again)
