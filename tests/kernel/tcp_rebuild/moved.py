"""Connections exported on one host and rebuilt on another."""

import socket
import time

from tcpstate.discard import discard_connections
from tcpstate.export import export_connections
from tcpstate.freeze import quiet
from tcpstate.kernel import bpf, route
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import INFO_SIZE, TCP, TcpInfo
from tcpstate.rebuild import compare, rebuild_connections, release_connections
from tcpstate.record import ConnectionRecord
from tests.tscnet import SERVICE, pair, wait_until

V4, V6 = socket.AF_INET, socket.AF_INET6

FAMILIES = {"IPv4": (V4, False), "IPv6": (V6, False), "mapped": (V4, True)}


def info(sock):
    return TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE))


class Move:
    """A connection to the service address on a, to be moved to b."""

    def __init__(self, hosts, kind):
        self.hosts, (self.family, mapped) = hosts, FAMILIES[kind]
        hosts.a.add(self.family)
        with hosts.a:
            wait_until(lambda: route.is_local(SERVICE[self.family]))
        self.here = hosts.a
        self.served, self.client = pair(hosts.a, hosts.c, self.family, mapped=mapped)
        self.client.settimeout(8)

    def export(self):
        with self.hosts.a:
            self.states = quiet([self.served])
            (self.record,) = export_connections([self.served], self.states)
        self.exported = time.monotonic()
        return self.record

    def rebuild(self, **how):
        # over the wire and back
        self.record = ConnectionRecord.from_bytes(self.record.to_bytes())
        with self.hosts.b:
            (made,) = rebuild_connections([self.record], elapsed=time.monotonic() - self.exported, **how)
            (again,) = export_connections([made], self.states)
        assert compare(self.record, again) == []
        self.made = made
        return made

    def release(self):
        self.hosts.a.remove(self.family)
        self.hosts.b.add(self.family)
        self.here = self.hosts.b
        with self.hosts.b:
            wait_until(lambda: route.is_local(SERVICE[self.family]))
            release_connections([self.made], [self.record])
        discard_connections([self.served])
        self.made.settimeout(8)

    def all(self, **how):
        self.export()
        self.rebuild(**how)
        self.release()
        return self.made

    def end(self):
        self.here.remove(self.family)
        for sock in (self.served, self.client, getattr(self, "made", self.client)):
            if sock.fileno() >= 0:
                sock.setsockopt(Level.TCP, TCP.REPAIR, 1)
                sock.close()


def deaf(sock):
    """The socket hears nothing until its filter is detached."""
    bpf.attach(sock, bpf.DROP_ALL)


def hearing(sock):
    sock.setsockopt(Level.SOCKET, SO.DETACH_FILTER, 0)


def attempt(call):
    try:
        return 0, call()
    except OSError as error:
        return error.errno, None
