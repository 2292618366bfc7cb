"""A process whose sockets connect, were refused, were reset or have ended moves by tcpmig itself."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

from tcpstate.kernel.bpf import DROP_ALL, attach
from tests.hosts import ThreeHosts, tcpmig
from tests.tscnet import wait_until

PROGRAM = Path(__file__).parent / "programs" / "tcp_states.py"
SO_DETACH_FILTER = 27
SILENT, BLOCKING = 7102, 7103


def deaf(address: str, port: int) -> socket.socket:
    """A listener that hears no SYN."""
    sock = socket.socket()
    sock.bind((address, port))
    sock.listen()
    attach(sock, DROP_ALL)
    return sock


def test_sockets_without_a_living_connection_move(hosts: ThreeHosts, tmp_path: Path) -> None:
    service = hosts.net.service4
    with contextlib.ExitStack() as ends:
        with hosts.client.netns_entered():
            peer = next(a.partition("/")[0] for a in hosts.client.addresses() if "." in a)
            listeners = [ends.enter_context(deaf(peer, port)) for port in (SILENT, BLOCKING)]
            clients = [ends.enter_context(socket.socket()) for _ in range(2)]
        process = ends.enter_context(hosts.source.popen([sys.executable, PROGRAM, service, peer, tmp_path]))
        reset, finished = clients
        for client in clients:
            wait_until(lambda client=client: client.connect_ex((service, 7000)) in (0, errno.EISCONN), 20)
        reset.sendall(b"before the reset")
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert finished.recv(1) == b""
        finished.sendall(b"before the end")
        finished.close()
        reset.close()
        wait_until((tmp_path / "ready").exists, 20)
        summary = tcpmig.migrate(hosts.source, process.pid, hosts.target)
        for listener in listeners:
            listener.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
        (tmp_path / "go").touch()
        accepted = []
        for number, listener in enumerate(listeners):
            listener.settimeout(20)
            accepted.append(ends.enter_context(listener.accept()[0]))
            assert accepted[-1].recv(99) == (b"blocking" if number == 1 else b"hello")
            accepted[-1].sendall(b"answer")
        wait_until((tmp_path / "report").exists, 20)
        report = json.loads((tmp_path / "report").read_text())
        hosts.target.kill(process.pid, 9)
    print(report, summary["stop_ms"])
    assert report == {
        "reset": ["before the reset", errno.ECONNRESET, 0],
        "finished": ["before the end", 0, 0],
        "refused": errno.ECONNREFUSED,
        "silent": 0,
        "answer": "answer",
        "blocking": ["answer"],
        "bound": [service, 7999],
        "backlog": 37,
    }


SERVER = """
import selectors, socket, sys
listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 0)
listener.bind((sys.argv[1], 7300))
listener.listen(23)
ready = selectors.DefaultSelector()
ready.register(listener, selectors.EVENT_READ)
while True:
    for key, _ in ready.select():
        if key.fileobj is listener:
            ready.register(listener.accept()[0], selectors.EVENT_READ)
        elif data := key.fileobj.recv(99):
            key.fileobj.sendall(data)
        else:
            ready.unregister(key.fileobj)
            key.fileobj.close()
"""


def ask(sock: socket.socket, text: bytes) -> bytes:
    sock.settimeout(20)
    sock.sendall(text)
    return sock.recv(99)


def test_a_listener_of_multipath_tcp_and_its_plain_connections_move(hosts: ThreeHosts) -> None:
    """As Go makes them by default. Clients that connect meanwhile are neither refused nor reset."""
    service = hosts.net.service4
    with contextlib.ExitStack() as ends:
        process = ends.enter_context(
            hosts.source.popen([sys.executable, "-c", SERVER, service], stdout=subprocess.DEVNULL)
        )

        def fresh() -> socket.socket:
            with hosts.client.netns_entered():
                return ends.enter_context(socket.socket())

        old = fresh()
        wait_until(lambda: old.connect_ex((service, 7300)) in (0, errno.EISCONN), 20)
        assert ask(old, b"before") == b"before"
        stop = threading.Event()
        failed: list[OSError] = []
        answered = []

        def connect_all_the_time() -> None:
            while not stop.is_set():
                sock = fresh()
                try:
                    sock.settimeout(20)
                    sock.connect((service, 7300))
                    answered.append(ask(sock, b"meanwhile") == b"meanwhile")
                    sock.close()
                except OSError as error:
                    failed.append(error)

        thread = threading.Thread(target=connect_all_the_time)
        thread.start()
        try:
            wait_until(lambda: len(answered) > 3, 20)
            tcpmig.migrate(hosts.source, process.pid, hosts.target)
            assert ask(old, b"after") == b"after"
            seen = len(answered)
            wait_until(lambda: len(answered) > seen + 3, 20)
        finally:
            stop.set()
            thread.join()
        assert failed == []
        assert all(answered)
        # the listener is one of Multipath TCP still
        with hosts.client.netns_entered(), socket.socket(proto=socket.IPPROTO_MPTCP) as real:
            real.connect((service, 7300))
            assert ask(real, b"multipath") == b"multipath"
            # and this connection cannot move: told by name, before anything is touched
            status, answer, _ = tcpmig.tcpmig(hosts.target, "check", process.pid)
            assert status == 3
            assert "Multipath TCP connection" in json.dumps(answer)
            assert ask(real, b"untouched") == b"untouched"
        hosts.target.kill(process.pid, 9)
