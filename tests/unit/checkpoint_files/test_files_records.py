"""Records of open files: through the codec and back, and what is not accepted."""

from __future__ import annotations

import dataclasses
import os
import socket
import stat
import struct
import typing
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.errors import UnsupportedProtocol
from checkpoint.files import abi, multicast, udpsend, unixdiag
from checkpoint.files.abi import LockType, OwnerType, TimerSpec
from checkpoint.files.base import AsyncOwner, FdView, FileLock, OpenFile, PosixLock, locks_of, parse_info
from checkpoint.files.content import Content, ContentKind
from checkpoint.files.corked import Corked
from checkpoint.files.device import Device
from checkpoint.files.epoll import Epoll, EpollWatch
from checkpoint.files.eventfd import EventFd
from checkpoint.files.external import External
from checkpoint.files.fanotify import Fanotify, Mark, Of
from checkpoint.files.fifo import Fifo
from checkpoint.files.identity import Evidence
from checkpoint.files.inet import Endpoint
from checkpoint.files.inotify import Inotify, Watch
from checkpoint.files.kinds import KINDS, kind_for
from checkpoint.files.listener import Listener
from checkpoint.files.memfd import Memfd
from checkpoint.files.multicast import Membership
from checkpoint.files.netlink import NetlinkFile
from checkpoint.files.packet import Listening, PacketFile
from checkpoint.files.pidfd import PidFd
from checkpoint.files.pipe import Pipe, PipeQueue
from checkpoint.files.policy import NO_POLICY
from checkpoint.files.procfile import ProcFile
from checkpoint.files.pty import PtyMaster, PtySlave
from checkpoint.files.raw import RawFile
from checkpoint.files.regular import DeletedFile, Directory, PathOnly, RegularFile, SharedHugePages, SharedMemory
from checkpoint.files.shipped import ShippedFile
from checkpoint.files.signalfd import SignalFd
from checkpoint.files.sockopts import SocketOptions
from checkpoint.files.sysv import SysvSegment
from checkpoint.files.table import LocksOfFile, TreeFiles
from checkpoint.files.tcpfile import TcpFile
from checkpoint.files.terminal import Terminal, Termios
from checkpoint.files.timerfd import TimerFd
from checkpoint.files.udp import Datagram, UdpFile, delivered
from checkpoint.files.unix import UnixFile
from checkpoint.files.unixname import UnixName
from checkpoint.files.unixqueue import Message
from checkpoint.files.unsupported import Unsupported
from tcpstate import codec
from tcpstate.errors import BadRecord
from tcpstate.record import Buffers

OPTIONS = SocketOptions(
    numbers={"so.linger": (1, 5)},
    data={"so.bindtodevice": b"lo"},
    buffers=Buffers(send=4096, receive=8192, send_locked=True, receive_locked=False),
    filter=((6, 0, 0, 5),),
)
HERE = Endpoint(address="10.0.0.1", port=80)
NAME = UnixName(address=b"/run/x.sock", path="/run/x.sock", mode=0o755, uid=1, gid=2)

