"""Records of sockets on another host's interfaces: names are mapped wherever a record has one, and nowhere else."""

import socket

from checkpoint.files.inet import Endpoint
from checkpoint.files.listener import Listener
from checkpoint.files.sockopts import SocketOptions
from tcpstate.record import DEVICE_OPTION, Buffers


def listener(scope, device):
    buffers = Buffers(send=1, receive=1, send_locked=False, receive_locked=False)
    data = {DEVICE_OPTION: device} if device else {}
    return Listener(
        family=socket.AF_INET6,
        name=Endpoint(address="fe80::1", port=80, scope=scope),
        backlog=5,
        options=SocketOptions(buffers=buffers, data=data),
        flags=0,
    )


def test_scopes_and_bindings_take_the_name_of_this_host():
    moved = listener("eth0", b"eth0").on_devices({"eth0": "lan0"})
    assert moved == listener("lan0", b"lan0")


def test_other_interfaces_keep_theirs():
    for one in (listener("eth1", b"eth1"), listener("eth1", b"")):
        assert one.on_devices({"eth0": "lan0"}) == one
        assert one.on_devices({}) is one
