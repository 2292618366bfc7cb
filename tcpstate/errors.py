"""The error tree of the project, and the catalogue that ``tcpmig explain`` prints.

One class per code.  The class docstring is the long explanation (why it happens); ``fix`` says what to do.  The
packages above define their own subclasses in their own ``errors.py``; codes are unique over all of them (a unit test
says so).  Ranges: 01xx general, 02xx tcpstate, 03xx refused before a process is touched, 04xx image, 05xx process
engine, 06xx migration and protocol, 07xx addresses, and (from 0715, and 08xx) what the engine refuses besides.
"""

from __future__ import annotations

import enum
from typing import ClassVar

__all__ = [
    "AddressInUse",
    "AddressNotMoved",
    "AddressStillHere",
    "AlreadyFrozen",
    "BadChaperoneMessage",
    "BadExtents",
    "BadKeyFile",
    "BadRecord",
    "BadSignature",
    "BadStateItem",
    "ChaperoneLimit",
    "ChaperoneRuns",
    "ChaperoneUnreachable",
    "ConnIdSyntax",
    "ConnectionCallFailed",
    "ConnectionLost",
    "FinNotRestored",
    "ForbiddenEndpoint",
    "ForbiddenState",
    "ForeignFilter",
    "KernelFeatureMissing",
    "KernelReadRefused",
    "ListenerFilterRefused",
    "MissingCapability",
    "NoSuchConnection",
    "NoSuchUser",
    "NotExported",
    "NotFrozen",
    "NotPermitted",
    "NotSettable",
    "NotYours",
    "Outcome",
    "OwnerNotStill",
    "OwnerRuns",
    "QueueNotRestored",
    "SoftStateNotRestored",
    "StateNotSet",
    "StillMoving",
    "TamperedConnection",
    "TcpmigError",
    "UnknownHardState",
    "UnknownStateKeyword",
    "UnsignedRecord",
    "UnsupportedSocket",
    "UnsupportedState",
    "UntrustedKey",
    "UrgentData",
    "catalogue",
]


class Outcome(enum.IntEnum):
    """Exit statuses of the command line; every error class names the one that it ends a command with."""

    DONE = 0
    FAILED = 1  # nothing lost: the process runs where it ran
    USAGE = 2
    REFUSED = 3  # before anything was stopped or built
    PARTIAL = 4  # done, but some connections were lost
    IN_DOUBT = 5  # both sides hold; `tcpmig recover` settles it