#: one of each kind
RECORDS: list[OpenFile] = [
    PathOnly(flags=0o10000000, path="/etc"),
    External(flags=2, link="/dev/pts/3", stream=0),
    Device(flags=2, path="/dev/null", major=1, minor=3),
    Pipe(flags=0, pipe=7, size=65536, queue=PipeQueue(chunks=(b"a", b""), packets=True)),
    Fifo(flags=1, path="/run/fifo", size=4096, queue=None),
    Memfd(flags=2, pos=5, content=0),
    SharedMemory(flags=2, content=1),
    SharedHugePages(flags=2, content=4),
    SysvSegment(flags=2, number=7, key=-5, mode=0o1640, uid=1, gid=2, content=0),
    DeletedFile(flags=1, content=2, locks=(FileLock(whole=False, type=LockType.READ, start=3, length=0),)),
    RegularFile(flags=0, path="/etc/\udcff", size=1, mtime_ns=2, inode=3, volatile=False),
    ShippedFile(flags=2, path="/var/log/x", content=3, mtime_ns=-1, attributes={"user.a": b"\xff"}),
    Directory(flags=0o200000, pos=1 << 40, path="/usr"),
    EventFd(flags=2, count=2**64 - 2, semaphore=True),
    TimerFd(flags=2, clock=1, ticks=1, settime=0, left=5, interval=6, deadline=7),
    SignalFd(flags=2, mask=2**64 - 1, owner=AsyncOwner(type=OwnerType.GROUP, pid=4, signal=40)),
    Epoll(flags=2, watches=(EpollWatch(number=5, pid=1, file=2, events=1 << 31 | 1, data=2**64 - 1),)),
    Inotify(flags=0, watches=(Watch(number=1, path="/tmp", mask=0x100),), unread=True),
    Fanotify(
        flags=2,
        group=0x203,
        events=0x8000,
        marks=(Mark(of=Of.MOUNT, path="/", flags=0x40, mask=1 << 31, ignored=0x20),),
    ),
    Listener(flags=2, family=socket.AF_INET, name=HERE, backlog=511, options=OPTIONS),
    TcpFile(flags=2, family=socket.AF_INET, conn_id="tcp:10.0.0.1:80-10.0.0.2:99"),
    UdpFile(
        flags=2,
        family=socket.AF_INET6,
        name=Endpoint(address="fe80::1", port=5, scope="eth0"),
        peer=None,
        queue=(Datagram(data=b"", sender=HERE, to="10.0.0.9"),),
        memberships=(Membership(group="ff02::fb", interface="eth0"),),
        options=OPTIONS,
        peek_off=-1,
        corked=Corked(data=b"half", to=Endpoint(address="fe80::2", port=7, scope="eth0"), source="fe80::1", ttl=64),
    ),
    UnixFile(
        flags=2,
        socket=1,
        type=socket.SOCK_STREAM,
        peer=2,
        waits_at=None,
        remote=b"",
        name=NAME,
        accepted=True,
        backlog=None,
        shutdown=3,
        queue=(Message(data=b"x", rights=(1, 2), credentials=(1, 2, 3)),),
        options=OPTIONS,
        peek_off=0,
    ),
    PtyMaster(
        flags=2,
        number=3,
        modes=Termios(
            input=1, output=2, control=3, local=4, line=0, characters=bytes(19), input_speed=9600, output_speed=9600
        ),
        window=bytes(8),
        node=(0, 5, 0o620),
        session=4,
        foreground=5,
        waiting=Terminal(output=b"x", lines=(b"", b"a\n"), rest=b"b"),
    ),
    PtySlave(flags=2, number=3, own=True),
    PidFd(flags=2, pid=-1),
    ProcFile(flags=0, pid=7, thread=8, name="net/tcp"),
    NetlinkFile(
        flags=2,
        type=socket.SOCK_RAW,
        protocol=0,
        port=2**32 - 1,
        groups=(1, 33),
        peer=(0, 0),
        switches=(3,),
        passes=True,
        buffers=OPTIONS.buffers,
    ),
    PacketFile(
        flags=2,
        type=socket.SOCK_RAW,
        protocol=3,
        device="eth0",
        switches={"AUXDATA": 1},
        memberships=(Listening(device="eth0", type=1, address=b""),),
        buffers=OPTIONS.buffers,
        filter=((6, 0, 0, 5),),
    ),
    RawFile(
        flags=2,
        family=socket.AF_INET,
        type=socket.SOCK_RAW,
        protocol=1,
        name=None,
        peer=HERE,
        special={"ICMP_FILTER": bytes(4)},
        memberships=(),
        options=OPTIONS,
    ),
]


def test_every_kind_is_here() -> None:
    assert {type(record) for record in RECORDS} | {Unsupported} == set(KINDS) == set(codec.members(OpenFile).values())


@pytest.mark.parametrize(
    "change",
    [
        {"pid": 0},
        {"pid": 1 << 22},
        {"thread": -1},
        *({"name": bad} for bad in ("/x", "a/../b", "fd/3", "exe", "root/etc/x", "\0")),
    ],
)
def test_files_of_a_process_that_cannot_be(change: dict[str, object]) -> None:
    known = {"flags": 0, "pid": 7, "thread": 0, "name": "status"}
    ProcFile(**known)
    with pytest.raises(ValueError, match=r"out of range|path below|leads out"):
        ProcFile(**(known | change))


@pytest.mark.parametrize(
    ("protocol", "word"),
    [((2, 1, 132), "SCTP"), ((10, 5, 132), "SCTP"), ((2, 6, 33), "DCCP"), ((2, 2, 136), "UDP-Lite")],
)
def test_sockets_of_other_protocols_are_refused_by_their_names(protocol: tuple[int, int, int], word: str) -> None:
    sock: Any = SimpleNamespace(family=protocol[0], type=protocol[1], proto=protocol[2])
    here: Any = os.stat_result((stat.S_IFSOCK | 0o777, *[0] * 9))
    table: Any = SimpleNamespace(policy=NO_POLICY)
    view = FdView(
        pid=7, fd=3, dup=9, magic="/proc/7/fd/3", link="socket:[1]", flags=2, pos=0, info={}, lines=(), stat=here,
        table=table, places=[(7, 3)], _socket=sock, _protocol=protocol,
    )  # fmt: skip
    with pytest.raises(UnsupportedProtocol, match=word):
        kind_for(view).examine(view)


