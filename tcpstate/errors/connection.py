"""Errors of connections that are frozen, exported, rebuilt and released."""

from __future__ import annotations

from tcpstate.errors.tree import Outcome, TcpmigError

__all__ = [
    "AddressInUse",
    "AddressNotMoved",
    "AddressStillHere",
    "AlreadyFrozen",
    "ConnIdSyntax",
    "ConnectNotRepeated",
    "ConnectionCallFailed",
    "ConnectionLost",
    "FinNotRestored",
    "ForeignFilter",
    "KeysNotRestored",
    "ListenerFilterRefused",
    "NoSuchConnection",
    "NotExported",
    "NotFrozen",
    "NotOneConnection",
    "OwnerNotStill",
    "QueueNotRestored",
    "SoftStateNotRestored",
    "StillMoving",
    "TamperedConnection",
    "TupleImpossible",
    "UnsupportedSocket",
    "UnsupportedState",
    "UrgentData",
]


class ConnIdSyntax(TcpmigError):
    """A conn-ID is written ``tcp:LOCAL:PORT-PEER:PORT``, IPv6 addresses in brackets:
    ``tcp:10.0.0.5:6379-10.0.0.9:51514``, ``tcp:[fd00::5]:6379-[fd00::9]:51514``."""

    code = "TM-0201"
    outcome = Outcome.USAGE
    fix = "Copy a conn-ID from `tcpmig conns`."


class NoSuchConnection(TcpmigError):
    """No socket of this network namespace has this conn-ID, or its owner is hidden from this PID namespace."""

    code = "TM-0202"
    outcome = Outcome.REFUSED
    fix = "List the connections with `tcpmig conns`; run it in the network namespace of the connection."


class ForeignFilter(TcpmigError):
    """The application attached an eBPF program as a filter of this socket (SO_ATTACH_BPF). The kernel does not give
    such a program back: it could neither be restored after a freeze nor rebuilt elsewhere. Nothing was changed."""

    code = "TM-0210"
    outcome = Outcome.REFUSED
    fix = "Let the application detach its eBPF filter, or use a classic one (SO_ATTACH_FILTER)."


class UnsupportedState(TcpmigError):
    """The connection is in a TCP state that cannot be exported and rebuilt. Nothing was changed."""

    code = "TM-0211"
    outcome = Outcome.REFUSED
    fix = "Wait until the connection is established or closed, and try again."


class UnsupportedSocket(TcpmigError):
    """The socket carries state that the kernel does not give out: an upper-layer protocol (kTLS), Multipath TCP, TCP-AO
    keys, or it is not a TCP socket. Nothing was changed."""

    code = "TM-0212"
    outcome = Outcome.REFUSED
    fix = "Close this connection before, or leave its process where it is."


class UrgentData(TcpmigError):
    """The receive queue holds urgent data (TCP's out-of-band byte). Reading the queue from outside stops at the urgent
    mark; going past it takes SO_PEEK_OFF for TCP, which this kernel does not have (Linux 6.10 does): what is behind the
    mark would be lost."""

    code = "TM-0213"
    fix = "Let the application read the urgent byte and try again."


class ConnectionCallFailed(TcpmigError):
    """A system call on a connection's socket failed. The message names the call and the kernel's reason. What had been
    changed on the sockets of the same batch was undone."""

    code = "TM-0214"
    fix = "See the named call; CAP_NET_ADMIN is needed in the user namespace that owns the network namespace."


class AddressInUse(TcpmigError):
    """A connection with the same addresses and ports exists in this network namespace already, or something else keeps
    the local port."""

    code = "TM-0215"
    fix = "Discard or close the other connection first; list it with `tcpmig conns`."


class ListenerFilterRefused(TcpmigError):
    """A listening socket does not take a filter (Multipath TCP listeners refuse them, SO_LOCK_FILTER forbids them), so
    that new connections cannot be held back at it."""

    code = "TM-0216"
    outcome = Outcome.REFUSED
    fix = "Start the server with plain TCP listeners (Go: GODEBUG=multipathtcp=0), or without SO_LOCK_FILTER."


class StillMoving(TcpmigError):
    """A frozen connection's queues or sequence numbers changed while they were read, several times over: something
    still uses the socket, probably a process that shares it and was not stopped."""

    code = "TM-0217"
    fix = "Stop every process that holds this socket (see `tcpmig conns`) and try again."


class QueueNotRestored(TcpmigError):
    """The kernel did not take the whole send or receive queue of a connection that was being rebuilt."""

    code = "TM-0218"
    fix = "Give the host more memory for TCP (net.ipv4.tcp_mem) and try again."


