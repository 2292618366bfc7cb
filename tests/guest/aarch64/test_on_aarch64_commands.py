"""Commands on aarch64: those of connections; whether a process can be moved."""

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


def test_nothing_is_seen_that_a_process_could_not_be_moved_for():
    nothing = subprocess.DEVNULL
    argv = [sys.executable, "-c", "import time; time.sleep(1000)"]
    with subprocess.Popen(argv, stdin=nothing, stdout=nothing, stderr=nothing) as process:
        try:
            status, told, _ = tcpmig("check", str(process.pid))
        finally:
            process.kill()
    assert status == 0, told
    assert {verdict["status"] for verdict in told["verdicts"]} <= {"ok", "warn"}