@pytest.mark.parametrize(
    "change",
    [{"huge": 11}, {"huge": 31}, {"size": 4096}, {"kind": ContentKind.DELETED, "name": "/x"}],
)
def test_huge_pages_that_cannot_be(change: dict[str, object]) -> None:
    known = {"kind": ContentKind.MEMFD, "name": "m", "size": 4 << 20, "mode": 0o777, "uid": 0, "gid": 0, "huge": 21}
    Content(**known)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="huge pages"):
        Content(**(known | change))  # type: ignore[arg-type]


def test_round_trip_through_the_codec() -> None:
    files = TreeFiles(
        files=RECORDS,
        contents=[Content(kind=ContentKind.MEMFD, name="m", size=1 << 40, mode=0o777, uid=0, gid=0, seals=15)],
        tables={7: {0: (0, True), 500: (19, False)}},
        locks={7: [LocksOfFile(file=8, locks=(PosixLock(type=LockType.WRITE, start=0, length=5),))]},
    )
    assert codec.unpack(TreeFiles, codec.pack(files)) == files


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_with_one_field_of_another_type_is_refused(record: OpenFile) -> None:
    plain = codec.to_plain(record)
    for field in dataclasses.fields(record):
        with pytest.raises(BadRecord):
            codec.from_plain(OpenFile, {**plain, field.name: 1.5})
    for hostile in (-1, 1 << 32, 2**70):
        with pytest.raises(BadRecord):
            codec.from_plain(OpenFile, {**plain, "flags": hostile})


