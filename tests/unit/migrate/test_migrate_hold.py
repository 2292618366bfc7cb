"""Holds without a host: what a holder keeps of what it captures, the records and lines by which it is spoken to."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
from pathlib import Path

import pytest

from checkpoint import procfs
from checkpoint.files.held import HeldFile, HeldSocket
from migrate import holdstore
from migrate.errors import HoldBusy, HolderFailed, HoldRecordDamaged, HoldUnavailable, NoSuchHold
from migrate.holder import SegmentStore, Shard
from migrate.holdline import Done, End, HoldLine, Kept, Put, Seal, Take, bind, connect, received
from migrate.holdlist import HoldState, describe
from migrate.holdstore import Holder, HoldRecord
from migrate.hostfacts import host_facts
from tcpstate import codec
from tcpstate.connid import ConnId
from tcpstate.segment import Flag, Segment
from tcpstate.uses.hold import ListeningEnd
from tests.descriptors import open_descriptors

HOLD = "0123456789abcdef" * 2
CONNECTION = ConnId.tcp("10.0.0.5", 80, "10.0.0.9", 1234)
FILE = HeldFile(index=3, listener=ListeningEnd("10.0.0.5", 80))


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TCPMIG_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def record(hold: str = HOLD, **changes: object) -> HoldRecord:
    facts = host_facts()
    values = {
        "boot_id": facts.boot_id,
        "network": facts.network,
        "pids": facts.pids,
        "since": 1000.0,
        "timeout": 60.0,
        "image": "/image",
        "roots": (7,),
    }
    return HoldRecord(hold=hold, **{**values, **changes})  # type: ignore[arg-type]


def segment(seq: int, *, flags: int = Flag.ACK, payload: bytes = b"x", port: int = 1234) -> Segment:
    return Segment(
        source="10.0.0.9",
        source_port=port,
        destination="10.0.0.5",
        destination_port=80,
        seq=seq,
        ack=1,
        flags=flags,
        window=10,
        payload=payload,
    )


# --- what arrives meanwhile


def test_only_the_held_connections_segments_are_kept() -> None:
    store = SegmentStore()
    store.connections = {CONNECTION}
    assert store.wanted(segment(1))
    assert store.wanted(segment(1, flags=Flag.RST))
    assert not store.wanted(segment(1, port=1235))
    # who gave up meanwhile would answer the SYN-ACK with a reset
    assert not store.wanted(segment(1, flags=Flag.SYN))


def test_what_is_sent_again_is_kept_once_and_counts_as_new() -> None:
    store = SegmentStore()
    for seq in (1, 2, 1):
        store.add(segment(seq))
    assert [codec.unpack(Segment, packed).seq for packed in store.packed()] == [2, 1]


def test_the_oldest_is_forgotten() -> None:
    store = SegmentStore(room=3000)
    for seq in range(20):
        store.add(segment(seq, payload=bytes(600)))
    assert [codec.unpack(Segment, packed).seq for packed in store.packed()] == [17, 18, 19]


def test_a_holder_hears_a_tool_whatever_the_numbers_of_its_descriptors(tmp_path: Path) -> None:
    """It has thousands of sockets: its own come after them."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with bind(tmp_path / "sock") as low:
        with socket.socket(fileno=fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 1500)) as listener:
            holder = Shard(HOLD, 0, listener, "")
            with connect(tmp_path / "sock"):
                assert holder.wait()


# --- records


def test_a_record_is_found_by_its_beginning() -> None:
    other = record("fedcba9876543210" * 2)
    holdstore.write(record())
    holdstore.write(other)
    assert holdstore.named("0123") == record()
    assert holdstore.named("FEDC") == other
    assert holdstore.holds() == [record(), other]
    for wrong in ("", "7", "../x"):
        with pytest.raises(NoSuchHold):
            holdstore.named(wrong)
    holdstore.forget(other)
    assert holdstore.holds() == [record()]


def test_another_hosts_hold_is_told_apart() -> None:
    holdstore.write(record(boot_id="another boot"))
    assert not holdstore.named(HOLD).here
    assert holdstore.find(HOLD) is None


def test_how_a_hold_is() -> None:
    me = Holder(pid=os.getpid(), start_time=procfs.read_stat(os.getpid()).start_time)
    gone = Holder(pid=os.getpid(), start_time=1)
    for changes, state in (
        ({"complete": True, "holders": (me,)}, HoldState.HELD),
        ({"complete": True, "holders": (me, gone)}, HoldState.PARTIAL),
        ({"complete": True, "holders": (gone,)}, HoldState.DEAD),
        ({"holders": (me,)}, HoldState.UNFINISHED),
        ({"complete": True, "holders": (me,), "boot_id": "another boot"}, HoldState.ELSEWHERE),
        ({"complete": True, "holders": (me,), "network": 1}, HoldState.ELSEWHERE),
    ):
        told = describe(record(**changes), [HOLD])
        assert told.state is state
        assert told.rule == (state is not HoldState.ELSEWHERE)
        assert told.left == 0, "made long ago"


