"""A checkpoint's hold, from the tool's side: made, taken back, released.

::

    hold = NewHold(ID, ..)         before the stop
    hold.begin(note, count)        drop rule (empty), holders, record: all that can fail, fails here
    ..                             the trees stop; connections frozen; the image is written and complete
    hold.take(sockets, segments)   duplicates go to the holders; what arrives is dropped by the rule
    hold.seal()                    from now on the hold outlives us: the processes may end
    hold.undo()                    instead: nothing is left of it; the processes have their sockets
    hold.close()                   in every case

    held = TakenHold.open(ID)      restore, on the same host
    held.sockets(files)            by their number in FILES: those that a holder has still
    held.lift()                    all connections stand, the taken and the rebuilt: this host answers again
    held.finish()                  they live: the holders end, and nothing is left

Until ``finish`` the holders keep their duplicates: a restore that fails leaves the hold as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from checkpoint import procfs
from checkpoint.files.held import HeldSocket
from checkpoint.files.listener import Listener
from checkpoint.files.table import TreeFiles
from checkpoint.files.tcpfile import TcpFile
from migrate import holdstore
from migrate.addresses import AddressRecord
from migrate.errors import HoldChanged, HolderFailed, HoldUnavailable
from migrate.holdend import dismantle, lift
from migrate.holdline import Captured, Done, End, HoldLine, Kept, Put, Seal, Take, Told, Watch, bind, connect, received
from migrate.holdstore import Holder, HoldRecord
from migrate.hostfacts import host_facts
from tcpstate import codec
from tcpstate.connid import ConnId
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import TCP, TcpState
from tcpstate.rows import describe
from tcpstate.segment import Segment
from tcpstate.silence import Blackhole
from tcpstate.slotted import dataclass
from tcpstate.uses.hold import DropRule

__all__ = ["DEFAULT_TIMEOUT", "NOTE", "HoldMade", "NewHold", "TakenHold", "release"]

_log = logging.getLogger(__name__)

#: seconds: longer than a stack tries to send to a silent peer (RFC 1122 4.2.3.5, Linux: 15 minutes)
DEFAULT_TIMEOUT = 3600.0
#: descriptors that a holder needs for itself
_OWN_DESCRIPTORS = 64
#: seconds by which the drop rule outlasts a holder that should have ended it
_GRACE = 30.0

NoteWriter = Callable[[str, bytes], None]
#: the name of the journal's note that has the HoldRecord
NOTE = "hold"


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldMade:
    """The record HOLD of an image: which hold has the connections, and of which host.

    boot_id, network  a hold is of one boot and one network namespace
    """

    hold: str
    boot_id: str
    network: int

    @property
    def here(self) -> bool:
        """Whether this is the host, and the boot."""
        facts = host_facts()
        return (self.boot_id, self.network) == (facts.boot_id, facts.network)


class NewHold:
    """The hold of one checkpoint. See the module's docstring for the order of calls.

    timeout   seconds until it ends by itself; 0: never
    capacity  sockets of one holder; None: as many as the limit of descriptors lets it have
    """

    def __init__(
        self,
        hold: str,
        *,
        image: str,
        roots: Sequence[int],
        addresses: Sequence[AddressRecord],
        timeout: float = DEFAULT_TIMEOUT,
        capacity: int | None = None,
    ) -> None:
        facts = host_facts()
        self._record = HoldRecord(
            hold=hold,
            boot_id=facts.boot_id,
            network=facts.network,
            pids=facts.pids,
            since=time.time(),
            timeout=timeout,
            image=os.path.abspath(image),
            roots=tuple(roots),
            addresses=tuple(addresses),
        )
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._capacity = capacity or (hard - _OWN_DESCRIPTORS if hard > _OWN_DESCRIPTORS else 1 << 16)
        self._rule = DropRule(hold)
        self._blackhole = Blackhole()
        self._lines: list[HoldLine] = []
        self._ends = contextlib.ExitStack()
        self._begun = False

    @property
    def made(self) -> HoldMade:
        """For the image."""
        return HoldMade(hold=self._record.hold, boot_id=self._record.boot_id, network=self._record.network)

    @property
    def hold(self) -> str:
        """The ID."""
        return self._record.hold

    def begin(self, note: NoteWriter, count: int) -> None:
        """Set up what ``count`` sockets need. HoldUnavailable, HolderFailed: nothing is left then.

        note  the journal's: told before anything is changed
        """
        note(NOTE, codec.pack(self._record))
        self._begun = True
        try:
            self._ends.enter_context(holdstore.locked(self.hold))
            holdstore.write(self._record)
            self._rule.stand()
            self._blackhole.ensure(self._note_rules)
            for _ in range(-(-count // self._capacity)):
                self._start_holder()
        except BaseException as error:
            try:
                self.undo()
            except OSError as left:
                _log.warning("while undoing: %s", left)
            if isinstance(error, OSError):
                raise HoldUnavailable(f"the rules of a hold were refused: {error.strerror}") from error
            raise

    def _note_rules(self, rules: dict[int, int]) -> None:
        self._write(rules=rules)

    def _write(self, **changes: object) -> None:
        self._record = dataclasses.replace(self._record, **changes)  # type: ignore[arg-type]
        holdstore.write(self._record)

    def _start_holder(self) -> None:
        shard = len(self._lines)
        path = holdstore.socket_path(self.hold, shard)
        with bind(path) as listener:
            try:
                child = subprocess.Popen(
                    [sys.executable, "-m", "migrate.holder", self.hold, str(shard), str(listener.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[listener.fileno()],
                    cwd="/",
                    env=_environment(),
                    start_new_session=True,
                )
            except OSError as error:
                raise HolderFailed(f"it cannot be started: {error.strerror}", object=sys.executable) from error
            # it is to outlive us: nobody waits for it
            child.returncode = 0
            line = connect(path)
        self._lines.append(line)
        self._ends.callback(line.close)
        told = line.expect(Told)
        holder = Holder(pid=told.pid, start_time=procfs.read_stat(told.pid).start_time)
        groups = {*self._record.cgroups, *filter(None, [told.cgroup])}
        self._write(holders=(*self._record.holders, holder), cgroups=tuple(sorted(groups)))

    def take(self, sockets: Sequence[HeldSocket], segments: Sequence[Segment]) -> None:
        """Give the holders frozen connections and listeners, and what was captured for them. HolderFailed, OSError.

        The sockets stay ours as well; from now on the rule drops what arrives for them.
        """
        while len(sockets) > self._capacity * len(self._lines):
            self._start_holder()
        connections = [ConnId.parse(one.file.conn_id) for one in sockets if one.file.conn_id]
        listeners = [one.file.listener for one in sockets if one.file.listener is not None]
        packed = [codec.pack(segment) for segment in segments]
        for number, line in enumerate(self._lines):
            line.put(sockets[number * self._capacity : (number + 1) * self._capacity])
            line.send(Watch())
            line.keep(packed)
        timeout = self._record.timeout
        self._rule.add(connections, listeners, timeout=timeout + _GRACE if timeout else 0)
        self._write(connections=len(connections), listeners=tuple(f"{x.address} {x.port}" for x in listeners))

    def seal(self) -> None:
        """The hold stands. HolderFailed: undo it."""
        for line in self._lines:
            line.send(Seal(timeout=self._record.timeout))
        for line in self._lines:
            line.expect(Done)
        self._write(complete=True)

    def undo(self) -> None:
        """Nothing is left; the processes have their sockets. Before they run on, or are told what was captured.

        OSError. Nothing if it has not begun.
        """
        if not self._begun:
            return
        self._begun = False
        for line in self._lines:
            with contextlib.suppress(HolderFailed):
                line.send(End(reset=False))
                line.expect(Done)
        self._record = dataclasses.replace(self._record, rules=self._blackhole.priorities)
        dismantle(self._record)
        self.close()

    def close(self) -> None:
        """Close the lines, give up the lock."""
        self._ends.close()


def _environment() -> dict[str, str]:
    """What a holder needs: to find this program and its directories."""
    root = str(Path(__file__).resolve().parent.parent)
    kept = {name: os.environ[name] for name in ("TCPMIG_RUNTIME_DIR", "TCPMIG_STATE_DIR") if name in os.environ}
    given = os.environ.get("PYTHONPATH", "")
    return {**kept, "PYTHONPATH": f"{root}:{given}" if given else root, "LANG": "C.UTF-8"}


class TakenHold:
    """A hold that is being taken back, or given up for a restore elsewhere. A context manager; HoldBusy."""

    def __init__(self, record: HoldRecord) -> None:
        self.record = record
        self._lines: list[HoldLine] = []
        self._sockets: list[HeldSocket] = []
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> TakenHold:
        self._ends.enter_context(holdstore.locked(self.record.hold))
        for shard, holder in enumerate(self.record.holders):
            line = _reach(self.record, shard)
            if line is None:
                _log.warning("holder %d of hold %s has died: pid %d", shard, self.record.hold, holder.pid)
            else:
                self._ends.callback(line.close)
                self._lines.append(line)
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._sockets:
            one.sock.close()
        self._ends.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """The holders'."""
        return tuple(holder.pid for holder in self.record.holders)

    def noted(self, note: NoteWriter) -> None:
        """Write down what is being taken back."""
        note(NOTE, codec.pack(self.record))

    def sockets(self, files: TreeFiles) -> Mapping[int, HeldSocket]:
        """Duplicates of what is held, by number in ``files``. HoldChanged if one is not what its file says."""
        for line in self._lines:
            try:
                line.send(Take())
                for message, descriptors in line.answers():
                    if not isinstance(message, Put):
                        raise HolderFailed(f"{type(message).__name__} was not expected")
                    self._sockets += received(message, descriptors)
            except HolderFailed as error:
                # it died just now: what it had is rebuilt
                _log.warning("%s", error)
        return {one.file.index: one for one in self._sockets if _is_whole(one, files)}

    def captured(self) -> list[Segment]:
        """What has arrived for the held connections."""
        found: list[Segment] = []
        for line in self._lines:
            try:
                line.send(Captured())
                for message, _ in line.answers():
                    if isinstance(message, Kept):
                        found += [codec.unpack(Segment, packed) for packed in message.segments]
            except HolderFailed as error:
                _log.warning("%s", error)
        return found

    def lift(self) -> None:
        """This host answers again. OSError."""
        lift(self.record)

    def finish(self, *, reset: bool = False) -> None:
        """The holders end, and nothing is left of the hold. OSError.

        reset  peers are told: only where nobody else has the sockets
        """
        for line in self._lines:
            with contextlib.suppress(HolderFailed):
                line.send(End(reset=reset))
                line.expect(Done)
        dismantle(self.record)


