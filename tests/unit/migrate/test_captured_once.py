"""A SYN that was captured is replayed once: one more, after its connection has come and gone, would draw a reset."""

from types import SimpleNamespace

import pytest

from migrate import incoming, outgoing
from migrate.incoming import IncomingTrees
from migrate.outgoing import OutgoingTrees
from tcpstate import codec
from tcpstate.segment import Flag, Segment


def segment(flags=Flag.SYN, *, seq=1000, port=51514, payload=b""):
    return Segment(
        source="10.0.0.9", source_port=port, destination="10.0.0.5", destination_port=6379, seq=seq, ack=0,
        flags=int(flags), window=3, payload=payload,
    )  # fmt: skip


class Wire:
    """Two captures of one wire; ``arrive`` is called at the end of each look at the first of them."""

    def __init__(self):
        self.seen = []
        self.arrive = lambda: None

    def capture(self, *, syn_only):
        looked = [0]

        def segments(matching=None):
            found, looked[0] = self.seen[looked[0] :], len(self.seen)
            if syn_only:
                self.arrive()
                found = [one for one in found if one.begins]
            return [one for one in found if matching is None or matching(one)]

        return SimpleNamespace(segments=segments)


@pytest.fixture
def wire():
    return Wire()


@pytest.fixture
def trees(wire):
    made = OutgoingTrees([1])
    made._syns, made._segments = wire.capture(syn_only=True), [wire.capture(syn_only=False)]
    return made


def test_a_syn_between_the_looks_at_two_captures_is_told_once(wire, trees):
    wire.arrive = lambda: wire.seen.append(segment())
    told = trees.captured()
    wire.arrive = lambda: None
    told += trees.captured()
    assert told == [segment()]


def test_everything_else_is_told_as_well(wire, trees):
    wire.seen += [segment(), segment(Flag.ACK, payload=b"data"), segment(Flag.SYN | Flag.ACK)]
    assert sorted(trees.captured(), key=str) == sorted(wire.seen, key=str)


def test_without_listeners_syns_are_told_too(wire, trees):
    trees._syns = None
    wire.seen.append(segment())
    assert trees.captured() == [segment()]


@pytest.fixture
def arriving(monkeypatch):
    """(trees, what they were given to replay, connections that are here)."""
    made, given, here = IncomingTrees(), [], set()
    steps = dict.fromkeys(("connect", "tell_windows"), lambda *_: None)
    made._restore = SimpleNamespace(replay=given.extend, **steps)
    monkeypatch.setattr(incoming, "look_up", lambda conn: conn if conn in here else None)
    return made, given, here


def replay(trees, *segments):
    trees.replay([codec.pack(one) for one in segments])


def test_a_syn_that_comes_again_is_not_replayed_again(arriving):
    trees, given, _ = arriving
    replay(trees, segment(), segment())
    replay(trees, segment())
    assert given == [segment()]


def test_other_connections_begin(arriving):
    trees, given, _ = arriving
    replay(trees, segment())
    replay(trees, segment(port=51515), segment(seq=2000))
    assert given == [segment(), segment(port=51515), segment(seq=2000)]


def test_late_segments_of_connections_that_have_ended_are_left_out(arriving):
    trees, given, here = arriving
    data = segment(Flag.ACK, payload=b"data")
    replay(trees, data)
    here.add(data.conn_id)
    replay(trees, data)
    here.clear()
    replay(trees, data)
    assert given == [data, data]


@pytest.fixture
def captures(monkeypatch):
    """(what happened, a stop after which the trees have other ports and addresses of connections)."""
    happened = []

    class Told:
        def __init__(self, *, ports, addresses):
            self.told = sorted(ports), None if addresses is None else sorted(addresses)

        def start(self):
            happened.append(self.told)

    def stopped(used, ports, addresses):
        made = OutgoingTrees([1])
        dump = SimpleNamespace(ports={6379}, connection_addresses=set())

        def stop(moved):
            happened.append("stop")
            dump.ports, dump.connection_addresses = ports, addresses

        dump.stop = stop
        made._dump, made._used = dump, used
        made.stop(["10.0.0.5"])
        return happened

    monkeypatch.setattr(outgoing, "Capture", Told)
    return stopped


def test_the_capture_runs_before_anybody_is_stopped(captures):
    """What a full receive queue has no room for while nobody reads is dropped by the kernel, and by nobody else."""
    happened = captures({"10.0.0.5"}, {6379, 40000}, {"10.0.0.5"})
    assert happened == [([6379], ["10.0.0.5"]), "stop", ([40000], None)]


def test_of_other_addresses_on_the_same_port_nothing_is_captured_until_a_connection_has_one(captures):
    happened = captures({"10.0.0.5"}, {6379}, {"10.0.0.5", "::ffff:10.0.0.6"})
    assert happened == [([6379], ["10.0.0.5"]), "stop", ([6379], ["10.0.0.6"])]


def test_who_listens_on_every_address_is_captured_on_every_address(captures):
    assert captures(None, {6379}, {"10.0.0.5"}) == [([6379], None), "stop"]
