"""Forwarding of connections from the host that has their address to the one where their sockets are: tcx programs.

At *home*, the host to which the network brings the address:

    steer     ingress of its Ethernet interfaces: segments of forwarded connections, and of new ones to a forwarded
              port, leave through the tunnel, the segments of a GSO packet made short enough for it; so do ICMP errors
              about them.  What another process of home has a socket for stays
    returned  ingress of the tunnel: the answers leave by the interface by which the connection comes, with home's own
              hardware address; nothing else gets out

*Away*, where the sockets are:

    guard     ingress of the tunnel: only what is forwarded gets in
    hush      ingress of its Ethernet interfaces: nobody there asks for the address by ARP.  (An IPv6 address is only
              answered for on the interface that has it: ndisc_recv_ns.)

A frame of type :data:`PROBE` goes through the tunnel and comes back: :attr:`Steering.echoed` tells.

Links and maps are for the caller to pin: then forwarding outlives its maker.

Source: include/uapi/linux/bpf.h (struct __sk_buff, bpf_redirect, bpf_redirect_neigh, bpf_skc_lookup_tcp),
net/core/filter.c.  Kernel 6.6 (tcx).
"""

from __future__ import annotations

import enum
import errno
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterable, Mapping
from typing import Final

from tcpstate.connid import ConnId
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.handshake import tuple_key
from tcpstate.kernel.bpf.resize import shorten
from tcpstate.slotted import dataclass

__all__ = ["AWAY_MAC", "HOME_MAC", "PROBE", "PROBE_MAC", "Entry", "Role", "Seen", "Steering", "attach"]

#: the tunnel's ends; a frame in between has the address of neither as its source (the kernel takes that for a loop)
HOME_MAC: Final = bytes.fromhex("0274636d0001")
AWAY_MAC: Final = bytes.fromhex("0274636d0002")
PROBE_MAC: Final = bytes.fromhex("0274636d0003")
#: EtherType of probes: the first one for local experiments (IEEE 802)
PROBE: Final = 0x88B5

_KEY: Final = 40
#: of a connection: interface by which it comes, what was seen (Seen), when the last segment came (CLOCK_BOOTTIME, ns)
_VALUE: Final = struct.Struct("=IIQ")
_PORT_KEY: Final = 20
_ADDRESS: Final = 16
_FRESH: Final = 16384
_MOST_ADDRESSES: Final = 256
_ARP_TARGET: Final = 24  # struct arphdr of IPv4 over Ethernet: the address that is asked for
#: the state map: whether it is on, the longest probe that came back
_STATE: Final = struct.Struct("=II")
_ON, _ECHOED = 0, 4

#: struct __sk_buff
_LEN, _PKT_TYPE, _PROTOCOL, _VLAN_PRESENT, _IFINDEX = 0, 4, 16, 20, 40
_FROM_NETWORK_HEADER: Final = 1  # BPF_HDR_START_NET
_NEXT, _DROP = -1, 2
_TCP, _ICMP, _ICMP6 = 6, 1, 58
_UNREACHABLE, _TOO_BIG = 3, 2  # with the new MTU; ICMP, ICMPv6
_IPV4, _IPV6, _ARP = 0x0800, 0x86DD, 0x0806
_LISTEN: Final = 10
_TIME_WAIT: Final = 6
_SOCK_STATE: Final = 72  # struct bpf_sock.state
_FIN, _SYN, _RST, _ACK, _URG = 1, 2, 4, 16, 32
#: the frame: key, header, key of a port, a value, length of the headers
_AT_KEY, _AT_HEAD, _AT_PORT, _AT_VALUE, _AT_LENGTH = -40, -80, -104, -120, -128


class Seen(enum.IntFlag):
    """What has passed of a connection."""

    PEER_FIN = 1
    OUR_FIN = 2
    RST = 4


