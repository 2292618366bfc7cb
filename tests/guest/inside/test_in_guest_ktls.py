"""Connections whose kernel encrypts them (kTLS) are refused by name, before anything is touched, and go on."""

import socket
import subprocess
import sys

import pytest

from tcpstate.errors import UnsupportedSocket
from tcpstate.kernel.tcp import TCP, Repair
from tcpstate.preflight import refusal
from tests.guest.inside.ktls import pair
from tests.tscnet import wait_until


def test_both_ends_are_refused_and_untouched():
    served, client = pair()
    served.sendall(b"before")
    assert client.recv(100) == b"before"
    for sock in (served, client):
        error = refusal(sock)
        assert isinstance(error, UnsupportedSocket)
        assert "kTLS" in str(error)
        assert sock.getsockopt(socket.IPPROTO_TCP, TCP.REPAIR) == Repair.OFF
    served.sendall(b"after")
    assert client.recv(100) == b"after"


def test_one_that_only_has_the_protocol_and_no_keys_yet_is_refused_too():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        client.setsockopt(socket.IPPROTO_TCP, TCP.ULP, b"tls")
        assert "kTLS" in str(refusal(client))


@pytest.fixture
def program(tmp_path):
    """(pid, file that grows as long as both ends of its encrypted connection work) of a program with nothing odd."""
    beats = tmp_path / "beats"
    beats.touch()
    with beats.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.guest.inside.ktls"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        wait_until(beats.read_bytes, 60)
        yield process.pid, beats
    finally:
        process.kill()
        process.wait()


@pytest.mark.timeout(900)
def test_the_commands_name_it_and_the_program_runs_on(program, tmp_path):
    pid, beats = program
    image = tmp_path / "image"
    for words in (["check", str(pid)], ["checkpoint", str(pid), "-o", str(image)]):
        done = subprocess.run([sys.executable, "-m", "cli.main", *words, "--json"], capture_output=True, text=True)
        assert done.returncode == 3, done.stdout + done.stderr
        assert "kTLS" in done.stdout, done.stdout + done.stderr
        seen = len(beats.read_bytes())
        wait_until(lambda seen=seen: len(beats.read_bytes()) > seen, 30)
    assert set(beats.read_bytes()) == {ord(".")}
    assert not image.exists()