class TcpmigError(Exception):
    """Something went wrong that has no more exact code. The message and the log say what.

    message  what happened, one sentence without a full stop
    object   to which object it happened: ``pid 12``, ``pid 12 fd 5``, a conn-ID, a path
    fix      what the user can do, in place of the class's general advice
    told     the program that asked for it has been told, and tells its user
    """

    code: ClassVar[str] = "TM-0100"
    outcome: ClassVar[Outcome] = Outcome.FAILED
    fix: str = "Read the detail with -v; if it is not clear, report it with the log."
    told: bool = False

    def __init__(self, message: str, *, object: str = "", fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.object = object
        if fix is not None:
            self.fix = fix

    def __str__(self) -> str:
        where = f" ({self.object})" if self.object else ""
        return f"{self.code}: {self.message}{where}. {self.fix}"

    def as_dict(self) -> dict[str, str]:
        """The fields of the JSON failure object (``design/CLI.md``)."""
        return {"code": self.code, "message": self.message, "object": self.object, "fix": self.fix}


class MissingCapability(TcpmigError):
    """The tool stops other processes, reads their memory and puts sockets in repair mode. That takes CAP_SYS_PTRACE,
    CAP_NET_ADMIN (in the user namespace that owns the network namespace) and CAP_SYS_ADMIN or
    CAP_CHECKPOINT_RESTORE. One of them is missing from the effective set."""

    code = "TM-0101"
    outcome = Outcome.REFUSED
    fix = "Run as root, or give the named capability to the program that runs tcpmig."


class NotPermitted(TcpmigError):
    """The kernel refused an operation although the capability is there: another user namespace, a security module, a
    tracer already attached."""

    code = "TM-0102"
    outcome = Outcome.REFUSED
    fix = "Run tcpmig in the user namespace that owns the object; check the security module's log."


class KernelFeatureMissing(TcpmigError):
    """This kernel lacks an interface that the operation needs. Features are probed, versions are never compared."""

    code = "TM-0103"
    outcome = Outcome.REFUSED
    fix = "Use a kernel with the named feature (see docs/reference/kernel.md)."


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


class BadRecord(TcpmigError):
    """A portable record (of a connection, or inside an image or a message) is truncated, malformed, of an unknown
    version, or holds a value outside its range. Nothing was changed."""

    code = "TM-0203"
    outcome = Outcome.REFUSED
    fix = "Make the record again; do not edit it by hand."


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


class BadChaperoneMessage(TcpmigError):
    """What came over the chaperone's socket is not its protocol: a frame that is too long, a message that does not
    decode, a request before the greeting, a descriptor that belongs to no request. The connection to the chaperone was
    closed; connections that its client had frozen flow again."""

    code = "TM-0260"
    outcome = Outcome.REFUSED
    fix = "Use tcpstate.chaperone.client of the same version as the chaperone."


class NotYours(TcpmigError):
    """The connection belongs to another user. The chaperone does for a process what it might do with its own
    connections only: the user of the process at the other end of its socket must be the owner of the connection's
    socket (the user who made it), and hold it in a process of its own. Nothing was changed."""

    code = "TM-0261"
    outcome = Outcome.REFUSED
    fix = "Ask as the user who owns the connection, or as root with `tcpmig` itself."


class ChaperoneLimit(TcpmigError):
    """A limit that the chaperone keeps for each user was reached: requests per second, bytes of a request or of an
    answer, connections frozen at a time, clients at a time. Nothing was changed."""

    code = "TM-0262"
    outcome = Outcome.REFUSED
    fix = "Ask later, resume what is frozen, or let the operator raise the limit (see `tcpmig chaperone --help`)."


class ForbiddenEndpoint(TcpmigError):
    """The record's own end is an address or a port that its caller may not use: the address is not configured on this
    host and not allowed by the chaperone's policy, the port is privileged, or another user has a socket on it. Nothing
    was built."""

    code = "TM-0263"
    outcome = Outcome.REFUSED
    fix = "Let the operator allow it (`tcpmig chaperone --address`, `--low-port`), or rebuild elsewhere."


class ForbiddenState(TcpmigError):
    """The record holds what its caller might not set on a socket of its own: an option that takes a capability (mark,
    priority above 6, extension headers, ..), a buffer beyond this host's limits, a window that the connection cannot
    have. Only root may. Nothing was built."""

    code = "TM-0264"
    outcome = Outcome.REFUSED
    fix = "Let the application give the option up before the export, or let root rebuild the connection."


class OwnerRuns(TcpmigError):
    """A connection is to be exported by its conn-ID, and the process that has it open runs. Its next system call on the
    socket would fail, and what it read or wrote meanwhile would be in two places. Nothing was changed."""

    code = "TM-0265"
    outcome = Outcome.REFUSED
    fix = "Stop that process (SIGSTOP) and ask again, or let it ask itself, passing its socket."


class ChaperoneUnreachable(TcpmigError):
    """No chaperone answers on its socket: it does not run, the path is another one, it was ended meanwhile, or it was
    busy for longer than the client waits."""

    code = "TM-0266"
    fix = "Start `tcpmig chaperone` as root (or its systemd unit); TCPMIG_CHAPERONE names another socket."


class RecordOfAnother(TcpmigError):
    """A chaperone that only rebuilds signed records was given one that was exported for another user. Nothing was
    built."""

    code = "TM-0267"
    outcome = Outcome.REFUSED
    fix = "Let the user whose connection it was ask for it, or root."


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


class ChaperoneRuns(TcpmigError):
    """Another chaperone answers on this socket already. This one did not start; what the other one holds is
    untouched."""

    code = "TM-0271"
    outcome = Outcome.REFUSED
    fix = "Use that one, end it, or give this one another path (--socket)."


class NotExported(TcpmigError):
    """A connection is to be discarded that was not exported since it was frozen: it would be lost. Nothing was
    changed."""

    code = "TM-0272"
    outcome = Outcome.REFUSED
    fix = "Export it first; to end a connection, close it."


class NoSuchUser(TcpmigError):
    """The user that the chaperone is to become is not known on this host. It did not start."""

    code = "TM-0273"
    outcome = Outcome.REFUSED
    fix = "Make the user (`useradd --system tcpmig`), or name another one (--user)."


class UnknownStateKeyword(TcpmigError):
    """There is no item of a connection's state with this keyword. Keywords stand in docs/reference/keywords.md; the
    wild cards ALL, ALL_HARD and ALL_SOFT need none. Nothing was changed."""

    code = "TM-0220"
    outcome = Outcome.USAGE
    fix = "Look the keyword up in docs/reference/keywords.md."


class NotSettable(TcpmigError):
    """This item of the state can be read only: it follows from others, counts what has happened, or this kernel has no
    way to write it. Nothing was changed."""

    code = "TM-0221"
    outcome = Outcome.REFUSED
    fix = "See the column `set` in docs/reference/keywords.md."


class BadStateItem(TcpmigError):
    """The value of a state item has the wrong type, lies outside its range, or contradicts the rest of the connection's
    state (more bytes sent than there are, a window without a connection). None of the items was set."""

    code = "TM-0222"
    outcome = Outcome.REFUSED
    fix = "See docs/reference/keywords.md for datatype, unit and range."


class StateNotSet(TcpmigError):
    """The kernel refused to take one of the items that were to be set. Those that had been set were given their former
    values again: the connection is as it was."""

    code = "TM-0223"
    fix = "See the named item and the kernel's reason; set the others without it."


class OwnerNotStill(TcpmigError):
    """Reading or writing hard state takes repair mode, in which the owner's calls fail: so its threads are stopped for
    that moment. One of them could not be: another debugger holds it, or it does not stop. Nothing was changed."""

    code = "TM-0224"
    outcome = Outcome.REFUSED
    fix = "Detach the debugger, or stop the process, and try again."


class BadExtents(TcpmigError):
    """Extents of pending data are in ascending order, do not overlap, begin at or after 0, and fit the receive window.
    Nothing was changed."""

    code = "TM-0225"
    outcome = Outcome.REFUSED
    fix = "Give the extents as transport_read_pending returned them."


class ConnectionLost(TcpmigError):
    """A connection was being rebuilt in its place when the kernel refused a step, and refused its former state as well.
    Its record is kept in the runtime directory."""

    code = "TM-0226"
    outcome = Outcome.PARTIAL
    fix = "Try `tcpmig resume CONN`, which rebuilds it from the record that was kept."


class UnknownHardState(TcpmigError):
    """A record carries an item of hard state that this version does not know. To go on without it would not be the same
    connection for its peer. Nothing was built."""

    code = "TM-0227"
    outcome = Outcome.REFUSED
    fix = "Use the version of tcpmig that wrote the record, or a younger one."


class UnsignedRecord(TcpmigError):
    """The policy of this host takes only records that carry a signature, and this one carries none. Nothing was
    built."""

    code = "TM-0230"
    outcome = Outcome.REFUSED
    fix = "Sign the record where it is made, with a key that this host trusts."


class BadSignature(TcpmigError):
    """A record's signature does not belong to its bytes: it was altered on its way, or signed with another key than the
    one it names. Nothing was built."""

    code = "TM-0231"
    outcome = Outcome.REFUSED
    fix = "Fetch the record again from where it was made."


class UntrustedKey(TcpmigError):
    """A record is signed, but by a key that this host's policy does not name. Nothing was built."""

    code = "TM-0232"
    outcome = Outcome.REFUSED
    fix = "Add the signer's public key to the policy, if it is to be trusted."


class BadKeyFile(TcpmigError):
    """A key file cannot be read, is no Ed25519 key in PEM form without a passphrase, or is a private key that others
    than its owner may read (its mode must be 0600 or stricter)."""

    code = "TM-0233"
    outcome = Outcome.REFUSED
    fix = "Make a key with tcpstate.signing.generate_key or `openssl genpkey -algorithm ed25519`; `chmod 600` the file."


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


class RepairNotPermitted(TcpmigError):
    """The kernel does not let this caller put a TCP socket in repair mode, without which no connection can be read or
    rebuilt: CAP_NET_ADMIN in the user namespace that owns the network namespace is missing. Nothing was changed."""

    code = "TM-0251"
    outcome = Outcome.REFUSED
    fix = "Run as root of the user namespace that owns the network namespace."


class KernelReadRefused(TcpmigError):
    """Out-of-order data has no system call: it is read from kernel memory, which is only done when the caller says so
    (kernel_reads=True), for connections that are frozen. Or what was found there does not read as a queue of packets:
    the connection was not frozen, or this kernel lays its memory out in a way that is not known. Nothing was changed,
    and nothing is lost without it: the peer sends such data again."""

    code = "TM-0241"
    outcome = Outcome.REFUSED
    fix = "Leave it out; or freeze the connection first, and pass kernel_reads=True."


class SoftStateNotRestored(TcpmigError):
    """A connection that was being rebuilt was to be given its round-trip time again, by an acknowledgement that is
    injected in this network namespace, and that did not arrive: a packet filter drops what comes over loopback, or the
    machine is far too busy. Without it the connection would wait for seconds before it repeats what is lost."""

    code = "TM-0240"
    fix = "Let packets over loopback pass (nft, iptables), or try again when the machine is less busy."


def catalogue() -> dict[str, type[TcpmigError]]:
    """Every error class that has been imported, by code."""
    found: dict[str, type[TcpmigError]] = {}
    todo: list[type[TcpmigError]] = [TcpmigError]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if "code" in vars(cls):
            if cls.code in found:
                raise RuntimeError(f"{cls.code} is the code of both {found[cls.code].__name__} and {cls.__name__}")
            found[cls.code] = cls
    return dict(sorted(found.items()))