def test_what_is_no_record_is_said(runtime: Path, caplog: pytest.LogCaptureFixture) -> None:
    holdstore.write(record())
    path = runtime / "holds" / f"{HOLD}.hold"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(HoldRecordDamaged):
        holdstore.read(path)
    assert holdstore.holds() == []
    assert "TM-0624" in caplog.text


def test_a_directory_that_others_may_write_into_is_refused(runtime: Path) -> None:
    (runtime / "holds").mkdir(parents=True)
    (runtime / "holds").chmod(0o777)
    with pytest.raises(HoldUnavailable):
        holdstore.directory()


def test_a_hold_is_changed_by_one_at_a_time(runtime: Path) -> None:
    holdstore.write(record())
    with holdstore.locked(HOLD):
        with pytest.raises(HoldBusy), holdstore.locked(HOLD):
            pass
        holdstore.forget(record())
    # the lock of a hold that is no more goes, too
    assert list((runtime / "holds").iterdir()) == []


# --- the line


def line_pair() -> tuple[HoldLine, HoldLine]:
    ours, theirs = socket.socketpair()
    return HoldLine(ours, "holder"), HoldLine(theirs, "tool")


def test_sockets_travel() -> None:
    tool, holder = line_pair()
    with tool, holder, socket.socketpair()[0] as sock:
        tool.put([HeldSocket(FILE, sock)])
        message, descriptors = holder.receive() or pytest.fail("nothing came")
        assert isinstance(message, Put)
        (arrived,) = received(message, descriptors)
        with arrived.sock:
            assert arrived.file == FILE
            assert os.fstat(arrived.sock.fileno()).st_ino == os.fstat(sock.fileno()).st_ino
            assert not os.get_inheritable(arrived.sock.fileno())


def test_many_sockets_take_several_messages() -> None:
    tool, holder = line_pair()
    with tool, holder, socket.socketpair()[0] as sock:
        tool.put([HeldSocket(FILE, sock)] * 450)
        tool.send(Done())
        counts = [
            len(descriptors) for _, descriptors in holder.answers() if not [os.close(fd) for fd in descriptors if 0]
        ]
        assert sum(counts) == 450
        assert max(counts) <= 200


def test_long_messages_arrive_whole() -> None:
    tool, holder = line_pair()
    with tool, holder:
        parts = [bytes([n]) * 200_000 for n in range(3)]
        tool.keep(parts)
        message, _ = holder.receive() or pytest.fail("nothing came")
        assert isinstance(message, Kept)
        assert message.segments == tuple(parts)


def test_descriptors_that_nobody_named_are_closed() -> None:
    tool, holder = line_pair()
    with tool, holder, socket.socketpair()[0] as sock:
        before = open_descriptors()
        tool.send(Seal(timeout=1.0), [sock.fileno()])
        with pytest.raises(HolderFailed):
            holder.expect(Seal)
        tool.send(Put(files=(FILE, FILE)), [sock.fileno()])
        message, descriptors = holder.receive() or pytest.fail("nothing came")
        assert isinstance(message, Put)
        with pytest.raises(HolderFailed):
            received(message, descriptors)
        assert open_descriptors() == before


@pytest.mark.parametrize(
    "sent", [b"\xff\xff\xff\xff", b"\4\0\0\0junk", b"\4\0\0\0ab", b"\1\0", b"\5\0\0\0\x81\xa1k\xc0\0"]
)
def test_what_is_no_message_is_refused(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    with HoldLine(theirs, "tool") as holder:
        ours.sendall(sent)
        ours.close()
        with pytest.raises(HolderFailed):
            holder.receive()


def test_the_end_of_the_line_is_no_message() -> None:
    tool, holder = line_pair()
    tool.close()
    with holder:
        assert holder.receive() is None
    tool, holder = line_pair()
    holder.close()
    with tool, pytest.raises(HolderFailed):
        tool.expect(Done)


def test_a_long_path_is_reached(tmp_path: Path) -> None:
    # sockaddr_un has room for 108 bytes
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    with bind(folder / "x.sock") as listener:
        assert (folder / "x.sock").stat().st_mode & 0o777 == 0o600
        with connect(folder / "x.sock") as tool:
            with HoldLine(listener.accept()[0], "tool") as holder:
                tool.send(Take())
                assert isinstance(holder.expect(Take), Take)
                holder.send(End(reset=False))
                assert tool.expect(End) == End(reset=False)
