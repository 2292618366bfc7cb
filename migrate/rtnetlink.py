"""rtnetlink of one network namespace: raw messages, and pyroute2 for what few hosts need: docs/design/netlink.md."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tcpstate.kernel import netlink
from tcpstate.kernel.route import iproute

if TYPE_CHECKING:
    from pyroute2.iproute.linux import IPRoute

__all__ = ["Netlink"]


class Netlink(netlink.Netlink):
    """The raw messages, and beside them pyroute2: both in the network namespace where this was made.

    netns    inode number of the namespace
    """

    def __init__(self) -> None:
        self.netns = _here()
        self._stack = ExitStack()
        self._iproute: IPRoute | None = None
        super().__init__()

    @property
    def iproute(self) -> IPRoute:
        """pyroute2's own, made when it is first asked for: its import takes 0.1 s, and most commands do without.  Its
        errors are no OSErrors: :func:`tcpstate.kernel.route.refusals`. RuntimeError if the calling thread is in another
        network namespace by then."""
        if self._iproute is None:
            if _here() != self.netns:
                raise RuntimeError("first used in another network namespace than it was made in")
            self._iproute = self._stack.enter_context(iproute())
        return self._iproute

    def close(self) -> None:
        """Close both sockets."""
        super().close()
        self._stack.close()


def _here() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino
