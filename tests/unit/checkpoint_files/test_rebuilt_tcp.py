"""Which connections of a tree are rebuilt at the target, and on what."""

import dataclasses
import os
import socket
from types import SimpleNamespace

import pytest

from checkpoint.files import rebuilttcp
from checkpoint.files.queues import Queues
from checkpoint.files.rebuilttcp import RebuiltTcp
from checkpoint.files.sockopts import SocketOptions
from checkpoint.files.tcpfile import TcpFile
from tests.unit.checkpoint_files.test_files_queues import connection, file


def one(port):
    made = connection(b"", b"", 0)
    return file(dataclasses.replace(made, conn_id=dataclasses.replace(made.conn_id, peer_port=port)))


ENDED = TcpFile(flags=0, family=2, conn_id="tcp:ended", options=SocketOptions(buffers=one(9).connection.buffers))


@pytest.mark.parametrize(
    ("ahead", "later", "bound"),
    [
        ([one(1), one(2)], [one(3)], 2),
        ([one(1), ENDED], [one(3), one(4)], 1),
        ([ENDED], [one(3)], 0),
        ([], [one(3)], 0),
    ],
    ids=["both", "one has ended", "the only one has ended", "none"],
)
def test_only_what_was_built_before_the_stop_is_bound_already(monkeypatch, ahead, later, bound):
    """Whatever has ended since has no connection to be rebuilt, and the next is not one of them."""
    calls = []
    monkeypatch.setattr(rebuilttcp, "rebuild_connections", lambda records, socks, **how: calls.append((records, how)))
    with socket.socket() as any_socket:
        host = SimpleNamespace(
            blackhole=SimpleNamespace(priorities={2: 5}, remove=lambda: None),
            ahead=SimpleNamespace(dissolve_changed=lambda again, files: list(range(len(ahead)))),
            retold=set(range(len(ahead))),
            files=[*ahead, *later],
            first=len(ahead),
            held={},
            queues=Queues(),
            descriptor=lambda index: os.dup(any_socket.fileno()),
        )
        made = RebuiltTcp(host)
        made.rebuild(0.0)
        ((records, how),) = calls
        assert records == [each.connection for each in host.files if each.connection is not None]
        assert how["bound"] == bound
        for sock in made._socks:
            sock.detach()
