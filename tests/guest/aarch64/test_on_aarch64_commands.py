"""Commands on aarch64: those of connections work; those of processes say what is missing."""

import json
import os
import socket
import subprocess
import sys


def tcpmig(*argv):
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *argv, "--json"], capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_connections_are_listed():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as client, listener.accept()[0]:
            status, told, _ = tcpmig("conns", str(os.getpid()))
            assert status == 0, told
            assert str(client.getsockname()[1]) in json.dumps(told)


def test_a_process_cannot_be_moved_and_the_machine_is_named():
    status, told, _ = tcpmig("check", str(os.getpid()))
    assert (status, told["code"]) == (3, "TM-0103")
    assert "aarch64" in told["message"]
