"""How many descriptors a rebuild takes: ten thousand connections fit a limit of twenty thousand, held ones too."""

import os
import socket

import pytest

from checkpoint.errors import TooManyDescriptors
from checkpoint.files import rebuild
from checkpoint.files.eventfd import EventFd
from checkpoint.files.held import HeldFile, HeldSocket
from checkpoint.files.peers import StandIn
from checkpoint.files.rebuild import Rebuilder
from checkpoint.files.tcpfile import TcpFile
from checkpoint.files.treefiles import TreeFiles
from tcpstate.freeze import QuietState
from tests.descriptors import open_descriptors

NAME = "tcp:10.0.0.1:80-10.0.0.2:{}"


def tree(files):
    return TreeFiles(files=files, contents=[], tables={})


def test_a_connection_takes_one(monkeypatch):
    counts = []

    def refuse(count):
        counts.append(count)
        raise TooManyDescriptors("none are left")

    monkeypatch.setattr(rebuild, "ensure_descriptors", refuse)
    connections = [TcpFile(flags=2, family=2, conn_id=NAME.format(port)) for port in range(1, 10_001)]
    stand_in = TcpFile(flags=2, family=2, conn_id=NAME.format(1), stand_in=StandIn.CLOSE)
    other = EventFd(flags=2, count=1, semaphore=False)
    for files, expected in ((connections, 10_000), ([stand_in], 2), ([other], 2)):
        with pytest.raises(TooManyDescriptors):
            Rebuilder(tree(files)).rebuild()
        assert counts.pop() == expected


def test_a_held_socket_is_taken_as_it_is():
    sock = socket.socket()
    number = sock.fileno()
    quiet = object.__new__(QuietState)
    held = HeldSocket(HeldFile(index=0, conn_id=NAME.format(1), quiet=quiet), sock)
    rebuilder = Rebuilder(tree([TcpFile(flags=2, family=2, conn_id=NAME.format(1))]), held={0: held})
    before = open_descriptors()
    assert rebuilder.descriptor(0) == number
    assert open_descriptors() == before
    # whoever gave it closes it no more
    sock.close()
    os.fstat(number)
    rebuilder.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
