"""A hold given up by one host so that another can restore its image: ``tcpmig restore FILE --from HOST``.

::

    restore (the new host)                       tcpmig handover (the host that holds)
    Hello                                   ->
                                            <-   Hello
    AskHold: hold, addresses                ->   is it here? may the addresses leave?  Nothing is changed
                                            <-   HoldTold, or Refused
    everything is rebuilt, silent
    GiveUp                                  ->   journalled: addresses removed; sockets closed without a packet;
                                                 the drop rule lifted
                                            <-   Captured.. GivenUp, or Abort: held as before
    addresses added, sockets released

The commit is GiveUp.  Before it, whatever fails leaves the hold as it was.  After it, a line that breaks leaves the
processes nowhere but in the image, and nobody on their addresses: peers hear nothing and keep trying.  So nothing has
to be settled: the same command, run again, either finds the hold as it was, or hears that it is gone and its addresses
are free (``gone``), and goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Sequence
from typing import TypeVar

from checkpoint import procfs
from checkpoint.errors import NoSuchProcess
from checkpoint.namespaces.spaces import entered_network
from checkpoint.verdict import refusals
from migrate import holdstore
from migrate.addresses import read_configuration
from migrate.driving import failure_of, logged, remote_error, signals_held
from migrate.errors import (
    HandoverFailed,
    HandoverUnknown,
    HoldElsewhere,
    LinkLost,
    LinkSilent,
    ProtocolError,
    SameHost,
    TargetRefused,
    VersionMismatch,
    from_remote,
)
from migrate.hold import NOTE, HoldMade, TakenHold
from migrate.hostfacts import host_facts
from migrate.journal import AddressesLeave, End, Journal, JournalView, Role, Step, StepKind
from migrate.messages import (
    HIGHEST_VERSION,
    LOWEST_VERSION,
    Abort,
    Captured,
    Hello,
    Message,
    Refused,
    captured,
)
from migrate.rtnetlink import Netlink
from migrate.takeover import AddressPolicy, Departure, plan
from migrate.transport import Remote, standard_channel
from migrate.usage import held_by
from migrate.wire import Channel
from tcpstate import codec
from tcpstate.codec import member
from tcpstate.errors import TcpmigError
from tcpstate.segment import Segment
from tcpstate.slotted import dataclass

__all__ = ["DEFAULT_REMOTE_COMMAND", "Origin", "hand_over", "settle"]

_log = logging.getLogger(__name__)

DEFAULT_REMOTE_COMMAND = "tcpmig handover"
#: seconds that a large image may take to be rebuilt; a line that ends is noticed at once
PATIENCE = 3600.0

_M = TypeVar("_M", bound=Message)


@member(Message, "ask_hold")
@dataclass(frozen=True, slots=True, kw_only=True)
class AskHold(Message):
    """The new host: will you give this up?

    addresses  local addresses that are to come along
    shared     also if other processes use them (``--address-policy allow``)
    """

    hold: str
    addresses: tuple[str, ...] = ()
    shared: bool = False


@member(Message, "hold_told")
@dataclass(frozen=True, slots=True, kw_only=True)
class HoldTold(Message):
    """The holding host: yes.

    connections  how many are held
    macs         its link-layer addresses: it still answers for the addresses
    gone         the hold was given up before, and its addresses are not here
    """

    connections: int = 0
    macs: tuple[str, ...] = ()
    gone: bool = False


@member(Message, "give_up")
@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp(Message):
    """The new host: everything is rebuilt."""


@member(Message, "given_up")
@dataclass(frozen=True, slots=True, kw_only=True)
class GivenUp(Message):
    """The holding host: addresses and sockets are gone, the journal says so."""


class Origin:
    """The holding host, as the restore sees it. A context manager that runs the remote shell; RemoteStartFailed.

    shared  take addresses that other processes there use
    """

    def __init__(
        self, host: str, *, rsh: str, remote_command: str = DEFAULT_REMOTE_COMMAND, shared: bool = False
    ) -> None:
        self.host = host
        self._rsh, self._remote_command, self._shared = rsh, remote_command, shared
        self._ends = contextlib.ExitStack()
        self._remote: Remote | None = None

    def __enter__(self) -> Origin:
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    @property
    def _channel(self) -> Channel:
        if self._remote is None:
            raise RuntimeError("ask() comes first")
        return self._remote.channel

    def ask(self, made: HoldMade, addresses: Sequence[str]) -> tuple[str, ...]:
        """Will it give up the hold, and the addresses? Its link-layer addresses. Nothing is changed there.

        SameHost, RemoteStartFailed; the other host's refusals, HoldElsewhere among them.
        """
        if made.here:
            raise SameHost("the connections are held on this host", object=self.host)
        self._remote = remote = self._ends.enter_context(
            Remote(self.host, rsh=self._rsh, remote_command=self._remote_command)
        )
        with contextlib.suppress(LinkLost):
            # the next line tells why
            self._channel.send(_hello("tcpmig restore"))
        _agree(remote.first())
        try:
            self._channel.send(AskHold(hold=made.hold, addresses=tuple(addresses), shared=self._shared))
            told = _expect(self._channel, HoldTold, self.host)
        except (LinkLost, LinkSilent) as error:
            raise remote.explain(error) from None
        if told.gone:
            _log.warning("%s has given up hold %s before: its addresses are free", self.host, made.hold)
        else:
            _log.info("%s holds %d connections", self.host, told.connections)
        return told.macs

    def give_up(self) -> list[Segment]:
        """The commit: addresses and connections are gone there; what was captured for them meanwhile.

        HandoverFailed: they are held as before. HandoverUnknown: the line broke.
        """
        segments: list[Segment] = []
        try:
            self._channel.send(GiveUp())
            while True:
                message = self._channel.receive()
                match message:
                    case Captured():
                        segments += [codec.unpack(Segment, packed) for packed in message.segments]
                    case GivenUp():
                        return segments
                    case Abort():
                        raise remote_error(message.failure, HandoverFailed, where=self.host)
                    case _:
                        raise ProtocolError(f"{type(message).__name__} was not asked for")
        except (LinkLost, LinkSilent) as error:
            raise HandoverUnknown(
                f"no word after the hold was to be given up: {error.message}", object=self.host
            ) from error


def _hello(program: str) -> Hello:
    return Hello(lowest=LOWEST_VERSION, highest=HIGHEST_VERSION, host=host_facts(), program=program)


def _agree(message: object) -> Hello:
    if not isinstance(message, Hello):
        raise ProtocolError("the other side does not begin with Hello")
    if message.lowest > HIGHEST_VERSION or message.highest < LOWEST_VERSION:
        raise VersionMismatch(f"it speaks versions {message.lowest} to {message.highest}, this one {HIGHEST_VERSION}")
    return message


def _expect(channel: Channel, kind: type[_M], where: str) -> _M:
    message = channel.receive()
    if isinstance(message, Refused | Abort):
        raise remote_error(message.failure, TargetRefused, where=where)
    if not isinstance(message, kind):
        raise ProtocolError(f"{type(message).__name__} was not asked for")
    return message


# --- the holding host


def hand_over() -> None:
    """The holding host's half, on standard input and output. Raises what ended it; the other side has been told."""
    with standard_channel(silence=PATIENCE) as channel, contextlib.ExitStack() as ends:
        channel.send(_hello("tcpmig handover"))
        try:
            _agree(channel.receive())
            ask = _expect(channel, AskHold, "restore")
            # a tree's own network namespace is where its connections are held
            ends.enter_context(entered_network(holdstore.network_of(ask.hold)))
            record = holdstore.find(ask.hold)
            if record is None:
                _only_gone(ask)
                channel.send(HoldTold(gone=True))
            else:
                held = ends.enter_context(TakenHold(record))
                netlink = ends.enter_context(Netlink())
                told, departure = _may_leave(netlink, ask, held)
                channel.send(told)
        except TcpmigError as error:
            with contextlib.suppress(LinkLost, LinkSilent):
                channel.send(Refused(migration="", failure=failure_of(error)))
            raise
        try:
            _expect(channel, GiveUp, "restore")
        except LinkLost:
            _log.info("the restore gave up; the hold is as it was")
            return
        if record is None:
            channel.send(GivenUp())
            return
        try:
            with signals_held():
                segments = _give_up(held, departure)
        except Exception as error:  # the other side is told, whatever it was: it must not start anything
            with contextlib.suppress(LinkLost, LinkSilent):
                channel.send(Abort(migration="", failure=failure_of(error)))
            raise
        channel.send(*captured(map(codec.pack, segments), first=True), GivenUp())


