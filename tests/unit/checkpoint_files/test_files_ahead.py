"""Connections told ahead of the stop: what goes on from them fits, and what is no idle connection is refused."""

import dataclasses
import os
import random

import pytest

from checkpoint.errors import BadFileRecord
from checkpoint.files.abi import LockType, OwnerType
from checkpoint.files.ahead import lasts
from checkpoint.files.aheadbuild import BuiltAhead
from checkpoint.files.aheadopen import OpenedAhead
from checkpoint.files.base import AsyncOwner, FileLock
from checkpoint.files.descriptors import gaps
from checkpoint.files.epoll import EpollWatch
from checkpoint.files.eventfd import EventFd
from checkpoint.files.identity import Evidence
from checkpoint.files.peers import StandIn
from checkpoint.files.plain import Numbers, moved_on
from checkpoint.files.regular import Directory, RegularFile
from checkpoint.files.tcpfile import TcpFile
from checkpoint.files.told import Told, whole
from checkpoint.files.treefiles import AheadEpoll, AheadFiles, AheadPlace, TreeFiles
from tcpstate import codec
from tcpstate.connid import ConnId
from tcpstate.errors import BadRecord
from tcpstate.record import Family
from tcpstate.standing import idle
from tests.unit.checkpoint_files.test_files_queues import connection, file

IDLE = file(connection(b"", b"", 0))
OTHER = EventFd(flags=0, count=0, semaphore=False)
PLAIN = RegularFile(flags=2, pos=3, path="/there/file", size=9, mtime_ns=77, inode=5, volatile=False)


def told(*files, places=None, epolls=()):
    where = places or [AheadPlace(pid=7, fd=fd, cloexec=bool(fd % 2)) for fd in range(10, 10 + len(files))]
    return AheadFiles(files=list(files), places=where, read_at=5, epolls=list(epolls))


def later(**how):
    return TreeFiles(files=[OTHER], contents=[], **{"tables": {7: {3: (2, True)}}, "ahead": 2, **how})


def test_the_files_of_the_stop_go_on_from_those_told_ahead():
    ahead = told(IDLE, IDLE)
    files = whole(later(), ahead)
    assert files.files == [IDLE, IDLE, OTHER]
    assert files.tables == {7: {10: (0, False), 11: (1, True), 3: (2, True)}}
    assert (files.ahead, files.gone) == (0, ())


def test_what_is_gone_has_no_descriptor_any_more():
    files = whole(later(gone=(0,), tables={7: {10: (2, False)}}), told(IDLE, IDLE))
    assert files.tables == {7: {11: (1, True), 10: (2, False)}}


@pytest.mark.parametrize("seed", range(20))
def test_what_the_stop_tells_otherwise_is_never_kept(seed):
    """The tables are those that one would write down descriptor by descriptor, and kept is only what is as it was."""
    chance = random.Random(seed)
    places = [
        AheadPlace(pid=pid, fd=fd, cloexec=chance.random() < 0.5)
        for pid in (7, 8)
        for fd in chance.sample(range(40), 9)
    ]
    gone = chance.sample(range(len(places)), 4)
    now = {pid: {fd: (chance.randrange(len(places) + 1), True) for fd in chance.sample(range(40), 6)} for pid in (6, 7)}
    expected: dict[int, dict[int, tuple[int, bool]]] = {6: {}}
    for index, place in enumerate(places):
        expected.setdefault(place.pid, {})
        if index not in gone:
            expected[place.pid][place.fd] = index, place.cloexec
    for pid, table in now.items():
        expected[pid].update(table)
    tables = Told(told(*[IDLE] * len(places), places=places))
    files = TreeFiles(files=[OTHER], contents=[], tables=now, ahead=len(places), gone=tuple(gone))
    assert tables.go_on(files).tables == expected
    for pid in expected:
        kept = tables.kept(pid)
        for fd, index in kept.items():
            assert (places[index].pid, places[index].fd) == (pid, fd)
            assert expected[pid][fd] == (index, places[index].cloexec)
        others = {p.fd for i, p in enumerate(places) if p.pid == pid and i not in gone} - now.get(pid, {}).keys()
        assert kept.keys() == others


