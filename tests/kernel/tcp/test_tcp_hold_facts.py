"""What holding relies on: a rule of nf_tables in place of sockets, and sockets in repair mode that vanish silently."""

import errno
import socket
import time

import pytest

from tcpstate.connid import ConnId
from tcpstate.freeze import enter_repair, quiet
from tcpstate.kernel.nftables import NfTables
from tcpstate.rows import describe
from tcpstate.uses.hold import DropRule, ListeningEnd, standing
from tests.tscnet import Watcher, pair, silent_net, wait_until

V4, V6 = socket.AF_INET, socket.AF_INET6
HOLD = "00112233445566778899aabbccddeeff"


@pytest.fixture(scope="module")
def hosts():
    with silent_net() as made:
        yield made


@pytest.fixture
def rule(hosts):
    made = DropRule(HOLD)
    with hosts.a:
        made.stand()
    yield made
    with hosts.a:
        made.lift()


@pytest.fixture(params=["IPv4", "IPv6", "mapped"])
def ends(request, hosts):
    family = V6 if request.param == "IPv6" else V4
    made = pair(hosts.a, hosts.c, family, service=False, port=0, mapped=request.param == "mapped")
    yield made
    for sock in made:
        sock.close()


def test_a_table_stands_in_its_own_network_namespace(hosts, rule):
    with hosts.a:
        assert standing() == [HOLD]
        with pytest.raises(OSError, match="exists") as refused:
            rule.stand()
        assert refused.value.errno == errno.EEXIST
    with hosts.c:
        assert standing() == []
    with hosts.a:
        assert rule.lift()
        assert not rule.lift()
        assert standing() == []


def test_a_transaction_is_made_whole_or_not_at_all(hosts):
    with hosts.a, NfTables() as nft:
        messages = [nft.table("tcpmig_hold_x"), *nft.elements("tcpmig_hold_x", "no such set", [b"1234"])]
        with pytest.raises(FileNotFoundError):
            nft.commit(messages)
        assert "tcpmig_hold_x" not in nft.tables()


def test_a_connection_without_its_socket_is_not_reset(hosts, ends, rule):
    """Closed in repair mode it says nothing; what arrives then meets the rule, and no RST is sent."""
    served, client = ends
    with hosts.a, Watcher(hosts.a) as watcher:
        quiet([served])
        enter_repair([served])
        rule.add([ConnId.parse(describe(served))])
        served.close()
        client.send(b"is anybody there?")
        time.sleep(0.5)
        assert watcher.sent() == []
    # and it is the rule that kept it silent
    with hosts.a:
        rule.lift()
    client.settimeout(20)
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_other_connections_of_the_same_listener_go_on(hosts, rule):
    served, client = pair(hosts.a, hosts.c, V4, service=False, port=0)
    with hosts.a:
        held = ConnId.parse(describe(served))
        other = ConnId.tcp(held.local, held.local_port, held.peer, held.peer_port ^ 1)
        rule.add([other], [ListeningEnd(held.local, held.local_port)])
    client.send(b"goes on")
    served.settimeout(5)
    assert served.recv(100) == b"goes on"
    served.close()
    client.close()


@pytest.mark.parametrize("anywhere", [False, True], ids=["address", "anywhere"])
def test_a_syn_to_a_held_port_is_not_answered(hosts, rule, anywhere):
    """Neither accepted nor refused: its sender tries again."""
    address = "0.0.0.0" if anywhere else hosts.a.own(V4)
    with hosts.a:
        rule.add([], [ListeningEnd(address, 7999)])
    with hosts.c:
        sock = socket.socket()
    with sock, Watcher(hosts.a) as watcher:
        sock.setblocking(False)
        assert sock.connect_ex((hosts.a.own(V4), 7999)) == errno.EINPROGRESS
        time.sleep(0.3)
        assert watcher.sent() == []
        with hosts.a:
            rule.lift()
        # the next attempt of its own
        wait_until(lambda: sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED, 5)


def test_elements_end_by_themselves(hosts, rule):
    with hosts.a:
        rule.add([], [ListeningEnd(hosts.a.own(V4), 7999)], timeout=0.2)
    with hosts.c:
        sock = socket.socket()
    with sock:
        sock.settimeout(10)
        # dropped at first, refused when its SYN comes again
        with pytest.raises(ConnectionRefusedError):
            sock.connect((hosts.a.own(V4), 7999))