@given(st.binary(max_size=60))
def test_garbage_is_no_record(data: bytes) -> None:
    with pytest.raises(BadRecord):
        codec.unpack(TreeFiles, data)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Device(flags=2, path="/dev/mem", major=1, minor=1),
        lambda: RegularFile(flags=0, path="etc/passwd", size=0, mtime_ns=0, inode=0, volatile=False),
        lambda: RegularFile(flags=0, path="/etc\0", size=0, mtime_ns=0, inode=0, volatile=False),
        lambda: Directory(flags=0, path=""),
        lambda: EventFd(flags=0, count=2**64 - 1, semaphore=False),
        lambda: EventFd(flags=-1, count=0, semaphore=False),
        lambda: SignalFd(flags=0, mask=-1),
        lambda: TimerFd(flags=0, clock=1, ticks=-1, settime=0, left=0, interval=0),
        lambda: EpollWatch(number=-1, pid=1, file=0, events=0, data=0),
        lambda: EpollWatch(number=1, pid=1, file=0, events=1 << 32, data=0),
        lambda: UnixName(address=b""),
        lambda: UnixName(address=b"/a\0b"),
        lambda: UnixName(address=b"/a", path="relative"),
        lambda: UnixName(address=b"x" * 109),
        lambda: Endpoint(address="10.0.0.256", port=1),
        lambda: Endpoint(address="::1", port=1 << 16),
        lambda: Datagram(data=bytes(1 << 16), sender=HERE, to="10.0.0.1"),
        lambda: Content(kind=ContentKind.DELETED, name="no path", size=0, mode=0, uid=0, gid=0),
        lambda: Content(kind=ContentKind.MEMFD, name="m", size=-1, mode=0, uid=0, gid=0),
        lambda: TcpFile(flags=0, family=socket.AF_UNIX, conn_id="x"),
        lambda: TcpFile(flags=0, family=socket.AF_INET),
        lambda: ShippedFile(flags=2, path="no path", content=3, mtime_ns=0),
        lambda: Evidence(digest=b"short"),
        lambda: SocketOptions(data={"so.bindtodevice": bytes(17)}, buffers=OPTIONS.buffers),
        lambda: SocketOptions(numbers={"so.linger": (1, 2, 3)}, buffers=OPTIONS.buffers),
    ],
)
def test_values_out_of_range(make: typing.Callable[[], object]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (each has its own words)
        make()


def test_lock_lines() -> None:
    lines, info = parse_info(
        "pos:\t5\nflags:\t0100002\nlock:\t1: FLOCK  ADVISORY  WRITE 95 fe:00:21 0 EOF\n"
        "lock:\t2: POSIX  ADVISORY  READ 95 fe:00:21 5 14\nlock:\t3: OFDLCK ADVISORY  WRITE -1 fe:00:21 7 7\n"
    )
    assert info["pos"] == "5"
    found = locks_of(lines, "fd")
    assert [(kind, lock.type, lock.start, lock.length) for kind, lock in found] == [
        ("FLOCK", LockType.WRITE, 0, 0),
        ("POSIX", LockType.READ, 5, 10),
        ("OFDLCK", LockType.WRITE, 7, 1),
    ]


def test_a_lease_that_is_being_broken_is_refused() -> None:
    from checkpoint.errors import UnsupportedLock

    ((kind, lock),) = locks_of(("lock:\t1: LEASE  ACTIVE    READ 95 fe:00:21 0 EOF",), "fd")
    assert (kind, lock.type) == ("LEASE", LockType.READ)
    with pytest.raises(UnsupportedLock):
        locks_of(("lock:\t1: LEASE  BREAKING  READ 95 fe:00:21 0 EOF",), "fd")


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_timer_spec(interval: int, value: int) -> None:
    spec = TimerSpec(interval=interval, value=value)
    assert TimerSpec.unpack(spec.pack()) == spec


@given(st.binary(max_size=300))
def test_udp_packets_have_the_right_checksum(data: bytes) -> None:
    four = udpsend.packet(data, "10.0.0.1", 1000, "10.0.0.2", 53)
    assert (four[0], four[9], four[12:20]) == (0x45, 17, socket.inet_aton("10.0.0.1") + socket.inet_aton("10.0.0.2"))
    assert four[28:] == data
    pseudo = four[12:20] + struct.pack("!HH", 17, len(data) + 8)
    assert udpsend.checksum(pseudo + four[20:]) == 0
    six = udpsend.packet(data, "fd00::1", 1000, "fd00::2", 53)
    assert (six[0] >> 4, six[6]) == (6, 17)
    assert udpsend.checksum(six[8:40] + struct.pack("!II", len(data) + 8, 17) + six[40:]) == 0


def test_multicast_lists() -> None:
    v4 = (
        "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n"
        "1\tlo        :     2      V3\n\t\t\t\t030201EF     1 0:00000000\t\t0\n"
        "\t\t\t\t010000E0     1 0:00000000\t\t0\n2\teth0      :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n"
    )
    assert multicast.groups_ipv4(v4) == [
        Membership(group="239.1.2.3", interface="lo"),
        Membership(group="224.0.0.1", interface="lo"),
        Membership(group="224.0.0.1", interface="eth0"),
    ]
    v6 = "1    lo              ff020000000000000000000000000001     1 0000000C 0\n"
    assert multicast.groups_ipv6(v6) == [Membership(group="ff02::1", interface="lo")]


@given(st.binary(max_size=200))
def test_sock_diag_garbage_does_no_harm(data: bytes) -> None:
    from checkpoint.errors import FileCaptureFailed

    try:
        done, found = unixdiag.parse_dump(data)
    except (FileCaptureFailed, struct.error):
        return
    assert isinstance(done, bool)
    assert all(isinstance(entry, unixdiag.UnixSocket) for entry in found)


def test_access_modes() -> None:
    assert abi.AccessMode.of(0o2 | 0o4000) is abi.AccessMode.BOTH
    assert abi.AccessMode.WRITE.writes
    assert not abi.AccessMode.WRITE.reads
    # an image cannot make a file be created or truncated
    import os

    assert not abi.REOPEN_FLAGS & (os.O_CREAT | os.O_TRUNC | os.O_EXCL | os.O_TMPFILE & ~os.O_DIRECTORY)


@pytest.mark.parametrize(
    ("there", "count"),
    [("", 0), ("ab", 2), ("abb", 3), ("xaxbxb", 3), ("axbb", 3), ("b", 0), ("abbb", 3)],
)
def test_datagrams_that_a_release_has_delivered_are_told_from_others(there: str, count: int) -> None:
    """Those of the record come in their order; new ones (x, or the like of an old one) may be between them."""
    through_loopback = [datagram(letter, scope="lo") for letter in there]
    assert delivered([datagram(letter, scope="eth0") for letter in "abb"], through_loopback) == count


def datagram(text: str, scope: str) -> Datagram:
    sender = Endpoint(address="fe80::1", port=53, scope=scope)
    return Datagram(data=text.encode(), sender=sender, to="fe80::2")