def test_both_travel():
    ahead = told(IDLE)
    assert codec.unpack(AheadFiles, codec.pack(ahead)) == ahead
    assert codec.unpack(TreeFiles, codec.pack(later())) == later()


@pytest.mark.parametrize("ahead", [None, told(IDLE), told(IDLE, IDLE, IDLE)], ids=["none", "less", "more"])
def test_a_table_that_goes_on_from_something_else_is_refused(ahead):
    with pytest.raises(ValueError, match="told ahead"):
        whole(later(), ahead)


@pytest.mark.parametrize(
    "how",
    [
        {"gone": (2,)},
        {"gone": (-1,)},
        {"moved_on": {2: (0, 0, 0)}},
        {"moved_on": {-1: (0, 0, 0)}},
        {"ahead": -1},
        {"tables": {7: {3: (3, True)}}},
        {"tables": {7: {3: (-1, True)}}},
    ],
    ids=str,
)
def test_impossible_tables_are_refused(how):
    with pytest.raises(ValueError, match=r"leads to file|out of range"):
        later(**how)


def test_two_connections_in_one_place_are_refused():
    place = AheadPlace(pid=7, fd=10, cloexec=False)
    with pytest.raises(ValueError, match="one place"):
        told(IDLE, IDLE, places=[place, place])
    good = codec.pack(told(IDLE))
    with pytest.raises(BadRecord):
        codec.unpack(AheadFiles, good[:-1])


@pytest.mark.parametrize(
    "bad",
    [
        OTHER,
        dataclasses.replace(PLAIN, locks=(FileLock(whole=True, type=LockType.READ),)),
        dataclasses.replace(PLAIN, owner=AsyncOwner(type=OwnerType.PROCESS, pid=7, signal=0)),
        TcpFile(family=2, conn_id=IDLE.conn_id, flags=0),
        file(connection(b"unread", b"", 0)),
        file(connection(b"", b"unsent", 0)),
        file(connection(b"", b"", 0), early=3),
        dataclasses.replace(IDLE, family=10),
        dataclasses.replace(IDLE, stand_in=StandIn.CLOSE),
    ],
    ids=["no connection", "locked", "owned", "no record", "unread", "unsent", "a queue apart", "family", "stand-in"],
)
def test_only_idle_connections_and_plain_files_are_built_ahead(bad):
    with pytest.raises(BadFileRecord):
        BuiltAhead(told(bad), {}, str)


def test_plain_files_move_on():
    ahead = told(IDLE, PLAIN)
    files = whole(later(moved_on={1: (4, 10, 78)}), ahead)
    assert files.files[:2] == [IDLE, dataclasses.replace(PLAIN, pos=4, size=10, mtime_ns=78)]
    assert files.moved_on == {}
    assert codec.unpack(TreeFiles, codec.pack(later(moved_on={1: (4, 10, 78)}))).moved_on == {1: (4, 10, 78)}


@pytest.mark.parametrize(("index", "numbers"), [(0, (4, 10, 78)), (1, (-4, 10, 78))], ids=["a connection", "before 0"])
def test_what_cannot_move_on_does_not(index, numbers):
    with pytest.raises(ValueError, match=r"move on|out of range"):
        whole(later(moved_on={index: numbers}), told(IDLE, PLAIN))


def test_the_evidence_is_of_the_content_that_was_seen():
    seen = dataclasses.replace(PLAIN, evidence=Evidence(digest=b"d" * 32))
    assert moved_on(seen, Numbers(7, 9, 77)) == dataclasses.replace(seen, pos=7)
    assert moved_on(seen, Numbers(3, 9, 78)).evidence is None
    directory = Directory(flags=0, path="/there")
    assert moved_on(directory, Numbers(7, 9, 77)) == dataclasses.replace(directory, pos=7)


