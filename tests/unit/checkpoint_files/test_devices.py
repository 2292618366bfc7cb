"""Records of sockets on another host's interfaces: names are mapped wherever a record has one, and nowhere else."""

import socket

from checkpoint.files.inet import Endpoint
from checkpoint.files.listener import Listener
from checkpoint.files.multicast import Membership
from checkpoint.files.sockopts import SocketOptions
from checkpoint.files.udp import UdpFile
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


def test_groups_are_on_the_interfaces_of_this_host():
    def udp(*interfaces):
        groups = tuple(Membership(group=f"239.0.0.{n}", interface=name) for n, name in enumerate(interfaces))
        options = SocketOptions(buffers=Buffers(send=1, receive=1, send_locked=False, receive_locked=False))
        rest = {"name": None, "peer": None, "queue": (), "peek_off": -1, "flags": 0}
        return UdpFile(family=socket.AF_INET, memberships=groups, options=options, **rest)

    assert udp("eth0", "eth1").on_devices({"eth0": "lan0"}) == udp("lan0", "eth1")
