"""What cannot move is refused by name, from what the kernel tells of the socket; here a kernel that tells all of it."""

import errno
import socket

import pytest

from tcpstate import preflight
from tcpstate.errors import RepairNotPermitted, UnsupportedSocket, UnsupportedState
from tcpstate.kernel.sockets import Level
from tcpstate.kernel.tcp import TCP, TcpState


class Told:
    """A socket of which only the options are known that a test gives it."""

    family = socket.AF_INET

    def __init__(self, state=TcpState.ESTABLISHED, **options):
        self.options = {TCP.INFO: bytes([state]) + bytes(279)}
        self.options |= {TCP[name]: value for name, value in options.items()}
        self.asked = []

    def getsockopt(self, level, option, size=None):
        self.asked.append((level, option))
        if level == Level.TCP and option in self.options:
            return self.options[option]
        raise OSError(errno.ENOPROTOOPT, "not here")

    def getsockname(self):
        return "10.0.0.5", 80

    def fileno(self):
        return -1


@pytest.fixture(autouse=True)
def permitted(monkeypatch):
    monkeypatch.setattr(preflight, "repair_permitted", lambda: True)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"ULP": b"tls\0"}, "kTLS"),
        ({"ULP": b"smc"}, "smc"),
        ({"AO_INFO": b"\1"}, "TCP-AO"),
        ({"IS_MPTCP": 1}, "Multipath"),
    ],
)
def test_what_the_kernel_does_not_give_out_is_refused_by_name(monkeypatch, options, word):
    monkeypatch.setattr(preflight, "peer_name", lambda sock: b"")
    problem = preflight.refusal(Told(**options))
    assert isinstance(problem, UnsupportedSocket)
    assert word in problem.message


def test_states_without_an_owner_are_refused_by_name():
    problem = preflight.refusal(Told(TcpState.TIME_WAIT))
    assert isinstance(problem, UnsupportedState)
    assert "TIME_WAIT" in problem.message


def test_who_may_not_repair_is_told_before_anything_else(monkeypatch):
    monkeypatch.setattr(preflight, "repair_permitted", lambda: False)
    sock = Told()
    assert isinstance(preflight.refusal(sock), RepairNotPermitted)
    assert {option for level, option in sock.asked if level == Level.TCP} == set()