class Role(enum.Enum):
    """Which end of a tunnel."""

    HOME = "home"
    AWAY = "away"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A forwarded connection.

    key         in the map
    connection  which it is
    device      interface by which its answers leave, index
    seen        what has passed of it
    last        CLOCK_BOOTTIME of its last segment, nanoseconds; 0: none has come
    """

    key: bytes
    connection: ConnId
    device: int
    seen: Seen
    last: int

    @classmethod
    def unpack(cls, key: bytes, value: bytes) -> Entry:
        """From the map."""
        device, seen, last = _VALUE.unpack(value)
        return cls(key=key, connection=_connection(key), device=device, seen=Seen(seen & 7), last=last)

    @property
    def over(self) -> bool:
        """Whether both ends have closed it, or one has reset it."""
        return bool(self.seen & Seen.RST) or self.seen & 3 == 3


def _connection(key: bytes) -> ConnId:
    # twelve bytes are a key of IPv4; no local IPv6 address is zero
    size, family = (16, socket.AF_INET6) if any(key[12:]) else (4, socket.AF_INET)
    peer, local = (socket.inet_ntop(family, key[at : at + size]) for at in (0, size))
    peer_port, local_port = struct.unpack_from("!HH", key, 2 * size)
    return ConnId(protocol="tcp", local=local, local_port=local_port, peer=peer, peer_port=peer_port)


def address_key(address: str) -> bytes:
    """An address as a key."""
    return ipaddress.ip_address(address).packed.ljust(_ADDRESS, b"\0")


def port_key(address: str, port: int) -> bytes:
    """An address and a port as a key."""
    return address_key(address) + struct.pack("!H", port) + b"\0\0"


class Steering:
    """The maps of one end, by descriptors that the caller closes. The programs have them, too."""

    NAMES: Final = ("state", "connections", "fresh", "ports", "addresses")

    def __init__(self, fds: Mapping[str, int]) -> None:
        self.fds = dict(fds)

    @classmethod
    def make(cls, connections: int, ports: int) -> Steering:
        """New maps for so many, switched off. Refused."""
        make = call.create_map
        fds: dict[str, int] = {}
        try:
            fds["state"] = make(call.MapType.ARRAY, 4, _STATE.size, 1, name="tcpmig_state")
            fds["connections"] = make(call.MapType.HASH, _KEY, _VALUE.size, max(1, connections), name="tcpmig_conns")
            fds["fresh"] = make(call.MapType.LRU_HASH, _KEY, _VALUE.size, _FRESH, name="tcpmig_fresh")
            fds["ports"] = make(call.MapType.HASH, _PORT_KEY, 4, max(1, ports), name="tcpmig_ports")
            fds["addresses"] = make(call.MapType.HASH, _ADDRESS, 4, _MOST_ADDRESSES, name="tcpmig_addrs")
        except OSError:
            cls(fds).close()
            raise
        return cls(fds)

    def close(self) -> None:
        """Close the descriptors."""
        while self.fds:
            os.close(self.fds.popitem()[1])

    def switch(self, *, on: bool) -> None:
        """From now on segments are forwarded, or let in; or not. Refused."""
        state = bytearray(self._state())
        struct.pack_into("=I", state, _ON, on)
        call.update(self.fds["state"], bytes(4), bytes(state))

    @property
    def on(self) -> bool:
        """Whether segments are forwarded. Refused."""
        return bool(_STATE.unpack(self._state())[0])

    @property
    def echoed(self) -> int:
        """Bytes of the longest probe that came back; 0: none. Refused."""
        found: int = _STATE.unpack(self._state())[1]
        return found

    def _state(self) -> bytes:
        return call.lookup(self.fds["state"], bytes(4), _STATE.size) or bytes(_STATE.size)

    def forward(self, connection: ConnId, device: int) -> None:
        """Forward a connection; answers leave by the interface ``device``. Refused."""
        call.update(self.fds["connections"], tuple_key(connection), _VALUE.pack(device, 0, 0))

    def forward_port(self, address: str, port: int, device: int) -> None:
        """Forward new connections to this port. Answers leave by the interface by which the connection came; by
        ``device`` should that be forgotten. Refused."""
        call.update(self.fds["ports"], port_key(address, port), struct.pack("=I", device))

    def admit(self, address: str) -> None:
        """Let in what is for this address, and let nobody ask for it. Refused."""
        call.update(self.fds["addresses"], address_key(address), struct.pack("=I", 1))

    def entries(self) -> list[Entry]:
        """The connections. Refused."""
        found = []
        for key in list(call.keys(self.fds["connections"], _KEY)):
            value = call.lookup(self.fds["connections"], key, _VALUE.size)
            if value is not None:
                found.append(Entry.unpack(key, value))
        return found

    def ports(self) -> list[tuple[str, int]]:
        """Addresses and ports to which new connections are forwarded. Refused."""
        found = []
        for key in call.keys(self.fds["ports"], _PORT_KEY):
            # which family: no IPv6 address of a host ends in twelve zero bytes
            packed = key[:_ADDRESS] if any(key[4:_ADDRESS]) else key[:4]
            found.append((str(ipaddress.ip_address(packed)), int.from_bytes(key[_ADDRESS : _ADDRESS + 2], "big")))
        return sorted(found)

    def drop(self, entry: Entry) -> None:
        """Forward it no longer; that it is gone already is no error. Refused."""
        try:
            call.delete(self.fds["connections"], entry.key)
        except call.Refused as error:
            if error.errno != errno.ENOENT:
                raise


class _Source:
    """How a program for one end is written: where things are in a packet."""

    def __init__(self, maps: Steering, tunnel: int, lost: str) -> None:
        self.asm = Asm().mov(6, 1)
        self._maps = maps
        self._tunnel = tunnel
        #: where to go with what is not understood
        self._lost = lost

    def switched_on(self) -> None:
        self.asm.map_value(1, self._maps.fds["state"]).load(4, 1, 1, _ON).jump_if(Jump.EQUAL, 1, 0, self._lost)

    def clear(self) -> None:
        for at in range(_AT_LENGTH, 0, 8):
            self.asm.store_number(8, FRAME, at, 0)

    def fetch(self, to: int, length: int, *, at: int | None = None, beyond: int = 0) -> None:
        """Bytes of the packet into the frame: from ``at`` in the network header, or ``beyond`` register 9."""
        self.asm.mov(1, 6)
        if at is None:
            self.asm.mov(2, 9).add(2, beyond)
        else:
            self.asm.set(2, at)
        self.asm.frame(3, to).set(4, length).set(5, _FROM_NETWORK_HEADER).call(Helper.SKB_LOAD_BYTES_RELATIVE)
        self.asm.jump_if(Jump.NOT_EQUAL, 0, 0, self._lost)

    def copy(self, size: int, source: int, to: int) -> None:
        self.asm.load(size, 1, FRAME, source).store(size, FRAME, to, 1)

    def family(self, v4: str, v6: str) -> None:
        self.asm.load(4, 1, 6, _PROTOCOL)
        self.asm.jump_if(Jump.EQUAL, 1, socket.htons(_IPV4), v4).jump_if(Jump.EQUAL, 1, socket.htons(_IPV6), v6)
        self.asm.jump(self._lost)

    def key(self, *, arriving: bool) -> None:
        """The key of the connection and that of its port, how long the headers are, the TCP flags in register 8. The
        peer stands first in a key: it is the source of what arrives. ICMP errors that arrive count as segments of what
        they are about."""
        self.family("v4", "v6")
        for name, head, protocol, size, own, peer, port in (
            ("v4", 20, 9, 4, 12, 16, 8),
            ("v6", 40, 6, 16, 8, 24, 32),
        ):
            self._key_of(name, head, protocol, size, (own, peer), port, arriving=arriving)
        self.asm.label("keyed")

    def _key_of(
        self, name: str, head: int, protocol: int, size: int, ends: tuple[int, int], port: int, *, arriving: bool
    ) -> None:
        asm, v4 = self.asm, name == "v4"
        error, kind = (_ICMP, _UNREACHABLE) if v4 else (_ICMP6, _TOO_BIG)
        asm.label(name)
        self.fetch(_AT_HEAD, head, at=0)
        if v4:
            # only the first fragment has ports
            asm.load(2, 1, FRAME, _AT_HEAD + 6).big_endian(1, 16).mask(1, 0x1FFF)
            asm.jump_if(Jump.NOT_EQUAL, 1, 0, self._lost)
        asm.set(9, head) if not v4 else asm.load(1, 9, FRAME, _AT_HEAD).mask(9, 15).shift_left(9, 2)
        asm.load(1, 1, FRAME, _AT_HEAD + protocol)
        if arriving:
            asm.jump_if(Jump.EQUAL, 1, error, f"{name} error")
        asm.jump_if(Jump.NOT_EQUAL, 1, _TCP, self._lost)
        first, second = ends if arriving else reversed(ends)
        self._ends(size, first, second)
        self.fetch(_AT_HEAD, 14)
        asm.load(1, 8, FRAME, _AT_HEAD + 13)
        asm.load(1, 1, FRAME, _AT_HEAD + 12).mask(1, 0xF0).shift_right(1, 2).add_register(1, 9)
        asm.store(4, FRAME, _AT_LENGTH, 1)
        self._ports(size, port, swapped=not arriving)
        asm.jump("keyed")
        if not arriving:
            return
        asm.label(f"{name} error")
        self.fetch(_AT_HEAD, 1)
        asm.load(1, 1, FRAME, _AT_HEAD).jump_if(Jump.NOT_EQUAL, 1, kind, self._lost)
        # what it is about is a segment of ours
        self.fetch(_AT_HEAD, head, beyond=8)
        asm.load(1, 1, FRAME, _AT_HEAD + protocol).jump_if(Jump.NOT_EQUAL, 1, _TCP, self._lost)
        if v4:
            asm.load(1, 1, FRAME, _AT_HEAD).mask(1, 15).shift_left(1, 2).add_register(9, 1).add(9, 8)
        else:
            asm.add(9, 8 + head)
        self._ends(size, *reversed(ends))
        self.fetch(_AT_HEAD, 4)
        asm.set(8, 0)
        self._ports(size, port, swapped=True)
        asm.jump("keyed")

    def _ends(self, size: int, peer: int, local: int) -> None:
        for at in range(0, size, 4):
            self.copy(4, _AT_HEAD + peer + at, _AT_KEY + at)
            self.copy(4, _AT_HEAD + local + at, _AT_KEY + size + at)
            self.copy(4, _AT_HEAD + local + at, _AT_PORT + at)

    def _ports(self, size: int, at: int, *, swapped: bool) -> None:
        peer, local = (2, 0) if swapped else (0, 2)
        self.copy(2, _AT_HEAD + peer, _AT_KEY + at)
        self.copy(2, _AT_HEAD + local, _AT_KEY + at + 2)
        self.copy(2, _AT_HEAD + local, _AT_PORT + _ADDRESS)

    def look_up(self, name: str, key: int, otherwise: str) -> None:
        """The value into register 7."""
        self.asm.map(1, self._maps.fds[name]).frame(2, key).call(Helper.MAP_LOOKUP)
        self.asm.jump_if(Jump.EQUAL, 0, 0, otherwise).mov(7, 0)

    def note(self, fin: Seen) -> None:
        """What the flags in register 8 tell goes into the connection's value."""
        asm = self.asm
        asm.load(4, 1, 7, 4).mov(2, 8).mask(2, _RST).either(1, 2)
        asm.mov(2, 8).mask(2, _FIN).shift_left(2, fin.bit_length() - 1).either(1, 2).store(4, 7, 4, 1)
        asm.call(Helper.KTIME_GET_BOOT_NS).store(8, 7, 8, 0)

    def redirect(self, device: int) -> None:
        self.asm.set(1, device).set(2, 0).call(Helper.REDIRECT).exit()

    def out(self, value: int) -> bytes:
        return self.asm.label(self._lost).exit(value).code()


