"""Process trees on their way in: :class:`checkpoint.restore.Restore` as the target's driver wants it."""

from __future__ import annotations

import itertools
import logging
import os
import re
import socket
from collections.abc import Callable, Sequence

from checkpoint import hostcheck
from checkpoint.errors import FileMissing, InterfaceMissing, LazyImpossible, PairWithoutAddress, PidTaken
from checkpoint.files.verdicts import judge_here
from checkpoint.image.format import FrameReader
from checkpoint.image.frames import Kind
from checkpoint.memory.lazy import available
from checkpoint.namespaces.network import NewNetwork
from checkpoint.namespaces.ways import Ways
from checkpoint.records import Ended
from checkpoint.restore import Restore
from checkpoint.traces import NoteWriter
from checkpoint.verdict import Verdict, refusals
from migrate.bringer import Bringer
from migrate.clock import monotonic_ns
from migrate.errors import ProtocolError
from migrate.fileoptions import FileOptions, devices_told
from migrate.hostfacts import LAZY
from migrate.kept import KeptFrames
from migrate.messages import Comparison, Difference, Lost, Needs
from migrate.parts import Arrived
from migrate.warm import arriving
from tcpstate import codec, softstate
from tcpstate.capture import Capture
from tcpstate.connid import ConnId
from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.bpf.gate import Gate
from tcpstate.kernel.route import is_local
from tcpstate.kernel.sockets import is_v6
from tcpstate.locate import look_up
from tcpstate.segment import Segment

__all__ = ["IncomingTrees"]

_log = logging.getLogger(__name__)

#: pairs of addresses, of each family, that are tried before the stop
_PAIRS = 8