def test_plain_files_are_opened_and_found(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(b"0123456789")
    files = [dataclasses.replace(PLAIN, path=f"/there/{name}") for name in ("a", "missing", "b")]
    opened = OpenedAhead(files, 5, lambda path: path.replace("/there", str(tmp_path)))
    first, missing, last = opened.fds
    assert missing == -1
    assert os.read(first, 2) == b"34"
    opened.seek(5, 1)
    opened.seek(6, 1)
    assert os.read(first, 2) == b"12"
    assert (opened.lacking({7}), opened.lacking({6})) == ([6], [])
    opened.forget(5)
    opened.close()
    assert opened.fds == [-1, -1, -1]
    for fd in (first, last):
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)


def test_what_is_not_open_is_not_kept():
    """It is opened in the stop, if it is wanted then."""
    tables = Told(told(PLAIN, PLAIN))
    tables.go_on(later(tables={}))
    tables.lack(0)
    assert tables.kept(7) == {11: 1}


def watching(*numbers, pid=7, fd=4, watcher=7):
    watches = tuple(EpollWatch(number=n, pid=watcher, file=n - 10, events=1, data=n) for n in numbers)
    return AheadEpoll(pid=pid, fd=fd, cloexec=True, watches=watches)


def test_epoll_instances_watch_what_is_told():
    ahead = told(IDLE, IDLE, epolls=[watching(10, 11)])
    assert codec.unpack(AheadFiles, codec.pack(ahead)) == ahead


@pytest.mark.parametrize(
    "how",
    [{"fd": 10}, {"pid": 8}, {"watcher": 8}],
    ids=["where a connection is", "another process", "for another process"],
)
def test_epoll_instances_that_watch_something_else_are_refused(how):
    with pytest.raises(ValueError, match=r"one place|not told"):
        told(IDLE, IDLE, epolls=[watching(10, **how)])
    with pytest.raises(ValueError, match="not told"):
        told(IDLE, epolls=[watching(11)])
    with pytest.raises(ValueError, match="twice"):
        watching(10, 10)


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ([], [(0, 9)]),
        ([0], [(1, 9)]),
        ([3, 4], [(0, 3), (5, 9)]),
        (range(9), []),
        ([8], [(0, 8)]),
        ([7, 1, 3], [(0, 1), (2, 3), (4, 7), (8, 9)]),
    ],
    ids=str,
)
def test_the_gaps_between_what_is_kept(kept, expected):
    assert list(gaps(kept, 9)) == expected


QUIET = dict.fromkeys(
    ("urg_data", "packets_out", "retransmits", "probes_out", "backlog", "err", "err_soft", "shutdown", "repair",
     "is_mptcp", "out_of_order", "errors", "filter", "ulp", "md5", "fastopen", "nonagle"), 0,
)  # fmt: skip
REST = QUIET | {
    "write_seq": 9, "snd_una": 9, "snd_nxt": 9, "rcv_nxt": 5, "copied_seq": 5, "snd_wnd": 100, "rcv_wnd": 100,
}  # fmt: skip


def test_a_connection_at_rest_is_idle():
    assert idle(REST)
    assert idle(REST | {"nonagle": 1})


@pytest.mark.parametrize(
    "change",
    [{name: 1} for name in QUIET if name != "nonagle"]
    + [{"nonagle": 2}, {"snd_una": 8}, {"snd_nxt": 8}, {"copied_seq": 4}, {"snd_wnd": 0}, {"rcv_wnd": 0}],
    ids=str,
)
def test_whatever_else_is_not(change):
    assert not idle(REST | change)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"so.keepalive": (1,), "tcp.keepintvl": (75,), "tcp.keepcnt": (9,)}, True),
        ({"so.keepalive": (1,), "tcp.keepintvl": (1,), "tcp.keepcnt": (9,)}, False),
        ({"tcp.keepintvl": (1,)}, True),
    ],
    ids=["none", "long", "short", "off"],
)
def test_keepalive_must_leave_time_to_settle_a_doubt(options, expected):
    record = dataclasses.replace(connection(b"", b"", 0), options=options)
    assert lasts(record) is expected
    v6 = ConnId.tcp("fd00::1", 80, "fd00::2", 5000)
    of_ipv6 = dataclasses.replace(record, conn_id=v6, family=Family.IPV6)
    assert lasts(of_ipv6) is ("so.keepalive" not in options)
