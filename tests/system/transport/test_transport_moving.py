"""The paper's interface (5.1): connections moved, made anew, and those of other processes."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import time

import pytest

from tcpstate import discard_connection, export_connection, frozen, rebuild_connection, replacement
from tcpstate.errors import (
    AddressNotMoved,
    AlreadyFrozen,
    NotFrozen,
    NotPermitted,
    StateNotSet,
    UnknownHardState,
    UnsupportedSocket,
)
from tcpstate.kernel import route
from tcpstate.kernel.sockets import Level
from tcpstate.kernel.tcp import TCP
from tcpstate.record import ConnectionRecord
from tcpstate.transport import (
    ALL_HARD,
    Datatype,
    Extent,
    Progress,
    StateItem,
    settable,
    transport_arrivals,
    transport_bind_tuple,
    transport_buffer_purge,
    transport_freeze,
    transport_progress,
    transport_read_pending,
    transport_restore_pending,
    transport_resume,
    transport_state_get,
    transport_state_set,
)
from tests.system.transport.ends import KINDS, V4, talk, unread, values
from tests.tscnet import SERVICE, Watcher, pair, receive, wait_until


def to_be_moved(hosts, kind):
    """Both ends of a connection to the service address, which is at a."""
    family, mapped = KINDS[kind]
    hosts.a.add(family)
    with hosts.a:
        wait_until(lambda: route.is_local(SERVICE[family]))
    served, client = pair(hosts.a, hosts.c, family, mapped=mapped)
    client.settimeout(5)
    return served, client


@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_moves_by_the_papers_calls_alone(hosts, kind):
    family, _ = KINDS[kind]
    served, client = to_be_moved(hosts, kind)
    client.send(b"not read yet")
    unread(served, 12)
    served.setsockopt(Level.TCP, TCP.NODELAY, 1)
    with hosts.a:
        transport_freeze(served)
        items = transport_state_get(served, ALL_HARD)
        extents = transport_read_pending(served)
        name = frozen.frozen()[0].conn_id
    # the socket of the target is of the same kind
    made = hosts.b.socket(served.family, socket.SOCK_STREAM)
    with Watcher(hosts.c, keep=lambda s: s.flags & 4) as watcher:
        with hosts.b:
            transport_bind_tuple(made.fileno(), name)
            transport_state_set(made, settable(items))
            transport_restore_pending(made, extents)
            told = {item.keyword: item.value for item in items}
            moved = values(made, ["snd_una", "rcv_nxt", "snd_wscale", "timestamps", "tcp.nodelay"])
            assert moved == {keyword: told[keyword] for keyword in moved}
            with pytest.raises(AddressNotMoved):
                transport_resume(made)
        hosts.a.remove(family)
        hosts.b.add(family)
        with hosts.a:
            frozen.discard(name)
        with hosts.b:
            wait_until(lambda: route.is_local(SERVICE[family]))
            transport_resume(made)
        made.settimeout(5)
        assert receive(made, 12) == b"not read yet"
        talk(made, client)
        assert watcher.resets() == []
    assert made.getsockopt(Level.TCP, TCP.NODELAY) == 1
    hosts.b.remove(family)
    for sock in (made, served, client):
        sock.setsockopt(Level.TCP, TCP.REPAIR, 1)
        sock.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_moves_by_its_record(hosts, kind):
    family, _ = KINDS[kind]
    served, client = to_be_moved(hosts, kind)
    client.send(b"abc")
    client.send(b"U", socket.MSG_OOB)
    client.send(b"def")
    served.send(b"on its way")
    assert receive(client, 10) == b"on its way"
    with hosts.a:
        with pytest.raises(NotFrozen):
            export_connection(served)
        name = transport_freeze(served).conn_id
        record = export_connection(str(name))
    exported = time.monotonic()
    assert (record.receive_queue, record.urgent_in) == (b"abcUdef", 3)
    with Watcher(hosts.c, keep=lambda s: s.flags & 4) as watcher:
        with hosts.b:
            strange = dataclasses.replace(record, required=("urgent_in", "warp"))
            with pytest.raises(UnknownHardState, match="warp"):
                rebuild_connection(ConnectionRecord.from_bytes(strange.to_bytes()))
            assert frozen.frozen() == [], "something is left of it"
            made = rebuild_connection(
                ConnectionRecord.from_bytes(record.to_bytes()), elapsed=time.monotonic() - exported
            )
            assert transport_progress(made) is Progress.FROZEN
            with pytest.raises(AlreadyFrozen):
                rebuild_connection(record)
        hosts.a.remove(family)
        hosts.b.add(family)
        with hosts.a:
            discard_connection(name)
        with hosts.b:
            wait_until(lambda: route.is_local(SERVICE[family]))
            transport_resume(made)
        made.settimeout(5)
        assert made.recv(1, socket.MSG_OOB) == b"U"
        assert receive(made, 6) == b"abcdef"
        talk(made, client)
        assert watcher.resets() == []
    hosts.b.remove(family)
    for sock in (made, served, client):
        sock.setsockopt(Level.TCP, TCP.REPAIR, 1)
        sock.close()


def test_a_program_killed_while_it_makes_a_connection_anew_loses_nothing(ends, monkeypatch):
    """Dissolved and not rebuilt: what lies on disk makes it anew."""
    served, client = ends
    client.send(b"unread")
    unread(served, 6)
    entry = transport_freeze(served)

    class Killed(BaseException):
        pass

    def dies(*_):
        raise Killed

    monkeypatch.setattr(replacement, "_bind", dies)
    with pytest.raises(Killed):
        transport_state_set(served, [StateItem("snd_una", Datatype.SEQUENCE, 5)])
    monkeypatch.undo()
    with pytest.raises(OSError, match="not connected"):
        served.getpeername()
    assert frozen.entry_of(entry.conn_id).undo
    transport_resume(entry.conn_id)
    assert receive(served, 6) == b"unread"
    talk(served, client)


def test_a_step_that_the_kernel_refuses_leaves_the_connection_as_it_was(ends, monkeypatch):
    served, client = ends
    transport_freeze(served)
    before = values(served, ["snd_una", "rcv_nxt"])
    real, calls = replacement.rebuild_connections, []

    def refuses(*args, **how):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(22, "Invalid argument")
        return real(*args, **how)

    monkeypatch.setattr(replacement, "rebuild_connections", refuses)
    with pytest.raises(StateNotSet):
        transport_state_set(served, [StateItem("snd_una", Datatype.SEQUENCE, 5)])
    assert values(served, ["snd_una", "rcv_nxt"]) == before
    transport_resume(served)
    talk(served, client)


def test_a_used_socket_takes_no_tuple(hosts, ends4):
    served, _ = ends4
    with pytest.raises(UnsupportedSocket):
        transport_bind_tuple(served, "tcp:10.9.9.9:1-10.9.9.8:2")
    with socket.socket(V4, socket.SOCK_STREAM) as fresh, pytest.raises(UnsupportedSocket):
        transport_bind_tuple(fresh, "tcp:[fd00::1]:1-[fd00::2]:2")


def echo(client, data):
    client.sendall(data)
    return client.recv(len(data), socket.MSG_WAITALL)


def test_the_owner_never_notices(owned):
    """It waits in recv() all the time; the connection is made anew under it."""
    process, name, client = owned
    assert echo(client, b"one") == b"one"
    transport_freeze(name)
    told = values(name, ["snd_una"])["snd_una"]
    for number in ((told + 5) & 0xFFFFFFFF, told):
        transport_state_set(name, [StateItem("snd_una", Datatype.SEQUENCE, number)])
    transport_resume(name)
    assert echo(client, b"two") == b"two"
    assert process.poll() is None


def test_everything_works_on_a_dead_processs_connection(owned):
    process, name, client = owned
    client.sendall(b"nobody reads this")
    assert client.recv(17, socket.MSG_WAITALL) == b"nobody reads this"
    transport_freeze(name)
    process.send_signal(signal.SIGKILL)
    process.wait()
    client.sendall(b"late")
    wait_until(lambda: transport_read_pending(name) == [Extent(0, b"late")])
    assert values(name, ["state", "peer_port"])["state"] == "ESTABLISHED"
    assert transport_progress(name) is Progress.FROZEN
    transport_state_set(name, [StateItem("tcp.nodelay", Datatype.INT, 1)])
    transport_restore_pending(name, [Extent(0, b"put back: ")])
    assert transport_read_pending(name)[0].data == b"put back: "
    assert transport_buffer_purge(name).unread == 10
    # cleaning up: nobody owns it, so that it ends as its owner's death would have ended it
    transport_resume(name)
    with pytest.raises(ConnectionResetError):
        client.recv(100)


def test_a_connection_of_another_user_is_denied(owned, hosts):
    _, name, client = owned
    calls = [
        lambda: transport_state_get(name, ["state"]),
        lambda: transport_state_set(name, [StateItem("tcp.nodelay", Datatype.INT, 1)]),
        lambda: transport_freeze(name),
        lambda: transport_arrivals(name),
    ]
    assert as_nobody(calls) == [NotPermitted.code] * len(calls)
    assert values(name, ["tcp.nodelay"]) == {"tcp.nodelay": 0}
    assert echo(client, b"untouched") == b"untouched"


def as_nobody(calls):
    """What each call ends with in a process of user 65534: an error's code, or its word."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            for call in calls:
                try:
                    call()
                    told = "allowed"
                except Exception as error:
                    told = getattr(error, "code", repr(error))
                os.write(writing, f"{told}\n".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        found = told.read().splitlines()
    os.waitpid(child, 0)
    return found
