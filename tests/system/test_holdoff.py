"""Holding new connections off leaves the application's listener as it was."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import time

import pytest

from checkpoint.dump import Dump
from checkpoint.errors import BacklogNotDrained
from tcpstate.filters import read_filters


@pytest.fixture
def listening():
    """(pid, our duplicate of its listener) of a child that accepts when it gets SIGUSR1."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        listener.setblocking(False)
        kept: list[socket.socket] = []

        def accept(*_: object) -> None:
            kept.append(listener.accept()[0])

        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                signal.signal(signal.SIGUSR1, accept)
                null = os.open("/dev/null", os.O_RDWR)
                os.dup2(null, 0)
                for fd in range(1, 3):
                    os.dup2(null, fd)
                os.closerange(3, listener.fileno())
                os.closerange(listener.fileno() + 1, 256)
                while True:
                    signal.pause()
            finally:
                os._exit(1)
        time.sleep(0.1)
        # descriptors of ours would count as held outside the tree
        copy = socket.socket(fileno=os.dup(listener.fileno()))
        yield pid, copy
        copy.close()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def flags(sock: socket.socket) -> int:
    return fcntl.fcntl(sock.fileno(), fcntl.F_GETFL)


def test_the_listener_is_as_before(listening):
    pid, listener = listening
    before = flags(listener), read_filters([listener])
    assert before[0] & os.O_NONBLOCK
    dump = Dump([pid])
    assert dump.find_listeners() == {listener.getsockname()[1]}
    dump.hold_off()
    assert flags(listener) == before[0]
    assert read_filters([listener]) != before[1]
    dump.drain()
    dump.resume()
    assert (flags(listener), read_filters([listener])) == before


def test_no_connection_begins_while_they_are_held_off(listening):
    pid, listener = listening
    dump = Dump([pid])
    dump.find_listeners()
    dump.hold_off()
    try:
        with socket.socket() as client:
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.connect(listener.getsockname())
    finally:
        dump.resume()
    with socket.socket() as client:
        client.settimeout(5)
        client.connect(listener.getsockname())


def test_a_connection_that_nobody_accepts_is_named(listening):
    pid, listener = listening
    dump = Dump([pid])
    dump.find_listeners()
    with socket.create_connection(listener.getsockname()):
        dump.hold_off()
        try:
            with pytest.raises(BacklogNotDrained, match="1 connections wait"):
                dump._holdoff.drain(0.05)
            os.kill(pid, signal.SIGUSR1)
            dump.drain()
            assert dump._holdoff.handshakes_ended
        finally:
            dump.resume()
