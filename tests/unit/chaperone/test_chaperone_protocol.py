"""The chaperone's protocol: any pieces, any bytes, and only what belongs together."""

from __future__ import annotations

import contextlib

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpstate import codec
from tcpstate.chaperone.messages import (
    Discard,
    Done,
    Export,
    Exported,
    Failed,
    Freeze,
    Get,
    Hello,
    Items,
    Limits,
    Message,
    Rebuild,
    Release,
    Request,
    Resume,
    Welcome,
    items_of,
    plain_items,
)
from tcpstate.chaperone.protocol import HELLO_MAX, ClientProtocol, Received, ServerProtocol, encode
from tcpstate.errors import BadChaperoneMessage

NUMBERS = st.integers(0, 2**32 - 1)
CONNS = st.text(max_size=200)
MESSAGES = st.one_of(
    st.builds(Hello, versions=st.lists(st.integers(-(2**63), 2**64 - 1)).map(tuple)),
    st.builds(Get, number=NUMBERS, conn=CONNS, keywords=st.lists(st.text(max_size=64), max_size=9).map(tuple)),
    *(st.builds(kind, number=NUMBERS, conn=CONNS) for kind in (Freeze, Resume, Export, Release)),
    st.builds(Discard, number=NUMBERS, conn=CONNS, anyway=st.booleans()),
    st.builds(Rebuild, number=NUMBERS, record=st.binary(max_size=99), elapsed=st.floats(0, 86400)),
    st.builds(Done, number=NUMBERS, conn=CONNS),
    st.builds(Exported, number=NUMBERS, conn=CONNS, record=st.binary(max_size=99)),
    st.builds(Failed, number=NUMBERS, code=st.text(max_size=9), message=st.text(max_size=99)),
    st.builds(Welcome, version=st.just(1), uid=NUMBERS, limits=st.just(Limits())),
    st.builds(Items, number=NUMBERS, items=st.just(items_of({"a": 1, "b": (1, 2), "c": "x", "d": b"y"}))),
)


def server(limits: Limits | None = None, *, greeted: bool = True) -> ServerProtocol:
    protocol = ServerProtocol(1000, limits or Limits())
    if greeted:
        [welcome] = protocol.receive(encode(Hello()))
        assert welcome == Welcome(version=1, uid=1000, limits=limits or Limits())
    return protocol


@given(MESSAGES)
def test_messages_survive_the_wire(message: Message) -> None:
    frame = encode(message)
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    assert codec.unpack(Message, frame[4:]) == message


@given(st.lists(st.integers(1, 40), max_size=60))
def test_requests_arrive_whole_whatever_the_pieces(pieces: list[int]) -> None:
    requests: list[Request] = [Freeze(number=1, conn="a"), Rebuild(number=2, record=b"r" * 99, elapsed=1.0)]
    data = b"".join(map(encode, [Hello(), *requests]))
    protocol, found, at = server(greeted=False), [], 0
    for size in [*pieces, len(data)]:
        found += protocol.receive(data[at : at + size])
        at += size
    assert isinstance(found[0], Welcome)
    assert found[1:] == [Received(request) for request in requests]
    assert not protocol.busy


def test_a_descriptor_belongs_to_the_request_that_passes_a_socket() -> None:
    protocol = server()
    data = encode(Freeze(number=1)) + encode(Export(number=2, conn="tcp:a")) + encode(Resume(number=3))
    # the first piece has the descriptor of the first frame, the last one comes with a later piece
    assert list(protocol.receive(data[:5], [7])) == []
    assert protocol.busy
    assert list(protocol.receive(data[5:], [8])) == [
        Received(Freeze(number=1), 7),
        Received(Export(number=2, conn="tcp:a")),
        Received(Resume(number=3), 8),
    ]
    assert protocol.leftover() == []