def _only_gone(ask: AskHold) -> None:
    """HoldElsewhere, unless the hold was given up before: then none of its addresses is here."""
    with Netlink() as netlink:
        here = read_configuration(netlink)
    left = [address for address in ask.addresses if here.find(address) is not None]
    if left or not ask.addresses:
        what = f"{', '.join(left)} is here, and not held for it" if left else "it is not known here"
        raise HoldElsewhere(what, object=f"hold {ask.hold}")


def _may_leave(netlink: Netlink, ask: AskHold, held: TakenHold) -> tuple[HoldTold, Departure]:
    """May the addresses go? Raises the first reason against it; nothing is changed."""
    here = read_configuration(netlink)
    # one that is gone already (this was tried before, and broken off) is no obstacle
    wanted = [address for address in ask.addresses if here.find(address) is not None]
    policy = AddressPolicy.ALLOW if ask.shared else AddressPolicy.REFUSE
    chosen = plan(netlink, wanted, pids=held.pids, control=_line_addresses(), policy=policy)
    for first in refusals(chosen.verdicts):
        raise from_remote(first.code, first.text, first.subject, first.fix, otherwise=TargetRefused, where="")
    departure = Departure(netlink, [record.address for record in chosen.records])
    return HoldTold(connections=held.record.connections, macs=chosen.macs), departure