def _reach(record: HoldRecord, shard: int) -> HoldLine | None:
    """The line to a holder, or None if it has died. HolderFailed if somebody else answers in its place."""
    try:
        line = connect(holdstore.socket_path(record.hold, shard))
    except OSError:
        return None
    try:
        told = line.expect(Told)
    except HolderFailed:
        line.close()
        return None
    if (told.hold, told.shard, told.boot_id, told.network) != (record.hold, shard, record.boot_id, record.network):
        line.close()
        raise HolderFailed("it is the holder of something else", object=f"hold {told.hold}")
    return line


def _is_whole(one: HeldSocket, files: TreeFiles) -> bool:
    """Whether a held socket can take its file's place; False if it ended meanwhile. HoldChanged."""
    file = one.file
    record = files.files[file.index] if file.index < len(files.files) else None
    if file.listener is not None:
        if not isinstance(record, Listener) or record.name.port != file.listener.port:
            raise HoldChanged("a held listener is not what the image says", object=f"file {file.index}")
        return bool(one.sock.getsockopt(Level.SOCKET, SO.ACCEPTCONN))
    if not isinstance(record, TcpFile) or record.conn_id != file.conn_id:
        raise HoldChanged("a held connection is not what the image says", object=file.conn_id)
    if one.sock.getsockopt(Level.TCP, TCP.INFO, 1)[0] == TcpState.CLOSE:
        _log.warning("%s ended while it was held, and is rebuilt from the image", file.conn_id)
        return False
    if describe(one.sock) != file.conn_id:
        raise HoldChanged("a held socket has another connection", object=file.conn_id)
    return True


def release(record: HoldRecord, *, reset: bool) -> None:
    """End a hold: its connections end, and this host answers again. Of another boot or namespace only what is left in
    the runtime directory is removed. HoldBusy, OSError.

    reset  peers are told at once; else each finds out when it next sends something
    """
    if not record.here:
        with holdstore.locked(record.hold):
            dismantle(record)
        return
    with TakenHold(record) as held:
        held.finish(reset=reset)
