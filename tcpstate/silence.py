"""Silence of frozen sockets: packets that carry their mark go nowhere.

One routing rule per network namespace and family does it for all sockets.  It does not cover connections over loopback:
the rule of the local table comes before it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import random
import socket
from collections.abc import Callable, Collection, Iterator, Mapping

from tcpstate.connid import ConnId
from tcpstate.kernel import route
from tcpstate.kernel.netlink import Netlink

__all__ = ["MARK", "PASSING_MARK", "Blackhole", "blackhole", "muted"]

#: SO_MARK of frozen sockets ("tcmi")
MARK = 0x74636D69
#: SO_MARK of a socket that shall not be muted with its tuple
PASSING_MARK = 0x74636D6A
#: before the rules that a host usually has, after that of the local table
_RULE_PRIORITIES = range(5, 105)
#: of rules that are written down before they are added
_NOTED_PRIORITIES = range(105, 4105)


class Blackhole:
    """The rules of one user, one per family: packets with :data:`MARK` go nowhere.

    Every user adds rules of its own (same selector, another priority), so that several at a time do not disturb each
    other; :meth:`remove` takes away only one's own.

    priorities  of rules that stand already, by family: found in a journal, or kept beside frozen connections
    """

    def __init__(self, priorities: Mapping[int, int] | None = None) -> None:
        self.priorities: dict[int, int] = dict(priorities or {})

    def ensure(self, note: Callable[[dict[int, int]], None] | None = None) -> None:
        """Add the rules in the calling thread's network namespace. OSError.

        note  told, before each rule is added, what :attr:`priorities` will be then: what a journal must know
        """
        try:
            with Netlink() as channel:
                for family in (socket.AF_INET, socket.AF_INET6):
                    if family not in self.priorities:
                        self._add(channel, family, note)
        except BaseException:
            self.remove()
            raise

    def _add(self, channel: Netlink, family: int, note: Callable[[dict[int, int]], None] | None) -> None:
        try:
            # At random if it is written down: should we die before the rule is there, hardly anybody takes the same.
            chosen, first = _RULE_PRIORITIES, 0
            if note is not None:
                chosen, first = _NOTED_PRIORITIES, random.randrange(len(_NOTED_PRIORITIES))
            for priority in itertools.chain(chosen[first:], chosen[:first]):
                if note is not None:
                    note({**self.priorities, family: priority})
                if route.add_blackhole_rule(channel, family, MARK, priority):
                    self.priorities[family] = priority
                    return
        except OSError as error:
            # no IPv6 in this kernel: nothing to keep silent
            if family == socket.AF_INET6 and error.errno in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
                return
            raise
        raise OSError(errno.EUSERS, "all priorities for blackhole rules are taken")

    def remove(self) -> None:
        """Remove them; none must be frozen any more. Rules that are gone already are no error."""
        if not self.priorities:
            return
        with Netlink() as channel:
            while self.priorities:
                family, priority = self.priorities.popitem()
                route.remove_blackhole_rule(channel, family, MARK, priority)


@contextlib.contextmanager
def blackhole() -> Iterator[Blackhole]:
    """The rules that make frozen sockets silent, as long as the block lasts. Also for the network namespace where
    sockets are rebuilt: until they are released they carry the mark."""
    rules = Blackhole()
    rules.ensure()
    try:
        yield rules
    finally:
        rules.remove()


@contextlib.contextmanager
def muted(conn_id: ConnId, marks: Collection[int] = (0,)) -> Iterator[None]:
    """In the block nothing leaves this host for the connection's tuple, not even the RST that the kernel answers a
    segment with while no socket has the tuple; but for what carries :data:`PASSING_MARK`.

    marks  that such a RST may carry: none, or the mark of a listener on the port

    OSError.
    """
    family = socket.AF_INET6 if conn_id.v6 else socket.AF_INET
    local, peer = (address.partition("%")[0] for address in (conn_id.local, conn_id.peer))
    flow = (local, conn_id.local_port, peer, conn_id.peer_port)
    added: list[tuple[int, int]] = []
    with Netlink() as channel:
        try:
            for mark in sorted(set(marks) - {PASSING_MARK}):
                for priority in _RULE_PRIORITIES:
                    if route.add_blackhole_rule(channel, family, mark, priority, flow):
                        added.append((mark, priority))
                        break
                else:
                    raise OSError(errno.EUSERS, "all priorities for blackhole rules are taken")
            yield
        finally:
            for mark, priority in added:
                route.remove_blackhole_rule(channel, family, mark, priority, flow)