def _line_addresses() -> dict[str, str]:
    """The local addresses of the connections by which we were called: those of our ancestors (sshd)."""
    above: set[int] = set()
    pid = os.getppid()
    with contextlib.suppress(NoSuchProcess):
        while pid > 1 and pid not in above:
            above.add(pid)
            pid = procfs.read_stat(pid).ppid
    return {user.address: f"the line to the restoring host ({user})" for user in held_by(above) if user.peer}


def _give_up(held: TakenHold, departure: Departure) -> list[Segment]:
    journal = Journal.open(Role.HANDOVER, secrets.token_hex(16), roots=held.record.roots, image=held.record.image)
    try:
        held.noted(journal.note)
        journal.append(AddressesLeave(departure=departure.record), Step(step=StepKind.COMMIT))
        segments = held.captured()
        departure.remove()
    except BaseException:
        departure.restore()
        journal.finish(End.ABORTED)
        raise
    # the addresses are gone: whatever fails now, there is no way back, and `tcpmig recover` or `release` end it
    try:
        held.finish()
        departure.settle()
        journal.finish(End.MOVED)
    except Exception as error:  # likewise
        _log.error("after the addresses had left: %s", error)
        journal.leave()
    return segments


def settle(view: JournalView) -> None:
    """Finish what a handover that died had begun: from COMMIT on addresses and hold go, before it nothing was changed.

    AddressChangeFailed, HoldBusy, OSError; may be repeated.
    """
    if not view.reached(StepKind.COMMIT):
        return
    leave = view.last(AddressesLeave)
    with Netlink() as netlink:
        if leave is not None:
            here = read_configuration(netlink)
            left = [address for address in leave.departure.moved if here.find(address) is not None]
            departure = Departure(netlink, left)
            departure.remove()
            with logged("putting back what depended on the addresses"):
                departure.settle()
    for packed in view.notes(NOTE):
        record = codec.unpack(holdstore.HoldRecord, packed)
        if holdstore.find(record.hold) is not None:
            with TakenHold(record) as held:
                held.finish()
