"""What a client may ask for: rates and numbers, and what a record may build.

Nobody gets through the chaperone what the kernel would refuse to a socket of his own: privileged ports and addresses of
others, options that take a capability, buffers beyond the host's limits.  And what a fresh connection has to learn from
the network (congestion window, timeouts) is not taken from a record beyond what harms nobody (paper, 5.6;
:func:`tcpstate.softstate.clamp`).  Root may
all: it might do the same without us.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Final

from tcpstate.chaperone.messages import Limits
from tcpstate.errors import ForbiddenEndpoint, ForbiddenState
from tcpstate.record import ConnectionRecord
from tcpstate.slotted import dataclass
from tcpstate.softstate import clamp

__all__ = ["PRIVILEGED_OPTIONS", "ROOT", "Host", "Network", "Policy", "RateLimit", "checked_record"]

ROOT: Final = 0

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: options that take a capability (net/core/sock.c sk_setsockopt, net/ipv4/ip_sockglue.c, net/ipv6/ipv6_sockglue.c)
PRIVILEGED_OPTIONS: Final = frozenset(
    {
        "so.debug",
        "so.mark",
        "so.rcvmark",
        "so.busy_poll",
        "so.busy_poll_budget",
        "so.prefer_busy_poll",
        "so.txtime",
        "ip.options",
        "ip.transparent",
        "ipv6.transparent",
        "ipv6.hopopts",
        "ipv6.rthdrdstopts",
        "ipv6.rthdr",
        "ipv6.dstopts",
    }
)
#: TC_PRIO_INTERACTIVE: higher ones take CAP_NET_ADMIN
_PRIORITY_MAX: Final = 6
#: the largest window that 16 bits tell, before it is scaled
_WINDOW_MAX: Final = 0xFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the operator has decided.

    limits        of every user
    clients       connections to the chaperone: of one user, and of all
    seconds       a frame that has begun must be whole, and an answer taken, by then
    idle          a client that has frozen nothing and says nothing is let go after this, seconds
    keep_frozen   what a client froze stays frozen when it vanishes (until it expires); False: it flows again
    addresses     records of these are built although the address is not here (yet)
    low_ports     privileged ports on which anyone may rebuild
    sign          makes of a record and its owner's uid what leaves the host; None: the record as it is
    verify        the reverse: record and uid, :func:`tcpstate.signing.verify`'s errors; None: no signature is
                  asked for
    """

    limits: Limits = field(default_factory=Limits)
    clients: int = 16
    clients_of_all: int = 128
    seconds: float = 10.0
    idle: float = 300.0
    keep_frozen: bool = False
    addresses: tuple[Network, ...] = ()
    low_ports: frozenset[int] = frozenset()
    sign: Callable[[bytes, int], bytes] | None = None
    verify: Callable[[bytes], tuple[bytes, int]] | None = None

    def expects(self, address: str) -> bool:
        """Whether records of this address are built although it is not here."""
        bare = ipaddress.ip_address(address.partition("%")[0])
        return any(bare in network for network in self.addresses)


class RateLimit:
    """Requests of each user: ``burst`` at once, ``rate`` per second on average."""

    #: users that are remembered; the ones that have been silent longest are forgotten, and begin with a full burst
    USERS = 4096

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._left: dict[int, tuple[float, float]] = {}

    def take(self, uid: int, now: float) -> bool:
        """Whether the user may ask now; then it counts."""
        left, then = self._left.pop(uid, (float(self._limits.burst), now))
        left = min(float(self._limits.burst), left + (now - then) * self._limits.rate)
        allowed = left >= 1
        self._left[uid] = (left - allowed, now)
        if len(self._left) > self.USERS:
            del self._left[next(iter(self._left))]
        return allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Limits of this host that hold for who has no capability.

    first_port   the first that anyone may bind
    send, receive  the largest buffers, bytes, as SO_SNDBUF and SO_RCVBUF report them
    congestion   the algorithms that anyone may choose
    default      the one that a fresh socket has
    """

    first_port: int
    send: int
    receive: int
    congestion: frozenset[str]
    default: str

    @classmethod
    def read(cls, root: Path = Path("/proc/sys/net")) -> Host:
        """Of the calling thread's network namespace. OSError."""
        values: Mapping[str, list[str]] = {
            name: (root / name).read_text(encoding="ascii").split()
            for name in (
                "ipv4/ip_unprivileged_port_start",
                "ipv4/tcp_wmem",
                "ipv4/tcp_rmem",
                "core/wmem_max",
                "core/rmem_max",
                "ipv4/tcp_allowed_congestion_control",
                "ipv4/tcp_congestion_control",
            )
        }
        return cls(
            first_port=int(values["ipv4/ip_unprivileged_port_start"][0]),
            # the kernel tunes up to tcp_?mem by itself; what is asked for is doubled
            send=max(int(values["ipv4/tcp_wmem"][2]), 2 * int(values["core/wmem_max"][0])),
            receive=max(int(values["ipv4/tcp_rmem"][2]), 2 * int(values["core/rmem_max"][0])),
            congestion=frozenset(values["ipv4/tcp_allowed_congestion_control"]),
            default=values["ipv4/tcp_congestion_control"][0],
        )


def checked_record(record: ConnectionRecord, uid: int, policy: Policy, host: Host, *, local: bool) -> ConnectionRecord:
    """The record as it may be built for this user: as it is for root, else with harmless soft state.

    local: its own address is configured here.
    ForbiddenEndpoint, ForbiddenState.
    """
    conn = record.conn_id
    name = str(conn)
    if not local and not policy.expects(conn.local):
        raise ForbiddenEndpoint("its own address is not configured on this host", object=name)
    if uid == ROOT:
        return record
    if conn.local_port < host.first_port and conn.local_port not in policy.low_ports:
        raise ForbiddenEndpoint(f"port {conn.local_port} is privileged", object=name)
    for keyword in sorted((record.options.keys() | record.option_data.keys()) & PRIVILEGED_OPTIONS):
        raise ForbiddenState(f"setting {keyword} takes a capability", object=name)
    for priority in record.options.get("so.priority", ()):
        if not 0 <= priority <= _PRIORITY_MAX:
            raise ForbiddenState(f"a priority of {priority} takes a capability", object=name)
    if record.buffers.send > host.send or record.buffers.receive > host.receive:
        raise ForbiddenState(
            f"its buffers ({record.buffers.send}, {record.buffers.receive} bytes) are beyond this host's limits "
            f"({host.send}, {host.receive})",
            object=name,
        )
    agreed, windows = record.negotiated, record.windows
    most_sent = _WINDOW_MAX << (agreed.snd_wscale or 0)
    most_received = _WINDOW_MAX << (agreed.rcv_wscale or 0)
    if max(windows.snd_wnd, windows.max_window) > most_sent or windows.rcv_wnd > most_received + 1:
        raise ForbiddenState("its windows are larger than their scales allow", object=name)
    congestion = record.congestion if record.congestion in host.congestion else host.default
    soft = None if record.soft is None else clamp(record.soft, mss=agreed.mss)
    return dataclasses.replace(record, congestion=congestion, soft=soft)
