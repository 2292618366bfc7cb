"""The messages of a migration, as they are on the wire.

One codec family; the transport frames them (:mod:`migrate.wire`).  Image bytes travel in frames of their own, opaque
here.  Later versions may add messages, and fields with defaults; Hello, whose own shape never changes, agrees on one.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import field

import checkpoint.files.kinds  # noqa: F401  (makes every kind of open file known to the codec)
from checkpoint.files.base import OpenFile
from checkpoint.files.regular import RegularFile
from checkpoint.namespaces.mounts import Mounts
from checkpoint.namespaces.network import Network
from checkpoint.namespaces.ways import Ways
from checkpoint.verdict import Verdict
from migrate.addresses import AddressRecord
from migrate.unithook import HookUnit
from tcpstate.codec import family, member
from tcpstate.slotted import dataclass

__all__ = [
    "HIGHEST_VERSION",
    "LOWEST_VERSION",
    "Abort",
    "Ask",
    "Captured",
    "Check",
    "Commit",
    "Comparison",
    "CpuState",
    "Difference",
    "Done",
    "Failure",
    "Fetch",
    "Fetched",
    "ForwardNeed",
    "Hello",
    "HostFacts",
    "Keepalive",
    "Lost",
    "Measure",
    "Measured",
    "Message",
    "Needs",
    "PagesThere",
    "Prepare",
    "Prepared",
    "Refused",
    "Running",
    "Standing",
    "Started",
    "Stuck",
    "Told",
    "TreeNeed",
    "Verdicts",
    "captured",
]

#: the versions of the protocol that this program speaks
LOWEST_VERSION = HIGHEST_VERSION = 1

TOKEN_SIZE = 16
#: bytes of captured segments in one message; the limit of the line is four times that
_CAPTURED_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuState:
    """What the processes need of the processor, or what a processor has.

    machine     as in uname(2)
    flags       feature flags of /proc/cpuinfo
    xsave_size  bytes of the extended register state as ptrace gives it; 0 unknown
    xsave_mask  the components of that state that are enabled (XCR0); 0 unknown
    """

    machine: str
    flags: frozenset[str] = frozenset()
    xsave_size: int = 0
    xsave_mask: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What one host tells the other of itself.

    boot_id          of this boot
    network, pids    inode numbers of the network and PID namespaces: with boot_id they tell whether two hosts are one
    kernel           release, for the log only: features are probed, never derived from it
    page_size        bytes
    features         what this kernel can beyond what is needed (:func:`migrate.hostfacts.features`)
    """

    boot_id: str
    network: int
    pids: int
    kernel: str
    page_size: int
    cpu: CpuState
    features: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeNeed:
    """One process tree: its root, and every process and thread of it (the target needs the numbers free).

    inner  the root's number in a PID namespace of the tree's own, in which all of its numbers are free; 0: it has none
    """

    root: int
    pids: tuple[int, ...]
    tids: tuple[int, ...]
    command: str = ""
    inner: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardNeed:
    """``--address forward``: the addresses stay at home.

    forward      its ID: that of the migration which began it
    home, away   the tunnel's ends: addresses of the host that has the addresses, and of the one that runs the processes
    addresses    that are forwarded
    coming_home  the move ends it: the target is home
    """

    forward: str
    home: str
    away: str
    addresses: tuple[str, ...]
    coming_home: bool = False

    def __post_init__(self) -> None:
        for text in (self.home, self.away, *self.addresses):
            ipaddress.ip_address(text)
        if not self.addresses:
            raise ValueError("no address is forwarded")


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What has to be true at the target: N trees and M addresses, moved together or not at all.

    files           what the processes have open or mapped and the target must have too: paths, addresses to listen on
    directories     their working and root directories
    beacons         by what directories of the source are known (checkpoint/files/identity.py): name of a file in each
    used_addresses  local addresses of the trees' connections and bound listeners
    anywhere        listeners that are bound to no address, in words
    addresses       those of them that move, filled in by the source's takeover
    macs            link-layer addresses of the source
    peers           the other ends of the connections
    connections     their number
    away            how many of them have their other end on another host
    paired          local addresses, loopback apart, of connections whose two ends are both here: where these do not
                    move, the target must have them
    memory          bytes that will be resident
    features        names of kernel features without which the state cannot be rebuilt
    units           services at the source that the processes are in; for the hook there
    devices         interfaces, by their names at the source, that connections are bound to
    forward         how connections are forwarded, in place of addresses that move
    network         the tree's own network namespace; None: it is in its host's
    mounts          the tree's own, on which its files are; None: they are its host's
    """

    trees: tuple[TreeNeed, ...]
    files: tuple[OpenFile, ...] = ()
    directories: tuple[str, ...] = ()
    beacons: dict[str, str] = field(default_factory=dict)
    used_addresses: tuple[str, ...] = ()
    anywhere: tuple[str, ...] = ()
    addresses: tuple[AddressRecord, ...] = ()
    macs: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    connections: int = 0
    away: int = 0
    paired: tuple[str, ...] = ()
    memory: int = 0
    features: frozenset[str] = frozenset()
    units: tuple[HookUnit, ...] = ()
    cpu: CpuState | None = None
    devices: tuple[str, ...] = ()
    forward: ForwardNeed | None = None
    network: Network | None = None
    mounts: Mounts | None = None

    def by_our_numbers(self, pids: dict[int, int]) -> dict[int, int]:
        """At the source: by the roots' numbers there, what comes by those that they have themselves."""
        ours = {tree.inner or tree.root: tree.root for tree in self.trees}
        return {ours.get(pid, pid): there for pid, there in pids.items()}

    @property
    def written(self) -> list[str]:
        """Files open for writing, but for those on file systems that move with the processes."""
        found = (file.path for file in self.files if isinstance(file, RegularFile) and file.written)
        return [path for path in found if not Ways(str, self.mounts).carried(path)]

    def __post_init__(self) -> None:
        if not self.trees:
            raise ValueError("a migration has at least one process tree")
        for text in (*self.used_addresses, *self.peers, *self.paired):
            ipaddress.ip_address(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One item of a rebuilt connection that does not read back as it was sent."""

    connection: str
    item: str
    sent: str
    found: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What the target found when it exported the rebuilt connections again."""

    connections: int = 0
    differences: tuple[Difference, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A connection that could not be brought back, with the reason."""

    connection: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An error of the other host: the fields of a TcpmigError."""

    code: str
    message: str
    object: str = ""
    fix: str = ""


@family
@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Base of all messages."""


@member(Message, "hello")
@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(Message):
    """Both, first: the versions that the sender speaks, and where it runs."""

    lowest: int
    highest: int
    host: HostFacts
    program: str = ""


@member(Message, "check")
@dataclass(frozen=True, slots=True, kw_only=True)
class Check(Message):
    """Source: can you take this? ``migration`` names the migration in all that follows, and in both journals.

    map_dev  ``--map-dev``: interface here to interface there
    options  what else the rebuilding side is to be told, by name
    """

    migration: str
    needs: Needs
    map_dev: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)


@member(Message, "verdicts")
@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts(Message):
    """Target: yes; the verdicts may contain warnings."""

    migration: str
    items: tuple[Verdict, ...] = ()


@member(Message, "refused")
@dataclass(frozen=True, slots=True, kw_only=True)
class Refused(Message):
    """Target: no. ``failure`` is the first reason, ``items`` are all of them."""

    migration: str
    failure: Failure
    items: tuple[Verdict, ...] = ()


@member(Message, "measure")
@dataclass(frozen=True, slots=True, kw_only=True)
class Measure(Message):
    """Source: what does your clock say? (See :mod:`migrate.clock`.)"""

    number: int


@member(Message, "measured")
@dataclass(frozen=True, slots=True, kw_only=True)
class Measured(Message):
    """Target: CLOCK_MONOTONIC of this host when Measure ``number`` arrived, nanoseconds."""

    number: int
    clock_ns: int


@member(Message, "probe")
@dataclass(frozen=True, slots=True, kw_only=True)
class Probe(Message):
    """Source: bytes that mean nothing, to see how fast the line is (:mod:`migrate.forecast`)."""

    data: bytes


@member(Message, "probed")
@dataclass(frozen=True, slots=True, kw_only=True)
class Probed(Message):
    """Target: a Probe has arrived."""


@member(Message, "prepare")
@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare(Message):
    """Source: the image is complete.

    exported_ns  when the connections' clocks were read, by the target's CLOCK_MONOTONIC, nanoseconds
    image_bytes  length of the image
    """

    migration: str
    exported_ns: int
    image_bytes: int


@member(Message, "prepared")
@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared(Message):
    """Target: everything stands and needs only to be released."""

    migration: str
    comparison: Comparison


@member(Message, "commit")
@dataclass(frozen=True, slots=True, kw_only=True)
class Commit(Message):
    """Source: it is yours. The addresses are gone here. Only the target that read this knows ``token``."""

    migration: str
    token: bytes

    def __post_init__(self) -> None:
        if len(self.token) != TOKEN_SIZE:
            raise ValueError(f"a commit's token has {TOKEN_SIZE} bytes")


@member(Message, "captured")
@dataclass(frozen=True, slots=True, kw_only=True)
class Captured(Message):
    """Source, after COMMIT: segments for the connections that arrived here since the freeze, as captured. More may
    follow until Done: peers send here until they have heard the announcement. ``first``: all that had arrived before
    COMMIT was sent; the target waits for these, and for no others."""

    segments: tuple[bytes, ...] = ()
    first: bool = False


def captured(segments: Iterable[bytes], *, first: bool = False) -> Iterator[Captured]:
    """The segments in messages of a bearable length; the last is marked if they are the ``first`` ones."""
    batch: list[bytes] = []
    size = 0
    for segment in segments:
        if size + len(segment) > _CAPTURED_BYTES:
            yield Captured(segments=tuple(batch))
            batch, size = [], 0
        batch.append(segment)
        size += len(segment)
    yield Captured(segments=tuple(batch), first=first)


@member(Message, "started")
@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Message):
    """Target: COMMIT is in the journal here; the processes outlive this program from now on."""

    migration: str
    token: bytes


@member(Message, "running")
@dataclass(frozen=True, slots=True, kw_only=True)
class Running(Message):
    """Target: they run.

    released_ns  when the last thread was released, by the target's CLOCK_MONOTONIC, nanoseconds
    pids         PID at the source (root processes) to PID here
    lost         connections that did not come through
    """

    migration: str
    token: bytes
    released_ns: int
    pids: dict[int, int]
    lost: tuple[Lost, ...] = ()


@member(Message, "stuck")
@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck(Message):
    """Target: it failed after the release had begun. It holds what it has, and cannot give it back."""

    migration: str
    token: bytes
    failure: Failure


@member(Message, "abort")
@dataclass(frozen=True, slots=True, kw_only=True)
class Abort(Message):
    """Either: the sender gives up, has undone everything on its side, and will never start the processes."""

    migration: str
    failure: Failure


@member(Message, "keepalive")
@dataclass(frozen=True, slots=True, kw_only=True)
class Keepalive(Message):
    """Either, at any time: still at work."""


@member(Message, "done")
@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Message):
    """Source: the original is gone; nothing more will come."""

    migration: str


class Standing(enum.Enum):
    """What a host knows of a migration that it was the target of."""

    UNKNOWN = "unknown"  # there is no journal of it
    BUSY = "busy"  # the program that takes it in is still at work
    ABORTED = "aborted"  # nothing of it runs, or ever ran, here
    HELD = "held"  # it is this host's, and not let go yet
    RUNS = "runs"  # it runs here, or did until it ended by itself
    LOST = "lost"  # it was this host's, which has been booted since


class PagesThere(enum.Enum):
    """How it stands at the target with pages that were left for later."""

    WANTED = "wanted"  # the line is handed to who brings them
    COMPLETE = "complete"  # none is missing any more, or nobody is there to miss one
    LOST = "lost"  # those who brought them were killed, both at once: what had not come is empty there


@member(Message, "fetch")
@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch(Message):
    """Source, in place of Check: fetch pages of this migration over this line (:mod:`migrate.pageline`)."""

    migration: str


@member(Message, "fetched")
@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched(Message):
    """Target: the answer to Fetch."""

    migration: str
    there: PagesThere


@member(Message, "ask")
@dataclass(frozen=True, slots=True, kw_only=True)
class Ask(Message):
    """Source, in place of Check: what has become of this migration? ``settle``: and finish what is yours, undo what is
    not, as `tcpmig recover` does there; else nothing is changed."""

    migration: str
    settle: bool = False


@member(Message, "told")
@dataclass(frozen=True, slots=True, kw_only=True)
class Told(Message):
    """Target: the answer to Ask. ``pids`` as in Running; ``failure``: why it is not settled."""

    migration: str
    standing: Standing
    pids: dict[int, int] = field(default_factory=dict)
    failure: Failure | None = None
