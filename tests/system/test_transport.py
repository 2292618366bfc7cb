"""The paper's interface on connections between hosts: state read and written, frozen, moved, purged."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tcpstate import discard_connection, export_connection, frozen, rebuild_connection, replacement, softstate
from tcpstate.errors import (
    AddressNotMoved,
    AlreadyFrozen,
    BadExtents,
    BadStateItem,
    KernelFeatureMissing,
    NotFrozen,
    NotPermitted,
    NotSettable,
    StateNotSet,
    UnknownHardState,
    UnknownStateKeyword,
    UnsupportedSocket,
)
from tcpstate.kernel import bpf, route
from tcpstate.kernel.bpf import tcpsock
from tcpstate.kernel.sockets import SO, Ioctl, Level, ioctl_int
from tcpstate.kernel.tcp import TCP
from tcpstate.record import ConnectionRecord
from tcpstate.silence import MARK, blackhole
from tcpstate.transport import (
    ALL,
    ALL_HARD,
    ALL_SOFT,
    Datatype,
    Extent,
    Progress,
    StateFlag,
    StateItem,
    settable,
    transport_arrivals,
    transport_bind_tuple,
    transport_buffer_purge,
    transport_freeze,
    transport_progress,
    transport_read_pending,
    transport_restore_pending,
    transport_resume,
    transport_state_get,
    transport_state_set,
)
from tests.tscnet import SERVICE, Watcher, net, pair, wait_until

V4, V6 = socket.AF_INET, socket.AF_INET6
KINDS = {"IPv4": (V4, False), "IPv6": (V6, False), "mapped": (V4, True)}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    before = os.environ.get("TCPMIG_RUNTIME_DIR")
    os.environ["TCPMIG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("run"))
    try:
        with net() as made:
            yield made
    finally:
        if before is None:
            del os.environ["TCPMIG_RUNTIME_DIR"]
        else:
            os.environ["TCPMIG_RUNTIME_DIR"] = before


@pytest.fixture(params=KINDS)
def ends(request, hosts):
    """(our socket on a, the client's on c), and we are on a."""
    family, mapped = KINDS[request.param]
    with connected(hosts, family, mapped) as both:
        yield both


@pytest.fixture
def ends4(hosts):
    with connected(hosts, V4, False) as both:
        yield both


@contextlib.contextmanager
def connected(hosts, family, mapped):
    served, client = pair(hosts.a, hosts.c, family, service=False, port=0, mapped=mapped)
    served.settimeout(5)
    client.settimeout(5)
    with hosts.a:
        try:
            yield served, client
        finally:
            for entry in frozen.frozen():
                frozen.discard(entry.conn_id)
    served.close()
    client.close()


def receive(sock, size):
    got = bytearray()
    while len(got) < size:
        data = sock.recv(1 << 20)
        assert data
        got += data
    return bytes(got)


def values(conn, keywords):
    return {item.keyword: item.value for item in transport_state_get(conn, keywords)}


def unread(sock, count):
    wait_until(lambda: ioctl_int(sock.fileno(), Ioctl.SIOCINQ) == count)


def talk(served, client):
    served.send(b"there")
    assert receive(client, 5) == b"there"
    client.send(b"and back")
    assert receive(served, 8) == b"and back"


# ---- 5.2: reading


def test_a_look_disturbs_nothing(ends):
    served, client = ends
    client.send(b"unread")
    unread(served, 6)
    items = {item.keyword: item for item in transport_state_get(served, ALL)}
    assert (items["state"].value, items["unread"].value) == ("ESTABLISHED", 6)
    assert items["local_port"].value == served.getsockname()[1]
    assert items["peer_port"].value == client.getsockname()[1]
    assert items["srtt"].value > 0
    assert items["cwnd"].value > 0
    assert items["so.keepalive"].value == 0
    assert items["srtt"].flags == StateFlag.SOFT | StateFlag.VARYING | StateFlag.INITIALIZED | (
        items["srtt"].flags & (StateFlag.SETTABLE | StateFlag.PRIVILEGED)
    )
    assert items["snd_wscale"].flags & (StateFlag.HARD | StateFlag.INITIALIZATION | StateFlag.INITIALIZED)
    # a value that takes repair mode has none as long as the connection flows, and the item says so
    assert items["timestamp"].value is None
    assert not items["timestamp"].flags & StateFlag.INITIALIZED
    assert "receive_queue" not in items
    assert receive(served, 6) == b"unread"
    talk(served, client)


def test_wild_cards_divide_the_state(ends4):
    served, _ = ends4
    everything, hard, soft = (
        {item.keyword for item in transport_state_get(served, card)} for card in (ALL, ALL_HARD, ALL_SOFT)
    )
    assert hard | soft == everything
    assert not hard & soft
    assert {"snd_wscale", "state", "tcp.nodelay"} <= hard
    assert {"cwnd", "srtt", "bytes_received", "congestion"} <= soft
    assert len(everything) > 150


def test_a_frozen_connection_tells_its_sequence_numbers(ends):
    served, client = ends
    client.send(b"unread")
    unread(served, 6)
    transport_freeze(served)
    told = values(served, ALL_HARD)
    served.setsockopt(Level.TCP, TCP.REPAIR, 1)
    real = []
    for queue in (2, 1):
        served.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, queue)
        real.append(served.getsockopt(Level.TCP, TCP.QUEUE_SEQ) & 0xFFFFFFFF)
    served.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, 0)
    served.setsockopt(Level.TCP, TCP.REPAIR, -1)
    assert [told["write_seq"], told["rcv_nxt"]] == real
    assert (told["rcv_nxt"] - told["copied_seq"]) & 0xFFFFFFFF == 6
    assert values(served, ["receive_queue"]) == {"receive_queue": b"unread"}
    transport_resume(served)
    assert receive(served, 6) == b"unread"
    talk(served, client)


