"""Three hosts on a bridge, as bare network namespaces of this process, for the tests of ``tcpstate``.

Lighter than :mod:`tests.hosts`: no processes, no other clocks; sockets of all hosts live in this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import subprocess
import threading
import time
from dataclasses import dataclass

from tcpstate.segment import parse
from tcpstate.silence import Blackhole

libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET = 0x40000000
ETH_P_ALL = 3
PACKET_OUTGOING = 4

V4 = "10.77.0."
V6 = "fd77::"
SERVICE = {socket.AF_INET: "10.77.0.100", socket.AF_INET6: "fd77::100"}
PREFIX = {socket.AF_INET: 24, socket.AF_INET6: 64}


def sh(command, *, check=True):
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{command}: {done.stderr}")
    return done.stdout


def until_local(name, address, device):
    """Wait until the namespace takes packets for the address: of an IPv6 address, a work queue of the kernel adds the
    route a moment after the address is there, without duplicate address detection too (addrconf_dad_start)."""
    if ":" in address:
        wait_until(lambda: sh(f"ip -n {name} -6 route show table local {address} dev {device}").strip())


class Space:
    """A network namespace; inside ``with space:`` this thread is in it."""

    def __init__(self, name):
        self.name = name
        sh(f"ip netns add {name} && ip -n {name} link set lo up")
        self.fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
        self.homes = []

    def __enter__(self):
        self.homes.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))
        if libc.setns(self.fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        return self

    def __exit__(self, *_):
        home = self.homes.pop()
        if libc.setns(home, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(home)

    def sh(self, command, *, check=True):
        return sh(f"ip netns exec {self.name} {command}", check=check)

    def socket(self, *args):
        with self:
            return socket.socket(*args)

    def close(self):
        os.close(self.fd)
        sh(f"ip netns del {self.name}", check=False)


class Host(Space):
    """A namespace with one interface, eth0, on the net's bridge."""

    def __init__(self, name, bridge, number):
        super().__init__(name)
        self.number = number
        port = f"p{number}"
        sh(f"ip -n {name} link add eth0 type veth peer name {port} netns {bridge.name}")
        sh(f"ip -n {bridge.name} link set {port} master br0 up")
        self.sh(
            "sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.eth0.accept_dad=0 net.ipv4.conf.all.arp_accept=1"
        )
        sh(f"ip -n {name} link set eth0 up")
        sh(f"ip -n {name} addr add {V4}{number}/24 dev eth0; ip -n {name} addr add {V6}{number}/64 dev eth0 nodad")
        until_local(name, f"{V6}{number}", "eth0")
        self.mac = bytes.fromhex(self.sh("cat /sys/class/net/eth0/address").strip().replace(":", ""))

    def own(self, family):
        return f"{V6 if family == socket.AF_INET6 else V4}{self.number}"

    def add(self, family):
        """Take the service address, and tell the others."""
        flags = "nodad" if family == socket.AF_INET6 else ""
        sh(f"ip -n {self.name} addr add {SERVICE[family]}/{PREFIX[family]} dev eth0 {flags}")
        until_local(self.name, SERVICE[family], "eth0")
        self.announce(family)

    def remove(self, family):
        sh(f"ip -n {self.name} addr del {SERVICE[family]}/{PREFIX[family]} dev eth0")

    def announce(self, family):
        raw = socket.inet_pton(family, SERVICE[family])
        with self.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as out:
            out.bind(("eth0", 0))
            if family == socket.AF_INET:
                # A gratuitous request is believed at once; a reply, unless its target is its sender, not within 1 s
                # of the last change (arp_process, locktime).
                for operation, target in ((1, bytes(6)), (2, self.mac)):
                    head = struct.pack("!HHBBH", 1, 0x800, 6, 4, operation)
                    out.send(b"\xff" * 6 + self.mac + b"\x08\x06" + head + self.mac + raw + target + raw)
                return
            to = socket.inet_pton(family, "ff02::1")
            body = struct.pack("!BBHI", 136, 0, 0, 0x20000000) + raw + b"\x02\x01" + self.mac
            pseudo = raw + to + struct.pack("!II", len(body), 58)
            total = sum(struct.unpack(f"!{len(pseudo + body) // 2}H", pseudo + body))
            total = (total & 0xFFFF) + (total >> 16)
            check = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
            body = body[:2] + struct.pack("!H", check) + body[4:]
            head = struct.pack("!IHBB", 6 << 28, len(body), 58, 255)
            out.send(bytes.fromhex("333300000001") + self.mac + b"\x86\xdd" + head + raw + to + body)


@dataclass
class Net:
    bridge: Space
    a: Host
    b: Host
    c: Host

    @property
    def hosts(self):
        return self.a, self.b, self.c


_count = 0


@contextlib.contextmanager
def net():
    """Hosts a, b and c; the service address moves between a and b."""
    global _count
    _count += 1
    prefix = f"tsc{os.getpid()}n{_count}"
    spaces = []
    try:
        bridge = Space(prefix + "br")
        spaces.append(bridge)
        sh(f"ip -n {bridge.name} link add br0 type bridge mcast_snooping 0 && ip -n {bridge.name} link set br0 up")
        for i, letter in enumerate("abc", 1):
            spaces.append(Host(prefix + letter, bridge, i))
        yield Net(bridge, *spaces[1:])
    finally:
        for space in spaces:
            space.close()


@contextlib.contextmanager
def silent_net():
    """The same, and the rules of a freeze stand at all of them."""
    with net() as made:
        for host in made.hosts:
            with host:
                Blackhole().ensure()
        yield made


def pair(server, client, family=socket.AF_INET, *, service=True, mapped=False, port=7000):
    """(accepted socket on ``server``, client's socket): one connection, to the service address or the host's own."""
    address = SERVICE[family] if service else server.own(family)
    kind = socket.AF_INET6 if mapped else family
    with server.socket(kind, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((f"::ffff:{address}" if mapped else address, port))
        listener.listen(16)
        other = client.socket(family, socket.SOCK_STREAM)
        other.connect((address, listener.getsockname()[1]))
        accepted, _ = listener.accept()
    return accepted, other


def receive(sock, size):
    """So many bytes, or a few more that came with them."""
    got = bytearray()
    while len(got) < size:
        data = sock.recv(1 << 20)
        assert data
        got += data
    return bytes(got)


class Watcher:
    """What passes a host's interface: parsed segments with a flag whether it left. Runs a thread until closed."""

    def __init__(self, host, device="eth0", keep=lambda segment: True):
        self.sock = host.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        self.sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)
        self.sock.bind((device, ETH_P_ALL))
        self.sock.settimeout(0.1)
        self.seen = []
        self.keep = keep
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._stop:
            try:
                data, address = self.sock.recvfrom(1 << 18)
            except TimeoutError:
                continue
            found = parse(data)
            if found is not None and self.keep(found):
                self.seen.append((address[2] == PACKET_OUTGOING, found))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        time.sleep(0.05)
        self._stop = True
        self._thread.join()
        self.sock.close()

    def sent(self):
        time.sleep(0.02)
        return [s for out, s in self.seen if out]

    def resets(self):
        time.sleep(0.02)
        return [s for _, s in self.seen if s.flags & 4]


def wait_until(condition, seconds=5.0):
    """Poll until it holds; AssertionError if it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never became true"
        time.sleep(0.002)