class IncomingTrees:
    """See :class:`migrate.parts.Incoming` for the order of calls."""

    def __init__(self) -> None:
        self._restore = Restore(check=False)
        self._reader = FrameReader(stream=True)
        self._capture: Capture | None = None
        self._replayed = False
        #: the connections that replayed SYNs began, and these SYNs' sequence numbers
        self._begun: set[tuple[ConnId, int]] = set()
        self._connected = False
        self._pairs: list[tuple[str, str]] = []
        #: where something may come for them; None: at any address
        self._used: tuple[str, ...] | None = None
        self._kept: KeptFrames | None = None
        self._bringer: Bringer | None = None
        self._network: NewNetwork | None = None
        self._ended: Gate | None = None
        self._ready = False
        self.stands = self.stopped = False

    # -- the image ------------------------------------------------------------------------------------------------

    def buffer(self) -> memoryview:
        """Where the next bytes of the image go."""
        return self._reader.buffer()

    def received(self, count: int) -> object:
        """They have come: build what can be built."""
        for frame in self._reader.received(count):
            if self._kept is not None:
                self._kept.keep(frame)
            if frame.kind == Kind.ENDED:
                self._ignore(frame.decode(Ended).connections)
            self.stands |= frame.kind == Kind.LIVE
            self.stopped |= frame.kind == Kind.TREE
            self._restore.apply(frame)
        return None

    def _ignore(self, ended: Sequence[ConnId]) -> None:
        """What comes for these is not answered, while this program runs: their last ACKs are under way."""
        _log.info("%d connections had just been closed: what comes for them is dropped", len(ended))
        try:
            self._ended = Gate(ended)
        except KernelFeatureMissing as error:
            _log.info("their last ACKs will be answered with resets: %s", error.message)
        else:
            self._ended.shut()

    # -- the steps ------------------------------------------------------------------------------------------------

    def expect(self) -> None:
        """What every migration needs is got ready."""
        arriving()
        self._ready = True

    def check(self, needs: Needs, options: dict[str, str]) -> list[Verdict]:
        """A verdict on this host, and on every PID and path."""
        found = self._expect_pages(options)
        if not self._ready:
            self.expect()
        self._connected = needs.connections > 0
        self._pairs = _pairs(needs)
        self._used = None if needs.anywhere else needs.used_addresses
        found += refusals(hostcheck.check())
        for tree in needs.trees:
            taken = None if tree.inner else hostcheck.first_user(tree.tids)
            found.append(
                Verdict(subject=f"pid {tree.root}", kind="process", text=f"{len(tree.tids)} numbers are free")
                if taken is None
                else Verdict.refuse(
                    PidTaken(f"the number is in use by {taken[1]}", object=f"pid {taken[0]}"), "process"
                )
            )
        told = FileOptions.told(options)
        if needs.network is not None:
            found += self._enter_network(NewNetwork(needs.network, told.bridges))
        devices = devices_told(options)
        self._restore.place(told.path, overwrite=told.overwrite, devices=devices)
        found += judge_here(
            needs.files,
            path=Ways(told.path, needs.mounts),
            beacons=needs.beacons,
            ship=told.ship,
            overwrite=told.overwrite,
            devices=devices,
        )
        found += [_judge_directory(told.path(path)) for path in needs.directories]
        found += [_judge_device(name, devices.get(name, name)) for name in needs.devices]
        moving = {record.address for record in needs.addresses}
        return found + [_judge_pair(address) for address in needs.paired if address not in moving]

    def _expect_pages(self, options: dict[str, str]) -> list[Verdict]:
        """Pages may come after the processes have begun to run: who brings them is made before anything is opened."""
        lazy = options.get(LAZY)
        if lazy is None:
            return []
        lacking = available()
        if lacking:
            return [Verdict.refuse(LazyImpossible(f"the target's kernel lacks {lacking}"), "memory")]
        if not re.fullmatch(r"[0-9a-f]{32}", lazy):
            raise ProtocolError("the migration has another kind of name")
        self._bringer = Bringer(lazy, "the host where they were", line=True)
        self._restore.bring(self._bringer)
        return []

    def _enter_network(self, network: NewNetwork) -> list[Verdict]:
        """A network namespace like the tree's, in which we are from now on: addresses, sockets and processes of it are
        made there."""
        missing = [Verdict.refuse(error, "network namespace") for error in network.check()]
        if not missing:
            network.enter()
            self._network = network
        return missing

    def prepare(self, note: NoteWriter) -> None:
        """What can be done before the stop."""
        self._restore.note = note
        if self._connected:
            self._restore.make_ready()
            softstate.foresee(self._pairs)
        self._kept = KeptFrames.noted(note)

    def rebuild(self, elapsed: Callable[[], float]) -> Comparison:
        """Everything stands in repair."""
        self._reader.close()
        ports = self._restore.ports
        if ports:
            # before the address comes: what arrives between its coming and the release is kept
            self._capture = Capture(ports=ports, addresses=self._used)
            self._capture.start()
        differences = tuple(
            Difference(connection=connection, item=d.what, sent=str(d.expected), found=str(d.found))
            for connection, d in self._restore.prepare(elapsed=elapsed())
        )
        count = len(self._restore.connections) + self._restore.built_ahead
        return Comparison(connections=count, differences=differences)

    def keep(self) -> None:
        """The processes outlive this program."""
        if self._bringer is not None:
            self._bringer.seal()
        if self._network is not None:
            # the original is silent, and has no addresses any more
            self._network.connect()
        self._restore.survive()

    def release(self) -> None:
        """Connections send and answer."""
        self._restore.release()
        if self._network is not None:
            self._network.settle()

    def replay(self, segments: Sequence[bytes]) -> None:
        """What the source captured and, the first time, what was captured here before the release.

        Not later: what arrives after the release is answered.  Nor may anything come that the host would answer with a
        reset: a second copy of a SYN, when the first one's connection has come and gone; segments of a connection that
        has ended meanwhile.
        """
        arrived = [codec.unpack(Segment, segment) for segment in segments]
        first, self._replayed = not self._replayed, True
        if first and self._capture is not None:
            arrived += self._capture.segments()
            self._capture.stop()
        if first:
            self._restore.connect(arrived)
        else:
            # the processes run, and a peer whose segment came here the long way has perhaps sent it again itself
            arrived = [one for one in arrived if one.begins or look_up(one.conn_id) is not None]
        self._restore.replay([one for one in arrived if not self._is_again(one)])
        if first:
            # The addresses are announced by now.  Earlier, a peer that had waited for room would send all it has to
            # where they were.
            self._restore.tell_windows()

    def _is_again(self, segment: Segment) -> bool:
        """Whether it is a SYN that was replayed already: both hosts may see one frame, or one host twice."""
        if not segment.begins:
            return False
        beginning = (segment.conn_id, segment.seq)
        again = beginning in self._begun
        self._begun.add(beginning)
        return again

    def run(self) -> Arrived:
        """Let them go."""
        lost = tuple(Lost(connection=connection, reason=reason) for connection, reason in self._restore.lost)
        pids = self._restore.run()
        return Arrived(pids=pids, released_ns=monotonic_ns(), lost=lost)

    def forget(self) -> None:
        """That they run is journalled."""
        if self._kept is not None:
            self._kept.remove()

    def discard(self) -> None:
        """Nothing is left."""
        self._restore.abort()
        if self._kept is not None:
            self._kept.remove()

    def hold(self) -> None:
        """Everything stays as it is."""
        _log.warning("processes are held as they are: %s", " ".join(map(str, self._restore.stubs)) or "none")

    def close(self) -> None:
        """Captures, threads, descriptors."""
        if self._capture is not None:
            self._capture.close()
        self._restore.close()
        if self._ended is not None:
            self._ended.close()
        if self._bringer is not None:
            self._bringer.close()
        if self._kept is not None:
            self._kept.close()
        if self._network is not None:
            self._network.close()


def _pairs(needs: Needs) -> list[tuple[str, str]]:
    """Pairs of a local address and a peer's of one family; most connections are between such."""
    found: list[tuple[str, str]] = []
    for v6 in (False, True):
        ends = itertools.product(needs.used_addresses, needs.peers)
        found += itertools.islice(((a, b) for a, b in ends if is_v6(a) is is_v6(b) is v6), _PAIRS)
    return found


def _judge_pair(address: str) -> Verdict:
    """On an address that does not move, and is no loopback address, connections between processes of the tree."""
    if not is_local(address):
        error = PairWithoutAddress("both ends of a connection use it; it neither moves nor is here", object=address)
        return Verdict.refuse(error, "address")
    return Verdict(subject=address, kind="address", text="is here as well: connections with both ends on it go on")


def _judge_device(there: str, here: str) -> Verdict:
    """On an interface that connections are bound to: its name at the source, and the one that it would have here."""
    try:
        socket.if_nametoindex(here)
    except OSError:
        error = InterfaceMissing(f"connections are bound to interface {here}, which is not here", object=there)
        return Verdict.refuse(error, "interface")
    return Verdict(subject=there, kind="interface", text=f"connections are bound to {here}")


def _judge_directory(path: str) -> Verdict:
    if not os.path.isdir(path):
        return Verdict.refuse(FileMissing("a directory of the processes is not here", object=path), "directory")
    return Verdict(subject=path, kind="directory")