class AlreadyFrozen(TcpmigError):
    """The connection is frozen already: by an earlier `tcpmig freeze`, or by a checkpoint or migration under way.
    Nothing was changed."""

    code = "TM-0280"
    outcome = Outcome.REFUSED
    fix = "Let it flow again with `tcpmig resume CONN`, or wait until the migration is done."


class NotFrozen(TcpmigError):
    """No `tcpmig freeze` in this boot and network namespace has frozen this connection, or it is resumed already, or
    the freeze kept its record in another runtime directory."""

    code = "TM-0281"
    outcome = Outcome.REFUSED
    fix = "List what is frozen with `tcpmig conns`; TCPMIG_RUNTIME_DIR must be the one of the freeze."


class FinNotRestored(TcpmigError):
    """A half-closed connection was rebuilt, but a FIN could not be put back into its place: the application would wait
    for an end that has come already, or the peer for one that was promised."""

    code = "TM-0219"
    fix = "Report it with the log; the connection can be closed by its application."


class AddressStillHere(TcpmigError):
    """A connection is to be discarded while its address is still configured on this host: the next segment of its peer
    would be answered with a reset, which ends the connection wherever it lives now. Nothing was changed."""

    code = "TM-0268"
    outcome = Outcome.REFUSED
    fix = "Move the address first, then discard."


class AddressNotMoved(TcpmigError):
    """A connection that was put together here is to live, and its address is not configured on this host (yet): it
    would talk into the void, and its peer would go on talking to another host. It stays as it is, frozen."""

    code = "TM-0269"
    outcome = Outcome.REFUSED
    fix = "Add the address to this host, take it from the other one, and ask again."


class TamperedConnection(TcpmigError):
    """While it was frozen, or being exported, the socket became another connection than the one that it was: its
    process used the time to dissolve it and to name other ends. It was ended silently, and nothing was exported."""

    code = "TM-0270"
    fix = "Let a process leave its sockets alone while they are frozen."


class NotExported(TcpmigError):
    """A connection is to be discarded that was not exported since it was frozen: it would be lost. Nothing was
    changed."""

    code = "TM-0272"
    outcome = Outcome.REFUSED
    fix = "Export it first; to end a connection, close it."


class OwnerNotStill(TcpmigError):
    """Reading or writing hard state takes repair mode, in which the owner's calls fail: so its threads are stopped for
    that moment. One of them could not be: another debugger holds it, or it does not stop. Nothing was changed."""

    code = "TM-0224"
    outcome = Outcome.REFUSED
    fix = "Detach the debugger, or stop the process, and try again."


class ConnectionLost(TcpmigError):
    """A connection was being rebuilt in its place when the kernel refused a step, and refused its former state as well.
    Its record is kept in the runtime directory."""

    code = "TM-0226"
    outcome = Outcome.PARTIAL
    fix = "Try `tcpmig resume CONN`, which rebuilds it from the record that was kept."


class ConnectNotRepeated(TcpmigError):
    """A socket that was connecting, or whose connect() had failed, was rebuilt, but the kernel refused a call that
    makes it connect or fail again: its application would wait for an answer that never comes."""

    code = "TM-0250"
    fix = "See the named reason; the application can close the socket and try again."


class KeysNotRestored(TcpmigError):
    """A connection or listener signs its segments (TCP MD5, RFC 2385), and the kernel here does not take its key:
    it was built without CONFIG_TCP_MD5SIG, forbids MD5 (FIPS mode), or is older than 4.13."""

    code = "TM-0252"
    outcome = Outcome.REFUSED
    fix = "Use a target whose kernel has CONFIG_TCP_MD5SIG."


class NotOneConnection(TcpmigError):
    """Two records were given as the two ends of one connection, and are not: their addresses, sequence numbers or FINs
    do not fit together. Perhaps one of them was exported while the other still lived."""

    code = "TM-0253"
    outcome = Outcome.REFUSED
    fix = "Freeze both ends before either is exported."


class TupleImpossible(TcpmigError):
    """A connection cannot have the addresses and ports that were asked for: they are malformed, or of another IP
    version or link."""

    code = "TM-0254"
    outcome = Outcome.REFUSED
    fix = "Give addresses of the connection's own IP version, and ports from 0 to 65535."


class SoftStateNotRestored(TcpmigError):
    """A connection that was being rebuilt was to be given its round-trip time again, by an acknowledgement that is
    injected in this network namespace, and that did not arrive: a packet filter drops what comes over loopback, or the
    machine is far too busy. Without it the connection would wait for seconds before it repeats what is lost."""

    code = "TM-0240"
    fix = "Let packets over loopback pass (nft, iptables), or try again when the machine is less busy."