def test_by_its_name_as_by_its_socket(ends):
    served, client = ends
    name = f"tcp:{end(served.getsockname())}-{end(served.getpeername())}"
    assert values(name, ["peer_port", "state"]) == {"peer_port": client.getsockname()[1], "state": "ESTABLISHED"}
    transport_freeze(name)
    assert transport_progress(served) is Progress.FROZEN
    transport_resume(name)
    assert transport_progress(name) is Progress.IN_PROGRESS
    talk(served, client)


def end(address):
    host = address[0].removeprefix("::ffff:")
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"


def test_what_is_asked_wrongly_is_refused_by_name(ends4):
    served, client = ends4
    with pytest.raises(UnknownStateKeyword) as caught:
        transport_state_get(served, ["cwnd", "nonsense"])
    assert caught.value.object == "nonsense"
    before = values(served, ["tcp.nodelay", "so.keepalive"])
    for wrong, error in (
        (StateItem("bytes_received", Datatype.U64, 1), NotSettable),
        (StateItem("nonsense", Datatype.U64, 1), UnknownStateKeyword),
        (StateItem("rcv_wnd", Datatype.U32, -1), BadStateItem),
        (StateItem("snd_una", Datatype.SEQUENCE, "1"), BadStateItem),
        (StateItem("so.keepalive", Datatype.INT, 1), BadStateItem),
        (StateItem("peer_port", Datatype.U16, 1), NotSettable),
        (StateItem("congestion", Datatype.TEXT, "no such one"), StateNotSet),
    ):
        good = [StateItem("tcp.nodelay", Datatype.INT, 1), StateItem("so.keepalive", Datatype.INT, 1)]
        with pytest.raises(error) as caught:
            transport_state_set(served, [*good, wrong])
        assert caught.value.object in (wrong.keyword, "") or wrong.keyword in str(caught.value)
        assert values(served, ["tcp.nodelay", "so.keepalive"]) == before, "some of the items were set"
    with pytest.raises(NotFrozen):
        transport_read_pending(served)
    talk(served, client)