def _steer(maps: Steering, tunnel: int, fits: int) -> bytes:
    source = _Source(maps, tunnel, "out")
    asm = source.asm
    source.switched_on()
    # a VLAN's packets come again on the VLAN's own interface
    for field in (_PKT_TYPE, _VLAN_PRESENT):
        asm.load(4, 1, 6, field).jump_if(Jump.NOT_EQUAL, 1, 0, "out")
    source.clear()
    source.key(arriving=True)
    source.look_up("connections", _AT_KEY, "port")
    source.note(Seen.PEER_FIN)
    asm.jump("forward").label("port")
    source.look_up("ports", _AT_PORT, "out")
    asm.load(4, 1, 6, _PROTOCOL).jump_if(Jump.EQUAL, 1, socket.htons(_IPV6), "socket v6")
    for name, length in (("socket v4", 12), ("socket v6", 36)):
        asm.label(name).mov(1, 6).frame(2, _AT_KEY).set(3, length).set(4, -1).set(5, 0).call(Helper.SKC_LOOKUP_TCP)
        asm.jump_if(Jump.EQUAL, 0, 0, "new").mov(7, 0).jump("found")
    # another process's connection stays; a listener does not count, and a SYN ends the wait of a closed one
    asm.label("found").load(4, 9, 7, _SOCK_STATE).mov(1, 7).call(Helper.SK_RELEASE)
    asm.jump_if(Jump.EQUAL, 9, _LISTEN, "new").jump_if(Jump.NOT_EQUAL, 9, _TIME_WAIT, "out")
    asm.mov(1, 8).mask(1, _SYN).jump_if(Jump.EQUAL, 1, 0, "out")
    asm.label("new").mov(1, 8).mask(1, _SYN | _ACK).jump_if(Jump.NOT_EQUAL, 1, _SYN, "forward")
    asm.load(4, 1, 6, _IFINDEX).store(4, FRAME, _AT_VALUE, 1)
    asm.map(1, maps.fds["fresh"]).frame(2, _AT_KEY).frame(3, _AT_VALUE).set(4, 0).call(Helper.MAP_UPDATE)
    # of an urgent segment there is no shorter one: where it points to counts from each one's beginning
    asm.label("forward").jump_if(Jump.SET, 8, _URG, "away")
    shorten(asm, fits, _AT_LENGTH, "away", "broken")
    asm.label("broken").exit(_DROP)
    asm.label("away")
    for at in (0, 2, 4):
        asm.store_number(2, FRAME, _AT_HEAD + at, int.from_bytes(AWAY_MAC[at : at + 2], sys.byteorder))
    asm.mov(1, 6).set(2, 0).frame(3, _AT_HEAD).set(4, 6).set(5, 0).call(Helper.SKB_STORE_BYTES)
    source.redirect(tunnel)
    return source.out(_NEXT)


