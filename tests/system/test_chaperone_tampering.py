"""A client that uses the moment of an export, in which its socket is in repair mode, to make something else of it."""

import socket

import pytest

from tcpstate.chaperone import holding
from tcpstate.chaperone.holding import Holding
from tcpstate.chaperone.identity import Holder, conn_id_of
from tcpstate.chaperone.journal import Journal
from tcpstate.errors import TamperedConnection
from tcpstate.export import export_connections
from tcpstate.kernel.sockets import Level
from tcpstate.kernel.tcp import TCP, TcpState
from tests.kernel.tcp.test_chaperone_facts import connect_nowhere, state
from tests.tscnet import SERVICE, Watcher, net, pair


@pytest.fixture
def hosts():
    with net() as hosts:
        hosts.a.add(socket.AF_INET)
        yield hosts


def as_another(sock):
    connect_nowhere(sock)
    sock.bind((SERVICE[socket.AF_INET], 4711))
    sock.connect(("10.77.0.3", 9))


def as_listener(sock):
    connect_nowhere(sock)
    sock.bind((SERVICE[socket.AF_INET], 7000))
    sock.listen()


@pytest.mark.parametrize("attack", [as_another, as_listener])
@pytest.mark.parametrize("before", [True, False], ids=["while-read", "afterwards"])
def test_what_became_something_else_is_ended_and_not_exported(hosts, tmp_path, monkeypatch, attack, before):
    server, client = pair(hosts.a, hosts.c)
    with hosts.a, server, client, Watcher(hosts.c) as watcher:
        held_by = Holding(Journal(tmp_path))
        held_by.open()
        try:
            mine = server.dup()
            holder = Holder(sock=mine, conn_id=conn_id_of(mine), uid=0, pid=1, stopped=True)
            held = held_by.freeze(holder, 1, 0.0)

            def export(socks, states):
                if before:
                    # the client has the same socket, by another descriptor
                    server.setsockopt(Level.TCP, TCP.REPAIR, 1)
                    attack(server)
                    return export_connections(socks, states)
                records = export_connections(socks, states)
                attack(server)
                return records

            monkeypatch.setattr(holding, "export_connections", export)
            with pytest.raises(TamperedConnection):
                held_by.export(held)
            assert held_by.held == {}
            assert state(server) is TcpState.CLOSE
            assert server.getsockopt(Level.TCP, TCP.REPAIR) == 0
        finally:
            held_by.close()
        sent = [s for s in watcher.seen if s[1].source == SERVICE[socket.AF_INET]]
    assert sent == [], "nothing of it has left the host"
