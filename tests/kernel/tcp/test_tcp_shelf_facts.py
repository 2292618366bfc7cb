"""Sockets on a shelf outlive who put them there, can be looked at any number of times, and end with its holder."""

import os
import signal
import socket

import pytest

from tcpstate import codec
from tcpstate.shelf import Shelf, Shelved
from tests.tscnet import wait_until

COUNT = 600  # more than the queue of a local datagram socket


@pytest.fixture
def pairs():
    with socket.create_server(("127.0.0.1", 0), backlog=COUNT) as listener:
        ours = [socket.create_connection(listener.getsockname()) for _ in range(COUNT)]
        theirs = [listener.accept()[0] for _ in range(COUNT)]
    yield ours, theirs
    for sock in (*ours, *theirs):
        sock.close()


def cookies(socks):
    return [sock.getsockopt(socket.SOL_SOCKET, 57, 8) for sock in socks]


def test_they_outlive_who_put_them_there(pairs):
    ours, theirs = pairs
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        shelf = Shelf.make(lambda shelved: os.write(tell, codec.pack(shelved)))
        for sock in ours:
            shelf.put(sock)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    expected = cookies(ours)
    for sock in ours:
        sock.close()
    shelved = codec.unpack(Shelved, os.read(told, 4096))
    try:
        with shelved.open() as shelf:
            for _ in range(2):
                found = shelf.sockets()
                assert sorted(cookies(found)) == sorted(expected)
                for sock in found[1:]:
                    sock.close()
        first, *_ = found
        by_port = {sock.getpeername()[1]: sock for sock in theirs}
        first.sendall(b"alive")
        assert by_port[first.getsockname()[1]].recv(10) == b"alive"
        first.close()
    finally:
        shelved.holder.end()
    wait_until(lambda: not shelved.holder.lives)
    # nobody has them open any more
    for sock in theirs:
        sock.settimeout(10)
        assert sock.recv(10) == b""
    assert shelved.open() is None


def test_without_a_note_it_does_not_stay(pairs):
    seen = []

    def refuse(shelved):
        seen.append(shelved)
        raise OSError("no room for a note")

    with pytest.raises(OSError, match="no room"):
        Shelf.make(refuse)
    wait_until(lambda: not seen[0].holder.lives)


def test_an_empty_one(pairs):
    shelf = Shelf.make(lambda _: None)
    assert shelf.sockets() == []
    shelf.end()
    wait_until(lambda: not shelf.shelved.holder.lives)