def _returned(maps: Steering, tunnel: int, _: int) -> bytes:
    source = _Source(maps, tunnel, "drop")
    asm = source.asm
    asm.load(4, 1, 6, _PROTOCOL).jump_if(Jump.NOT_EQUAL, 1, socket.htons(PROBE), "segment")
    asm.map_value(2, maps.fds["state"]).load(4, 1, 6, _LEN).load(4, 3, 2, _ECHOED)
    asm.jump_if_register(Jump.GREATER, 3, 1, "drop").store(4, 2, _ECHOED, 1).jump("drop")
    asm.label("segment")
    source.switched_on()
    source.clear()
    source.key(arriving=False)
    source.look_up("connections", _AT_KEY, "fresh")
    source.note(Seen.OUR_FIN)
    asm.jump("send").label("fresh")
    source.look_up("fresh", _AT_KEY, "port")
    asm.jump("send").label("port")
    source.look_up("ports", _AT_PORT, "drop")
    asm.label("send").load(4, 1, 7, 0).set(2, 0).set(3, 0).set(4, 0).call(Helper.REDIRECT_NEIGH).exit()
    return source.out(_DROP)


def _guard(maps: Steering, tunnel: int, _: int) -> bytes:
    source = _Source(maps, tunnel, "drop")
    asm = source.asm
    asm.load(4, 1, 6, _PROTOCOL).jump_if(Jump.NOT_EQUAL, 1, socket.htons(PROBE), "segment")
    source.redirect(tunnel)
    asm.label("segment")
    source.switched_on()
    source.clear()
    source.family("v4", "v6")
    for name, head, protocol, destination, size, error, kind in (
        ("v4", 20, 9, 16, 4, _ICMP, _UNREACHABLE),
        ("v6", 40, 6, 24, 16, _ICMP6, _TOO_BIG),
    ):
        asm.label(name)
        source.fetch(_AT_HEAD, head, at=0)
        for at in range(0, size, 4):
            source.copy(4, _AT_HEAD + destination + at, _AT_KEY + at)
        asm.load(1, 1, FRAME, _AT_HEAD + protocol).jump_if(Jump.EQUAL, 1, _TCP, "whose")
        asm.jump_if(Jump.NOT_EQUAL, 1, error, "drop")
        asm.set(9, head) if name == "v6" else asm.load(1, 9, FRAME, _AT_HEAD).mask(9, 15).shift_left(9, 2)
        source.fetch(_AT_HEAD, 1)
        asm.load(1, 1, FRAME, _AT_HEAD).jump_if(Jump.EQUAL, 1, kind, "whose").jump("drop")
    asm.label("whose")
    source.look_up("addresses", _AT_KEY, "drop")
    asm.exit(_NEXT)
    return source.out(_DROP)