@pytest.mark.parametrize(
    ("message", "descriptors", "leftover"),
    [
        (Freeze(number=1), [], []),  # names nothing
        (Freeze(number=1, conn="tcp:a"), [7], [7]),  # a descriptor too many
        (Release(number=1), [7], [7]),
        (Done(number=1, conn=""), [], []),  # an answer
        (Hello(), [], []),  # again
        (Freeze(number=1), list(range(100, 109)), list(range(100, 109))),
    ],
)
def test_what_does_not_belong_ends_the_connection(
    message: Message, descriptors: list[int], leftover: list[int]
) -> None:
    protocol = server()
    with pytest.raises(BadChaperoneMessage):
        list(protocol.receive(encode(message), descriptors))
    assert protocol.leftover() == leftover
    # and nothing more is taken
    assert list(protocol.receive(encode(Freeze(number=2, conn="tcp:a")))) == []


def test_nothing_comes_before_the_greeting() -> None:
    for message in (Freeze(number=1, conn="tcp:a"), Hello(versions=(2, 99))):
        with pytest.raises(BadChaperoneMessage):
            list(server(greeted=False).receive(encode(message)))


def test_a_frame_is_refused_by_its_length_before_it_is_there() -> None:
    limit = 1000
    for protocol, largest in ((server(greeted=False), HELLO_MAX), (server(Limits(frame=limit)), limit)):
        assert list(protocol.receive((largest).to_bytes(4, "big"))) == []
        assert protocol.busy
    for protocol, length in (
        (server(greeted=False), HELLO_MAX + 1),
        (server(Limits(frame=limit)), limit + 1),
        (server(), 0),
        (server(), 2**32 - 1),
    ):
        with pytest.raises(BadChaperoneMessage, match="frame"):
            list(protocol.receive(length.to_bytes(4, "big")))


@pytest.mark.parametrize("elapsed", [-1.0, float("nan"), float("inf"), 86401.0])
def test_no_time_that_cannot_have_passed(elapsed: float) -> None:
    body = msgpack.packb({"kind": "rebuild", "number": 1, "conn": "", "record": b"", "elapsed": elapsed})
    with pytest.raises(BadChaperoneMessage):
        list(server().receive(len(body).to_bytes(4, "big") + body))


@settings(max_examples=300)
@given(st.data())
def test_any_bytes_give_requests_or_the_one_error(data: st.DataObject) -> None:
    frame = bytearray(encode(data.draw(MESSAGES)))
    for _ in range(data.draw(st.integers(0, 4))):
        frame[data.draw(st.integers(4, len(frame) - 1))] = data.draw(st.integers(0, 255))
    for protocol in (server(), server(greeted=False)):
        with contextlib.suppress(BadChaperoneMessage):
            for event in protocol.receive(bytes(frame), [9]):
                assert isinstance(event, Received | Welcome)
    with contextlib.suppress(BadChaperoneMessage):
        ClientProtocol().receive(bytes(frame))


def test_a_client_takes_only_the_answer_to_its_request() -> None:
    client = ClientProtocol()
    assert client.hello() == encode(Hello())
    assert isinstance(client.receive(encode(Welcome(version=1, uid=1, limits=Limits()))), Welcome)
    number = client.next_number()
    assert client.receive(encode(Done(number=number, conn="c"))[:7]) is None
    assert client.receive(encode(Done(number=number, conn="c"))[7:]) == Done(number=number, conn="c")
    assert isinstance(client.receive(encode(Failed(number=0, code="TM-0260", message="m"))), Failed)
    for odd in (Done(number=number + 1, conn="c"), Welcome(version=1, uid=1, limits=Limits()), Hello()):
        with pytest.raises(BadChaperoneMessage):
            client.receive(encode(odd))
    with pytest.raises(BadChaperoneMessage):
        ClientProtocol().receive(encode(Welcome(version=2, uid=1, limits=Limits())))


def test_items_keep_their_types() -> None:
    values = {"number": 5, "numbers": (1, 2), "none": (), "text": "t", "bytes": b"\0"}
    assert plain_items(items_of(values)) == values