def test_the_examples_of_the_reference_run(ends):
    served, client = ends
    page = (Path(__file__).resolve().parents[2] / "docs/reference/tcpstate.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    names = {"conn": f"tcp:{end(served.getsockname())}-{end(served.getpeername())}"}

    def run(section):
        for example in re.findall(r"^```python\n(.*?)^```", sections[section], re.MULTILINE | re.DOTALL):
            exec(compile(example, section, "exec"), names)

    run("State")
    assert served.getsockopt(Level.TCP, TCP.NODELAY) == 1
    run("Freezing")
    transport_freeze(served)
    run("Pending data")
    transport_resume(served)
    run("Arrivals")
    talk(served, client)


# ---- 5.2: writing


def test_options_are_set_several_at_once(ends4):
    served, _ = ends4
    wanted = {"tcp.nodelay": 1, "tcp.keepidle": 77, "so.linger": (1, 5), "congestion": "reno", "send_buffer": 200_000}
    transport_state_set(served, [StateItem(k, Datatype.INT, v) for k, v in wanted.items()])
    assert values(served, wanted) == wanted


def test_what_a_freeze_hides_is_set_for_the_time_after(ends4):
    served, client = ends4
    transport_freeze(served)
    transport_state_set(served, [StateItem("so.keepalive", Datatype.INT, 1), StateItem("so.mark", Datatype.U32, 9)])
    assert values(served, ["so.keepalive", "so.mark"]) == {"so.keepalive": 1, "so.mark": 9}
    assert served.getsockopt(Level.SOCKET, SO.KEEPALIVE) == 0, "it would reset the frozen connection"
    transport_resume(served)
    assert served.getsockopt(Level.SOCKET, SO.KEEPALIVE) == 1
    assert served.getsockopt(Level.SOCKET, SO.MARK) == 9
    talk(served, client)


@pytest.mark.parametrize("frozen_before", [False, True])
def test_the_send_sequence_number_is_set_back(ends, frozen_before):
    """Redoable sends (paper, 4.1.3): what was sent is sent again under the same numbers, and the peer sees it once."""
    served, client = ends
    transport_freeze(served)
    before = values(served, ["snd_una", "snd_nxt"])
    transport_resume(served)
    served.send(b"only once")
    assert receive(client, 9) == b"only once"
    wait_until(lambda: ioctl_int(served.fileno(), Ioctl.SIOCOUTQ) == 0)
    if frozen_before:
        transport_freeze(served)
    transport_state_set(served, [StateItem(k, Datatype.SEQUENCE, v) for k, v in before.items()])
    if frozen_before:
        assert values(served, ["snd_una", "snd_nxt"]) == before
        transport_resume(served)
    assert frozen.frozen() == []
    served.send(b"only once")
    served.send(b", and more")
    assert receive(client, 10) == b", and more"
    client.send(b"fine")
    assert receive(served, 4) == b"fine"


@pytest.mark.parametrize("frozen_before", [False, True])
def test_what_a_connection_has_learned_is_set(ends, frozen_before):
    served, client = ends
    # others, bbr for one, have no threshold
    served.setsockopt(Level.TCP, TCP.CONGESTION, b"cubic")
    talk(served, client)
    if frozen_before:
        transport_freeze(served)
    wanted = {"cwnd": 77, "ssthresh": 55}
    learned = [StateItem(k, Datatype.U32, v) for k, v in (wanted | {"srtt": 80_000, "rttvar": 40_000}).items()]
    transport_state_set(served, learned)
    assert values(served, wanted) == wanted
    assert values(served, ["srtt"])["srtt"] == pytest.approx(80_000, rel=0.1)
    assert values(served, ["rto"])["rto"] >= 230_000
    if frozen_before:
        transport_resume(served)
    assert frozen.frozen() == []
    talk(served, client)


def test_learned_state_that_cannot_be_is_refused(ends4, monkeypatch):
    served, client = ends4
    before = values(served, ["cwnd", "ssthresh"])
    for wrong, error in (
        (StateItem("cwnd", Datatype.U32, 0), BadStateItem),
        (StateItem("rto", Datatype.U32, 300_000), NotSettable),
    ):
        with pytest.raises(error):
            transport_state_set(served, [wrong])
    monkeypatch.setattr(softstate, "missing", lambda: KernelFeatureMissing("no BPF here"))
    with pytest.raises(KernelFeatureMissing, match="no BPF here"):
        transport_state_set(served, [StateItem("cwnd", Datatype.U32, 20)])
    assert values(served, ["cwnd", "ssthresh"]) == before
    assert frozen.frozen() == []
    talk(served, client)


def test_windows_are_set_in_place(ends4):
    served, client = ends4
    transport_freeze(served)
    cookie = served.getsockopt(Level.SOCKET, SO.COOKIE, 8)
    transport_state_set(served, [StateItem("snd_wnd", Datatype.U32, 1234)])
    told = values(served, ["snd_wnd", "max_window"])
    assert told["snd_wnd"] == 1234
    assert told["max_window"] >= 1234
    with pytest.raises(StateNotSet):
        transport_state_set(
            served, [StateItem("rcv_wup", Datatype.SEQUENCE, values(served, ["rcv_nxt"])["rcv_nxt"] + 9)]
        )
    assert served.getsockopt(Level.SOCKET, SO.COOKIE, 8) == cookie
    transport_resume(served)
    talk(served, client)


def test_no_segment_draws_a_reset_while_a_connection_is_made_anew(hosts, ends):
    """The peer sends all the time; for a moment no socket has the tuple."""
    served, client = ends
    # what is lost in such a moment is sent again, each time later than before
    served.settimeout(60)
    client.settimeout(60)
    text = random.Random(4).randbytes(3_000_000)
    sender = threading.Thread(target=client.sendall, args=(text,))
    with Watcher(hosts.c, keep=lambda s: s.flags & 4) as watcher:
        sender.start()
        got = receive(served, 100_000)
        for _ in range(3):
            transport_freeze(served)
            told = values(served, ["snd_una"])["snd_una"]
            # another number and back: both are a connection made anew
            for number in ((told + 5) & 0xFFFFFFFF, told):
                transport_state_set(served, [StateItem("snd_una", Datatype.SEQUENCE, number)])
            transport_resume(served)
        got += receive(served, len(text) - len(got))
        sender.join()
        assert watcher.resets() == []
    assert got == text
    talk(served, client)


def test_epoll_and_duplicates_survive_a_connection_made_anew(ends4):
    import select

    served, client = ends4
    other = served.dup()
    with select.epoll() as epoll:
        epoll.register(other, select.EPOLLIN | select.EPOLLET)
        transport_freeze(served)
        told = values(served, ["snd_una"])["snd_una"]
        for number in ((told + 5) & 0xFFFFFFFF, told):
            transport_state_set(served, [StateItem("snd_una", Datatype.SEQUENCE, number)])
        transport_resume(served)
        epoll.poll(0)
        client.send(b"to the duplicate")
        assert epoll.poll(5)
    assert receive(other, 16) == b"to the duplicate"
    assert other.getsockopt(Level.SOCKET, SO.ERROR) == 0
    other.close()


# ---- 5.3


def test_what_arrives_while_frozen_needs_no_retransmission(ends):
    served, client = ends
    transport_freeze(served)
    text = random.Random(1).randbytes(10_000)
    client.sendall(text)
    time.sleep(0.05)
    assert transport_progress(served) is Progress.FROZEN
    assert ioctl_int(served.fileno(), Ioctl.SIOCINQ) == 0
    transport_resume(served)
    # it is there when the resume returns, without the peer's help
    assert ioctl_int(served.fileno(), Ioctl.SIOCINQ) == len(text)
    assert receive(served, len(text)) == text
    talk(served, client)


@pytest.mark.parametrize("with_bpf", [True, False], ids=["BPF", "no BPF"])
@pytest.mark.parametrize("when", ["before", "while frozen"])
def test_what_could_not_leave_goes_out_at_once(ends, when, with_bpf, monkeypatch):
    """The timeout has doubled four times, to more than three seconds, and the last try was just now."""
    if not with_bpf:

        def refuse():
            raise KernelFeatureMissing("no BPF iterator over TCP sockets: not today", object="BPF")

        monkeypatch.setattr(tcpsock, "_reader", refuse)
    served, client = ends
    if when == "before":
        bpf.attach(client, bpf.DROP_ALL)
        served.send(b"into the silence")
    transport_freeze(served)
    if when != "before":
        served.send(b"into the silence")
    else:
        client.setsockopt(Level.SOCKET, SO.DETACH_FILTER, 0)
    wait_until(lambda: values(served, ["backoff"])["backoff"] >= 4, 15)
    transport_resume(served)
    begun = time.monotonic()
    assert receive(client, 16) == b"into the silence"
    assert time.monotonic() - begun < 2, "it waited for its timeout"
    assert served.getsockopt(Level.SOCKET, SO.ERROR) == 0
    talk(served, client)


def test_it_quiesces_while_packets_wait_in_the_host(hosts, ends4):
    served, _ = ends4
    assert transport_progress(served) is Progress.IN_PROGRESS
    hosts.a.sh("tc qdisc add dev eth0 root tbf rate 64kbit burst 1600 latency 60s")
    try:
        served.send(bytes(20_000))
        wait_until(lambda: values(served, ["memory_in_host"])["memory_in_host"] > 0)
        transport_freeze(served)
        assert transport_progress(served) is Progress.QUIESCING
    finally:
        hosts.a.sh("tc qdisc del dev eth0 root")
    # the queue went with its packets
    wait_until(lambda: transport_progress(served) is Progress.FROZEN)


# ---- 5.4


def test_pending_data_is_read_with_its_holes(hosts, ends):
    served, client = ends
    client.send(b"in order")
    unread(served, 8)
    transport_freeze(served)
    assert transport_read_pending(served) == [Extent(0, b"in order")]
    # the next segment is lost on its way, the one behind it is not
    with hosts.c, blackhole():
        client.setsockopt(Level.SOCKET, SO.MARK, MARK)
        client.send(b"lost")
        client.setsockopt(Level.SOCKET, SO.MARK, 0)
        client.send(b"found")
    wait_until(lambda: len(transport_read_pending(served)) == 2)
    extents = transport_read_pending(served)
    assert extents[0] == Extent(0, b"in order")
    assert extents[1] in (Extent(12, b"found"), Extent(8, b"lostfound"))
    transport_resume(served)
    assert receive(served, 17) == b"in orderlostfound"
    talk(served, client)


def test_pending_data_is_restored_with_its_holes(ends):
    served, client = ends
    client.send(b"read already, and put back: ")
    assert receive(served, 28) == b"read already, and put back: "
    client.send(b"unread")
    unread(served, 6)
    transport_freeze(served)
    transport_restore_pending(served, [Extent(0, b"read already, and put back: "), Extent(38, b"the third")])
    assert transport_read_pending(served) == [
        Extent(0, b"read already, and put back: unread"), Extent(38, b"the third")
    ]  # fmt: skip
    for wrong in (
        [Extent(-1, b"x")],
        [Extent(0, b"xx"), Extent(1, b"x")],
        [Extent(3, b"within what is unread")],
        [Extent(1 << 30, b"beyond the window")],
    ):
        with pytest.raises(BadExtents):
            transport_restore_pending(served, wrong)
    transport_resume(served)
    client.send(b"2nd ")
    client.send(b"the third")
    assert receive(served, 47) == b"read already, and put back: unread2nd the third"
    talk(served, client)


def test_a_purge_keeps_what_the_peer_may_lack(hosts, ends):
    served, client = ends
    client.setsockopt(Level.SOCKET, SO.RCVBUF, 4096)
    client.send(b"never read")
    unread(served, 10)
    served.setblocking(False)
    text = random.Random(2).randbytes(400_000)
    total = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            total += served.send(text[total:])
    wait_until(lambda: ioctl_int(served.fileno(), Ioctl.SIOCOUTQNSD) > 0)
    transport_freeze(served)
    done = transport_buffer_purge(served)
    assert done.unread == 10
    assert done.unsent > 0
    assert ioctl_int(served.fileno(), Ioctl.SIOCINQ) == 0
    assert ioctl_int(served.fileno(), Ioctl.SIOCOUTQ) == done.kept
    transport_resume(served)
    served.settimeout(5)
    assert receive(client, total - done.unsent) == text[: total - done.unsent]
    talk(served, client)


# ---- 5.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_moves_by_the_papers_calls_alone(hosts, kind):
    family, mapped = KINDS[kind]
    hosts.a.add(family)
    with hosts.a:
        wait_until(lambda: route.is_local(SERVICE[family]))
    served, client = pair(hosts.a, hosts.c, family, mapped=mapped)
    client.settimeout(5)
    client.send(b"not read yet")
    unread(served, 12)
    served.setsockopt(Level.TCP, TCP.NODELAY, 1)
    with hosts.a:
        transport_freeze(served)
        items = transport_state_get(served, ALL_HARD)
        extents = transport_read_pending(served)
        name = frozen.frozen()[0].conn_id
    # the socket of the target is of the same kind
    made = hosts.b.socket(served.family, socket.SOCK_STREAM)
    with Watcher(hosts.c, keep=lambda s: s.flags & 4) as watcher:
        with hosts.b:
            transport_bind_tuple(made.fileno(), name)
            transport_state_set(made, settable(items))
            transport_restore_pending(made, extents)
            told = {item.keyword: item.value for item in items}
            moved = values(made, ["snd_una", "rcv_nxt", "snd_wscale", "timestamps", "tcp.nodelay"])
            assert moved == {keyword: told[keyword] for keyword in moved}
            with pytest.raises(AddressNotMoved):
                transport_resume(made)
        hosts.a.remove(family)
        hosts.b.add(family)
        with hosts.a:
            frozen.discard(name)
        with hosts.b:
            wait_until(lambda: route.is_local(SERVICE[family]))
            transport_resume(made)
        made.settimeout(5)
        assert receive(made, 12) == b"not read yet"
        talk(made, client)
        assert watcher.resets() == []
    assert made.getsockopt(Level.TCP, TCP.NODELAY) == 1
    hosts.b.remove(family)
    for sock in (made, served, client):
        sock.setsockopt(Level.TCP, TCP.REPAIR, 1)
        sock.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_moves_by_its_record(hosts, kind):
    family, mapped = KINDS[kind]
    hosts.a.add(family)
    with hosts.a:
        wait_until(lambda: route.is_local(SERVICE[family]))
    served, client = pair(hosts.a, hosts.c, family, mapped=mapped)
    client.settimeout(5)
    client.send(b"abc")
    client.send(b"U", socket.MSG_OOB)
    client.send(b"def")
    served.send(b"on its way")
    assert receive(client, 10) == b"on its way"
    with hosts.a:
        with pytest.raises(NotFrozen):
            export_connection(served)
        name = transport_freeze(served).conn_id
        record = export_connection(str(name))
    exported = time.monotonic()
    assert (record.receive_queue, record.urgent_in) == (b"abcUdef", 3)
    with Watcher(hosts.c, keep=lambda s: s.flags & 4) as watcher:
        with hosts.b:
            strange = dataclasses.replace(record, required=("urgent_in", "warp"))
            with pytest.raises(UnknownHardState, match="warp"):
                rebuild_connection(ConnectionRecord.from_bytes(strange.to_bytes()))
            assert frozen.frozen() == [], "something is left of it"
            made = rebuild_connection(
                ConnectionRecord.from_bytes(record.to_bytes()), elapsed=time.monotonic() - exported
            )
            assert transport_progress(made) is Progress.FROZEN
            with pytest.raises(AlreadyFrozen):
                rebuild_connection(record)
        hosts.a.remove(family)
        hosts.b.add(family)
        with hosts.a:
            discard_connection(name)
        with hosts.b:
            wait_until(lambda: route.is_local(SERVICE[family]))
            transport_resume(made)
        made.settimeout(5)
        assert made.recv(1, socket.MSG_OOB) == b"U"
        assert receive(made, 6) == b"abcdef"
        talk(made, client)
        assert watcher.resets() == []
    hosts.b.remove(family)
    for sock in (made, served, client):
        sock.setsockopt(Level.TCP, TCP.REPAIR, 1)
        sock.close()


def test_a_program_killed_while_it_makes_a_connection_anew_loses_nothing(ends, monkeypatch):
    """Dissolved and not rebuilt: what lies on disk makes it anew."""
    served, client = ends
    client.send(b"unread")
    unread(served, 6)
    entry = transport_freeze(served)

    class Killed(BaseException):
        pass

    def dies(*_):
        raise Killed

    monkeypatch.setattr(replacement, "_bind", dies)
    with pytest.raises(Killed):
        transport_state_set(served, [StateItem("snd_una", Datatype.SEQUENCE, 5)])
    monkeypatch.undo()
    with pytest.raises(OSError, match="not connected"):
        served.getpeername()
    assert frozen.entry_of(entry.conn_id).undo
    transport_resume(entry.conn_id)
    assert receive(served, 6) == b"unread"
    talk(served, client)


def test_a_step_that_the_kernel_refuses_leaves_the_connection_as_it_was(ends, monkeypatch):
    served, client = ends
    transport_freeze(served)
    before = values(served, ["snd_una", "rcv_nxt"])
    real, calls = replacement.rebuild_connections, []

    def refuses(*args, **how):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(22, "Invalid argument")
        return real(*args, **how)

    monkeypatch.setattr(replacement, "rebuild_connections", refuses)
    with pytest.raises(StateNotSet):
        transport_state_set(served, [StateItem("snd_una", Datatype.SEQUENCE, 5)])
    assert values(served, ["snd_una", "rcv_nxt"]) == before
    transport_resume(served)
    talk(served, client)


def test_a_used_socket_takes_no_tuple(hosts, ends4):
    served, _ = ends4
    with pytest.raises(UnsupportedSocket):
        transport_bind_tuple(served, "tcp:10.9.9.9:1-10.9.9.8:2")
    with socket.socket(V4, socket.SOCK_STREAM) as fresh, pytest.raises(UnsupportedSocket):
        transport_bind_tuple(fresh, "tcp:[fd00::1]:1-[fd00::2]:2")


OWNER = """
import socket, sys
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
print("accepted", flush=True)
while data := connection.recv(65536):
    connection.sendall(data)
"""


@pytest.fixture
def owned(hosts):
    """(process, name of its connection, the client's socket): an echo server of another process."""
    address = hosts.a.own(V4)
    with hosts.a:
        process = subprocess.Popen([sys.executable, "-IS", "-c", OWNER, address], stdout=subprocess.PIPE)
        port = int(process.stdout.readline())
        client = hosts.c.socket(V4, socket.SOCK_STREAM)
        client.settimeout(5)
        client.connect((address, port))
        process.stdout.readline()
        yield process, f"tcp:{address}:{port}-{end(client.getsockname())}", client
        for entry in frozen.frozen():
            frozen.discard(entry.conn_id)
        process.kill()
        process.communicate()
        client.close()


def echo(client, data):
    client.sendall(data)
    return client.recv(len(data), socket.MSG_WAITALL)


def test_the_owner_never_notices(owned):
    """It waits in recv() all the time; the connection is made anew under it."""
    process, name, client = owned
    assert echo(client, b"one") == b"one"
    transport_freeze(name)
    told = values(name, ["snd_una"])["snd_una"]
    for number in ((told + 5) & 0xFFFFFFFF, told):
        transport_state_set(name, [StateItem("snd_una", Datatype.SEQUENCE, number)])
    transport_resume(name)
    assert echo(client, b"two") == b"two"
    assert process.poll() is None


def test_everything_works_on_a_dead_processs_connection(owned):
    process, name, client = owned
    client.sendall(b"nobody reads this")
    assert client.recv(17, socket.MSG_WAITALL) == b"nobody reads this"
    transport_freeze(name)
    process.send_signal(signal.SIGKILL)
    process.wait()
    client.sendall(b"late")
    wait_until(lambda: transport_read_pending(name) == [Extent(0, b"late")])
    assert values(name, ["state", "peer_port"])["state"] == "ESTABLISHED"
    assert transport_progress(name) is Progress.FROZEN
    transport_state_set(name, [StateItem("tcp.nodelay", Datatype.INT, 1)])
    transport_restore_pending(name, [Extent(0, b"put back: ")])
    assert transport_read_pending(name)[0].data == b"put back: "
    assert transport_buffer_purge(name).unread == 10
    # cleaning up: nobody owns it, so that it ends as its owner's death would have ended it
    transport_resume(name)
    with pytest.raises(ConnectionResetError):
        client.recv(100)


def test_a_connection_of_another_user_is_denied(owned, hosts):
    _, name, client = owned
    calls = [
        lambda: transport_state_get(name, ["state"]),
        lambda: transport_state_set(name, [StateItem("tcp.nodelay", Datatype.INT, 1)]),
        lambda: transport_freeze(name),
        lambda: transport_arrivals(name),
    ]
    assert as_nobody(calls) == [NotPermitted.code] * len(calls)
    assert values(name, ["tcp.nodelay"]) == {"tcp.nodelay": 0}
    assert echo(client, b"untouched") == b"untouched"


def as_nobody(calls):
    """What each call ends with in a process of user 65534: an error's code, or its word."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            for call in calls:
                try:
                    call()
                    told = "allowed"
                except Exception as error:
                    told = getattr(error, "code", repr(error))
                os.write(writing, f"{told}\n".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        found = told.read().splitlines()
    os.waitpid(child, 0)
    return found


# ---- 5.5


def test_arrivals_are_noted_with_time_and_length(ends):
    served, client = ends
    with transport_arrivals(served, capacity=4) as ring:
        begun = time.time_ns()
        for size in (10, 20, 30, 40, 50):
            client.send(bytes(size))
            assert receive(served, size)
            time.sleep(0.005)
        wait_until(lambda: [a.data for a in ring.read() if a.data][-1:] == [50])
        noted = [a for a in ring.read() if a.data]
        assert len(ring.read()) == 4, "the ring keeps the latest"
        assert ring.lost == 0
    assert [a.data for a in noted] == [20, 30, 40, 50][-len(noted) :]
    gaps = [b.time - a.time for a, b in itertools.pairwise(noted)]
    assert all(begun <= a.time <= time.time_ns() for a in noted)
    assert min(gaps) >= 5_000_000
    assert all(a.length - a.data in range(40, 120) for a in noted)
    client.send(b"after the end")
    receive(served, 13)
    assert [a for a in ring.read() if a.data] == noted
