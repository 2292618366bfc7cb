"""Forwarding: what is written down and sent of it, and what is refused there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from migrate.errors import ForwardUnavailable
from migrate.forwarding import ForwardNote, SourceForward
from migrate.forwardstore import ForwardRecord
from migrate.messages import ForwardNeed
from tcpstate import codec
from tcpstate.connid import ConnId
from tcpstate.kernel.bpf.handshake import tuple_key
from tcpstate.kernel.bpf.steer import Entry, Role, Seen

RECORD = ForwardRecord(
    forward="00000012345678900000001234567890",
    role=Role.HOME,
    boot_id="boot",
    network=4026531840,
    since=1.0,
    host="there",
    near="10.0.0.1",
    far="10.0.0.2",
    addresses=("10.0.0.100", "fd00::100"),
)


def test_a_note_comes_back_as_it_was() -> None:
    note = ForwardNote(record=RECORD, coming_home=True)
    assert codec.unpack(ForwardNote, codec.pack(note)) == note


@pytest.mark.parametrize(
    "change",
    [{"forward": "../../etc/passwd"}, {"near": "fd00::1"}, {"far": "nowhere"}, {"addresses": ("10.0.0",)}],
)
def test_a_record_that_is_none(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"named by|families|appear to be"):
        replace(RECORD, **change)  # type: ignore[arg-type]


def test_names_that_the_kernel_takes() -> None:
    assert len(RECORD.device) <= 15
    assert RECORD.number == 1, "no network has the number 0"
    assert replace(RECORD, forward="ab" * 16).number == 0xABABAB
    assert 0 < RECORD.table < 1 << 32


@pytest.mark.parametrize("change", [{"home": "x"}, {"away": ""}, {"addresses": ()}, {"addresses": ("eth0",)}])
def test_a_need_that_is_none(change: dict[str, object]) -> None:
    need = ForwardNeed(forward="ab", home="10.0.0.1", away="10.0.0.2", addresses=("10.0.0.100",))
    with pytest.raises(ValueError, match=r"appear to be|no address"):
        replace(need, **change)  # type: ignore[arg-type]


def test_of_nothing_nothing_is_made() -> None:
    nothing = SourceForward()
    nothing.prepare(lambda *_: pytest.fail("nothing is noted"), 3)
    nothing.fill(lambda: pytest.fail("nothing is asked for"))
    nothing.take_over()
    nothing.undo()
    nothing.settle()
    assert (nothing.name, nothing.addresses, nothing.lasts) == ("", (), False)


@pytest.mark.parametrize(("local", "peer"), [("10.0.0.100", "10.0.0.7"), ("fd00::100", "::7")])
def test_a_connection_is_found_again_in_its_key(local: str, peer: str) -> None:
    connection = ConnId(protocol="tcp", local=local, local_port=80, peer=peer, peer_port=40000)
    entry = Entry.unpack(tuple_key(connection), b"\x02\0\0\0" + b"\x03\0\0\0" + bytes(8))
    assert (entry.connection, entry.device, entry.seen) == (connection, 2, Seen.PEER_FIN | Seen.OUR_FIN)


@pytest.mark.parametrize(
    ("seen", "over"),
    [(Seen(0), False), (Seen.PEER_FIN, False), (Seen.OUR_FIN, False), (Seen(3), True), (Seen.RST, True)],
)
def test_when_a_connection_is_over(seen: Seen, over: bool) -> None:
    connection = ConnId(protocol="tcp", local="10.0.0.100", local_port=80, peer="10.0.0.7", peer_port=40000)
    assert Entry(key=b"", connection=connection, device=2, seen=seen, last=0).over is over


def test_an_older_target_is_not_asked() -> None:
    from migrate.forwarding import plan_forward

    with pytest.raises(ForwardUnavailable):
        plan_forward(None, "ab", None, {}, "there", "", frozenset({"probe"}))  # type: ignore[arg-type]