def _hush(maps: Steering, tunnel: int, _: int) -> bytes:
    source = _Source(maps, tunnel, "out")
    asm = source.asm
    asm.load(4, 1, 6, _PROTOCOL).jump_if(Jump.NOT_EQUAL, 1, socket.htons(_ARP), "out")
    source.clear()
    source.fetch(_AT_KEY, 4, at=_ARP_TARGET)
    source.look_up("addresses", _AT_KEY, "out")
    asm.exit(_DROP)
    return source.out(_NEXT)


def attach(role: Role, maps: Steering, tunnel: int, devices: Iterable[int], fits: int) -> dict[str, int]:
    """Load the programs of one end and attach them: to the ``tunnel`` and to ``devices`` (indices). The links, by a
    name for each, as descriptors. Refused.

    fits  bytes of the longest packet that need not be sent through the tunnel in fragments
    """
    inner, outer = (_returned, _steer) if role is Role.HOME else (_guard, _hush)
    links: dict[str, int] = {}
    try:
        for make, places in ((inner, [tunnel]), (outer, list(devices))):
            code = make(maps, tunnel, fits)
            program = call.load(
                call.ProgramType.SCHED_CLS, code, attach=call.Attach.TCX_INGRESS, name=f"tcpmig{make.__name__}"
            )
            try:
                for index in places:
                    links[f"link-{index}"] = call.link(program, index, call.Attach.TCX_INGRESS)
            finally:
                os.close(program)
    except OSError:
        while links:
            os.close(links.popitem()[1])
        raise
    return links
