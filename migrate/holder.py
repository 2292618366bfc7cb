"""The holder: a small process that keeps frozen sockets after their owners have ended.

``python -m migrate.holder ID SHARD FD``; FD is its listening socket (:mod:`migrate.holdline`), the only thing that it
inherits.  It has a session and a control group of its own, /dev/null for standard streams, and speaks to one tool at a
time.  Until it is told Seal it ends with the tool that started it; then it lives until End, or until its time is up.

Kept connections are in repair mode: when the holder is killed they vanish without a packet, and the drop rule
(:mod:`tcpstate.uses.hold`) keeps the host from answering in their place.  What arrives for them meanwhile is captured;
the newest :data:`KEPT_BYTES` are kept, for the connections to be told when they live again.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import socket
import sys
import time
from collections.abc import Sequence

from checkpoint.files.held import HeldSocket
from migrate import holdstore, outlive
from migrate.errors import HolderFailed
from migrate.holdend import dismantle, reset
from migrate.holdline import (
    Captured,
    Done,
    End,
    HoldLine,
    HoldMessage,
    Kept,
    Put,
    Seal,
    Take,
    Told,
    Watch,
    received,
)
from migrate.hostfacts import host_facts
from tcpstate import codec
from tcpstate.capture import Capture
from tcpstate.connid import ConnId
from tcpstate.errors import TcpmigError
from tcpstate.segment import Flag, Segment

__all__ = ["SegmentStore", "Shard", "main"]

# by its own name: as a program this module is called __main__
_log = logging.getLogger("migrate.holder")

#: bytes of captured segments that are kept for a shard
KEPT_BYTES = 32 << 20
_SEGMENT_OVERHEAD = 400
#: seconds
_LONGEST_WAIT = 86400.0


class SegmentStore:
    """What has arrived for some connections: each segment once, the oldest forgotten when there are too many bytes.

    SYNs are not kept: who gave up meanwhile would answer with a RST, and who did not sends another.
    """

    def __init__(self, room: int = KEPT_BYTES) -> None:
        self._room = room
        self._size = 0
        self._segments: dict[Segment, int] = {}
        self.connections: set[ConnId] = set()

    def wanted(self, segment: Segment) -> bool:
        """Whether it is of one of the connections."""
        return not segment.flags & Flag.SYN and segment.conn_id in self.connections

    def add(self, segment: Segment) -> None:
        """Keep one; one that was sent again moves to the end."""
        self._size -= self._segments.pop(segment, 0)
        size = _SEGMENT_OVERHEAD + len(segment.payload)
        self._segments[segment] = size
        self._size += size
        while self._size > self._room:
            self._size -= self._segments.pop(next(iter(self._segments)))

    def packed(self) -> list[bytes]:
        """All, in the order in which they came last."""
        return [codec.pack(segment) for segment in self._segments]


class Shard:
    """One shard of a hold."""

    def __init__(self, hold: str, shard: int, listener: socket.socket, cgroup: str) -> None:
        self._hold, self._shard, self._listener, self._cgroup = hold, shard, listener, cgroup
        self._sockets: list[HeldSocket] = []
        self._store = SegmentStore()
        self._capture: Capture | None = None
        self._sealed = False
        self._deadline: float | None = None
        self._ended = False

    def serve(self) -> None:
        """Until it is told to end, or the time is up."""
        while not self._ended:
            called = self.wait()
            self._look()
            if called:
                sock, _ = self._listener.accept()
                try:
                    with HoldLine(sock, "tool") as line:
                        self._speak(line)
                except (HolderFailed, OSError) as error:
                    _log.warning("a tool left: %s", error)
                if not self._sealed:
                    # the checkpoint died, or gave up: its processes have their sockets
                    return
            elif self._deadline is not None and time.monotonic() >= self._deadline:
                self._time_out()

    def wait(self) -> bool:
        """Until something happens, or the time is up; whether a tool has called."""
        # not select(): the numbers of our descriptors go beyond 1024
        poll = select.poll()
        for sock in (self._listener, *(self._capture.sockets if self._capture is not None else ())):
            poll.register(sock, select.POLLIN)
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        # poll() takes 24 days at most
        ready = poll.poll(None if left is None else math.ceil(min(left, _LONGEST_WAIT) * 1000))
        return any(fd == self._listener.fileno() for fd, _ in ready)

    def _look(self) -> None:
        """Take in what was captured."""
        if self._capture is not None:
            for segment in self._capture.segments(self._store.wanted):
                self._store.add(segment)

    def _speak(self, line: HoldLine) -> None:
        facts = host_facts()
        line.send(
            Told(
                hold=self._hold,
                shard=self._shard,
                boot_id=facts.boot_id,
                network=facts.network,
                pid=os.getpid(),
                sealed=self._sealed,
                cgroup=self._cgroup,
            )
        )
        while not self._ended:
            found = line.receive()
            if found is None:
                return
            self._obey(line, *found)

    def _obey(self, line: HoldLine, message: HoldMessage, descriptors: list[int]) -> None:
        match message:
            case Put():
                self._sockets += received(message, descriptors)
            case Watch():
                self._watch()
            case Kept():
                for packed in message.segments:
                    segment = codec.unpack(Segment, packed)
                    if self._store.wanted(segment):
                        self._store.add(segment)
            case Seal():
                self._sealed = True
                self._deadline = time.monotonic() + message.timeout if message.timeout else None
                _log.info("holding %d sockets", len(self._sockets))
                line.send(Done())
            case Take():
                line.put(self._sockets)
                line.send(Done())
            case Captured():
                self._look()
                line.keep(self._store.packed())
                line.send(Done())
            case End():
                self._end(resetting=message.reset)
                line.send(Done())
            case _:
                raise HolderFailed(f"{type(message).__name__} was not expected", object="tool")

    def _watch(self) -> None:
        connections = {ConnId.parse(one.file.conn_id) for one in self._sockets if one.file.conn_id}
        if not connections or self._capture is not None:
            return
        self._store.connections = connections
        self._capture = Capture(ports={connection.local_port for connection in connections})
        self._capture.start()

    def _end(self, *, resetting: bool) -> None:
        self._ended = True
        sockets, self._sockets = self._sockets, []
        if resetting:
            reset(sockets)
        for one in sockets:
            one.sock.close()
        _log.info("gave up %d sockets, %s", len(sockets), "with a reset" if resetting else "silently")

    def _time_out(self) -> None:
        """The end that was agreed: peers are told, so that none waits for ever."""
        _log.warning("the time of hold %s is up: its connections are reset", self._hold)
        self._end(resetting=True)
        if self._shard == 0:
            # whoever is at it just now (a restore that has not asked us yet) goes on without us
            with contextlib.suppress(TcpmigError), holdstore.locked(self._hold):
                record = holdstore.find(self._hold)
                if record is not None:
                    dismantle(record)


def main(arguments: Sequence[str]) -> int:
    """The whole life."""
    hold, shard, descriptor = arguments[0], int(arguments[1]), int(arguments[2])
    outlive.keep_log("hold", f"hold {hold}, shard {shard}")
    cgroup = outlive.prepare("hold", hold)
    listener = socket.socket(fileno=descriptor)
    os.set_inheritable(descriptor, False)
    try:
        Shard(hold, shard, listener, cgroup).serve()
    finally:
        outlive.go_home(cgroup)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
