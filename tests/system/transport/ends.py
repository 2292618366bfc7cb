"""Connections between two hosts for the tests of the paper's interface, and what is asked of them."""

from __future__ import annotations

import contextlib
import socket

from tcpstate import frozen
from tcpstate.kernel.sockets import Ioctl, ioctl_int
from tcpstate.transport import (
    transport_state_get,
)
from tests.tscnet import pair, receive, wait_until

V4, V6 = socket.AF_INET, socket.AF_INET6

KINDS = {"IPv4": (V4, False), "IPv6": (V6, False), "mapped": (V4, True)}


@contextlib.contextmanager
def connected(hosts, family, mapped):
    served, client = pair(hosts.a, hosts.c, family, service=False, port=0, mapped=mapped)
    served.settimeout(5)
    client.settimeout(5)
    with hosts.a:
        try:
            yield served, client
        finally:
            for entry in frozen.frozen():
                frozen.discard(entry.conn_id)
    served.close()
    client.close()


def values(conn, keywords):
    return {item.keyword: item.value for item in transport_state_get(conn, keywords)}


def unread(sock, count):
    wait_until(lambda: ioctl_int(sock.fileno(), Ioctl.SIOCINQ) == count)


def talk(served, client):
    served.send(b"there")
    assert receive(client, 5) == b"there"
    client.send(b"and back")
    assert receive(served, 8) == b"and back"


def end(address):
    host = address[0].removeprefix("::ffff:")
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
