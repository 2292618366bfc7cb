"""What passes a test host's interface: resets, retransmissions, repeated SYNs, with a short log for failures.

Run in a thread of the harness, on the client's side by preference: what the clients do not see did not happen.
"""

from __future__ import annotations

import dataclasses
import enum
import socket
import struct
import threading
import time
from collections import deque
from types import TracebackType

from tests.hosts import Host, Net
from tests.hosts.kernel import in_namespace
from tests.ring import PacketRing

__all__ = ["Flag", "Packet", "PacketReport", "Watcher", "parse"]

LOG = 20_000  # remarkable packets that are kept for a failure's message: half a minute of many short connections
HALF = 1 << 31  # half of the sequence space
MASK = 0xFFFFFFFF
SETTLE = 0.05  # seconds until a packet that was sent now is surely out of the ring


class Flag(enum.IntFlag):
    """TCP flags (RFC 9293 section 3.1)."""

    FIN = 1
    SYN = 2
    RST = 4
    PSH = 8
    ACK = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Packet:
    """One TCP packet: ``length`` bytes of data from sequence number ``seq`` on."""

    time: float
    outgoing: bool
    source: tuple[str, int]
    destination: tuple[str, int]
    seq: int
    ack: int
    flags: Flag
    window: int
    length: int

    def __str__(self) -> str:
        way = "out" if self.outgoing else "in"
        names = "|".join(f.name or "" for f in Flag if f in self.flags)
        (a, p), (b, q) = self.source, self.destination
        clock = time.strftime("%H:%M:%S", time.localtime(self.time)) + f".{int(self.time % 1 * 1e6):06d}"
        what = f"{names} seq {self.seq} ack {self.ack} win {self.window} len {self.length}"
        return f"{clock} {way:3} [{a}]:{p} > [{b}]:{q} {what}"


def parse(when: float, outgoing: bool, length: int, header: bytes) -> Packet | None:
    """An IP packet's TCP header; None where there is none (extension headers and fragments do not occur here)."""
    if header[0] >> 4 == 4 and header[9] == socket.IPPROTO_TCP:
        start = 4 * (header[0] & 15)
        addresses = [socket.inet_ntop(socket.AF_INET, header[i : i + 4]) for i in (12, 16)]
    elif header[0] >> 4 == 6 and header[6] == socket.IPPROTO_TCP:
        start = 40
        addresses = [socket.inet_ntop(socket.AF_INET6, header[i : i + 16]) for i in (8, 24)]
    else:
        return None
    if len(header) < start + 20:
        return None
    sport, dport, seq, ack, offset, flags, window = struct.unpack_from("!HHIIBBH", header, start)
    data = length - start - 4 * (offset >> 4)
    known = Flag(flags & 31)
    return Packet(when, outgoing, (addresses[0], sport), (addresses[1], dport), seq, ack, known, window, data)


@dataclasses.dataclass(slots=True)
class PacketReport:
    """What was seen since the start or the last `Watcher.mark`.

    rsts           every RST
    resent_out     data segments that this host sent again, resent_in: that it got again
    syns_resent    SYNs that this host sent again
    missed         packets that the ring had no room for: then the other figures are lower bounds
    """

    packets: int = 0
    rsts: list[Packet] = dataclasses.field(default_factory=list)
    resent_out: int = 0
    resent_in: int = 0
    syns_resent: int = 0
    missed: int = 0


class Watcher:
    """Watches one interface of a host, or of the bridge (``tmh-NAME``: the port of that host), until closed.

    port    only packets from or to this port
    data    False: only SYN, FIN and RST are looked at: for streams at full speed, where each packet costs time
    """

    def __init__(
        self, host: Host | Net, interface: str = "eth0", *, port: int | None = None, data: bool = True
    ) -> None:
        self._port = port
        with in_namespace(host.netns):
            self._ring = PacketRing(interface, 0xFF if data else int(Flag.SYN | Flag.FIN | Flag.RST))
        self._lock = threading.Lock()
        self._report = PacketReport()
        self._log: deque[Packet] = deque(maxlen=LOG)
        self._highest: dict[bytes, int] = {}  # one direction of a connection -> sequence number after its last byte
        self._syns: dict[bytes, int] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"watch {host.name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing:
            self._ring.read(20, self._take)

    def _take(self, when: float, outgoing: bool, length: int, header: bytes) -> None:
        # The quick way for the many packets that tell nothing; `parse` only for those that do.
        start = 40 if header[0] >> 4 == 6 else 4 * (header[0] & 15)
        sport, dport, seq, _, offset, flags = struct.unpack_from("!HHIIBB", header, start)
        if self._port is not None and self._port not in (sport, dport):
            return
        with self._lock:
            report = self._report
            report.packets += 1
            flow = header[8:40] + header[40:44] if start == 40 else header[12:20] + header[start : start + 4]
            data = length - start - 4 * (offset >> 4)
            remarkable = bool(flags & (Flag.RST | Flag.SYN | Flag.FIN))
            if flags & Flag.SYN:
                if not flags & Flag.ACK and self._syns.get(flow) == seq:
                    report.syns_resent += 1
                self._syns[flow] = seq
                self._highest[flow] = (seq + 1) & MASK
            elif data > 0:
                highest = self._highest.get(flow, seq)
                # One byte of old data is a keepalive of an old kind, or a window probe: no retransmission.
                if data > 1 and 0 < (highest - seq) & MASK < HALF:
                    remarkable = True
                    if outgoing:
                        report.resent_out += 1
                    else:
                        report.resent_in += 1
                if (seq + data - highest) & MASK < HALF:
                    self._highest[flow] = (seq + data) & MASK
            if remarkable:
                packet = parse(when, outgoing, length, header)
                if packet is not None:
                    self._log.append(packet)
                    if flags & Flag.RST:
                        report.rsts.append(packet)

    def mark(self) -> PacketReport:
        """What was seen since the last mark; counting starts anew."""
        time.sleep(SETTLE)
        with self._lock:
            report, self._report = self._report, PacketReport()
            report.missed = self._ring.dropped()
        return report

    def log(self, lines: int = 60) -> str:
        """The remarkable packets (RST, SYN, FIN, data again) of connections that were reset, then the last of all, a
        line each."""
        kept = self.kept()
        reset = {frozenset((packet.source, packet.destination)) for packet in kept if packet.flags & Flag.RST}
        story = [packet for packet in kept if frozenset((packet.source, packet.destination)) in reset]
        return "\n".join([*map(str, story), "the last of all:", *map(str, kept[-lines:])])

    def kept(self) -> list[Packet]:
        """The last remarkable packets, as for :meth:`log`."""
        with self._lock:
            return list(self._log)

    def close(self) -> None:
        """End the watch."""
        if not self._closing:
            self._closing = True
            self._thread.join()
            self._ring.close()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
