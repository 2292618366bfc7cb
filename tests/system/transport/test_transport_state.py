"""The paper's interface (5.2): state of connections read and written."""

from __future__ import annotations

import random
import re
import threading
from pathlib import Path

import pytest

from tcpstate import frozen, softstate
from tcpstate.errors import (
    BadStateItem,
    KernelFeatureMissing,
    NotFrozen,
    NotSettable,
    StateNotSet,
    UnknownStateKeyword,
)
from tcpstate.kernel.sockets import SO, Ioctl, Level, ioctl_int
from tcpstate.kernel.tcp import TCP
from tcpstate.transport import (
    ALL,
    ALL_HARD,
    ALL_SOFT,
    Datatype,
    Progress,
    StateFlag,
    StateItem,
    transport_freeze,
    transport_progress,
    transport_read_pending,
    transport_resume,
    transport_state_get,
    transport_state_set,
)
from tests.system.transport.ends import end, talk, unread, values
from tests.tscnet import Watcher, receive, wait_until


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
    page = (Path(__file__).resolve().parents[3] / "docs/reference/tcpstate.md").read_text(encoding="utf-8")
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
