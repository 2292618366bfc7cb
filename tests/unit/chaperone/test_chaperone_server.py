"""The chaperone's sockets: limits, time-outs, and what is left of clients that misbehave. Nothing privileged."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tcpstate.chaperone.messages import Failed, Freeze, Get, Hello, Limits, Welcome
from tcpstate.chaperone.policy import Policy
from tcpstate.chaperone.protocol import ClientProtocol, encode
from tcpstate.chaperone.server import Server, listen
from tcpstate.errors import ChaperoneRuns
from tests.descriptors import open_descriptors

POLICY = Policy(limits=Limits(frame=4096, rate=1.0, burst=5), clients=3, seconds=10.0, idle=100.0)


class NothingHeld:
    """A Holding that has nothing."""

    def __init__(self) -> None:
        self.held: dict[Any, Any] = {}
        self.closed = False

    def drain(self) -> None:
        """Nothing was captured."""

    def close(self) -> None:
        self.closed = True


class Place:
    """A server that runs when it is told, by a clock that goes when it is told."""

    def __init__(self, path: Path) -> None:
        self.path = path / "run/socket"
        self.now = 0.0
        self.holding = NothingHeld()
        self.server = Server(listen(self.path), POLICY, self.holding, lambda: self.now, 0.0)  # type: ignore[arg-type]

    def turns(self, seconds: float = 0.0) -> None:
        """What has come is done, then so many seconds pass."""
        for _ in range(4):
            self.server.turn()
        self.now += seconds + 1.0
        self.server.turn()

    def client(self, *, greet: bool = True) -> Client:
        return Client(self, greet=greet)


class Client:
    def __init__(self, place: Place, *, greet: bool) -> None:
        self.place = place
        self.protocol = ClientProtocol()
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(place.path))
        self.sock.setblocking(False)
        if greet:
            self.sock.sendall(encode(Hello()))
            assert isinstance(self.answer(), Welcome)

    def answer(self) -> Any:
        """The next message, "" at the end, None if there is none."""
        self.place.turns()
        message, data = self.protocol.receive(b""), b""
        while message is None:
            try:
                data = self.sock.recv(1 << 16)
            except BlockingIOError:
                return None
            except ConnectionResetError:
                # the end, before all that we had said was read
                return ""
            if not data:
                return ""
            message = self.protocol.receive(data)
        return message

    def ask(self, conn: str = "nonsense") -> Failed:
        self.sock.sendall(encode(Get(number=self.protocol.next_number(), conn=conn)))
        found = self.answer()
        assert isinstance(found, Failed)
        return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    before = open_descriptors()
    found = Place(tmp_path)
    yield found
    found.server.close()
    assert found.holding.closed
    assert open_descriptors() <= before + 4, "only our clients' own ends are left"


def test_errors_are_told_with_their_code(place: Place) -> None:
    client = place.client()
    assert client.ask().code == "TM-0201"
    assert client.ask().number == 2


def test_who_asks_too_often_is_told_so_and_may_ask_later(place: Place) -> None:
    client = place.client()
    codes = []
    for number in range(1, 9):
        client.protocol._number = number
        client.sock.sendall(encode(Get(number=number, conn="x")))
    for number in range(1, 9):
        client.protocol._number = number
        codes.append(client.answer().code)
    assert codes[:5] == ["TM-0201"] * 5
    assert "TM-0262" in codes[5:]
    place.turns(20)
    assert client.ask().code == "TM-0201"


def test_so_many_clients_of_one_user_and_no_more(place: Place) -> None:
    clients = [place.client() for _ in range(POLICY.clients)]
    surplus = place.client(greet=False)
    surplus.sock.sendall(encode(Hello()))
    assert surplus.answer().code == "TM-0262"
    assert surplus.answer() == ""
    clients[0].sock.close()
    place.turns()
    assert place.client().ask().code == "TM-0201"


@pytest.mark.parametrize("greet", [True, False])
def test_a_frame_that_does_not_become_whole_is_not_waited_for(place: Place, greet: bool) -> None:
    client = place.client(greet=greet)
    whole = place.client()
    for byte in encode(Hello() if not greet else Get(number=1, conn="x"))[:6]:
        client.sock.sendall(bytes([byte]))
        place.turns()
    place.turns(5)
    assert client.answer() == "", "one byte now and then does not help"
    assert whole.ask().code == "TM-0201"


def test_who_says_nothing_for_long_is_let_go(place: Place) -> None:
    client = place.client()
    place.turns(POLICY.idle - 10)
    assert client.ask().code == "TM-0201"
    place.turns(POLICY.idle + 1)
    assert client.answer() == ""


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n\r\n", encode(Failed(number=1, code="", message="")), bytes(4), encode(Freeze(number=1))],
)
def test_what_is_not_the_protocol_gets_one_answer_and_the_end(place: Place, data: bytes) -> None:
    client = place.client()
    client.sock.sendall(data)
    told = client.answer()
    assert (told.number, told.code) == (0, "TM-0260")
    assert client.answer() == ""


@pytest.mark.parametrize("count", [1, 9, 30])
def test_descriptors_that_belong_to_nothing_are_closed(place: Place, count: int) -> None:
    client = place.client()
    before = open_descriptors()
    read, write = os.pipe()
    client.protocol._number = 1
    socket.send_fds(client.sock, [encode(Get(number=1, conn="x"))], [write] * count)
    os.close(write)
    while (told := client.answer()) and told.number:
        assert told.code == "TM-0201"
    assert told.code == "TM-0260"
    assert client.answer() == ""
    assert os.read(read, 1) == b"", "nobody has the other end any more"
    os.close(read)
    assert open_descriptors() == before - 1, "and its connection is closed"


def test_a_client_cannot_write_lines_of_its_own_into_the_log(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        place.client().ask("x\nuid=0 pid=1 release conn=all result=done\x1b[2J")
    [line] = [r.getMessage() for r in caplog.records if r.name == "tcpstate.chaperone.audit"]
    assert line.isprintable()
    assert line.startswith(f"uid={os.getuid()} pid={os.getpid()} get conn=x?uid=0")
    assert "result=TM-0201" in line


def test_a_client_that_does_not_read_is_asked_no_more_and_let_go(place: Place) -> None:
    client = place.client()
    other = place.client()
    request = encode(Get(number=1, conn="x" * 200))
    client.sock.setblocking(False)
    try:
        while True:
            client.sock.send(request * 50)
            place.server.turn()
    except BlockingIOError:
        # it takes nothing more before its answers are taken
        assert other.ask().code in ("TM-0201", "TM-0262")
    place.turns(POLICY.seconds + 1)
    assert len(place.server._sessions) == 1


def test_one_chaperone_at_a_path(place: Place, tmp_path: Path) -> None:
    with pytest.raises(ChaperoneRuns):
        listen(place.path)
    stale = tmp_path / "stale"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(stale))
    dead.close()
    with listen(stale):
        assert stale.stat().st_mode & 0o777 == 0o666
