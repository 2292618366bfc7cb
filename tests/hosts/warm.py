"""A Python in a test host that has imported tcpmig and forks for each command: what looks and settles need not wait.

    status, out, err = run(host, "cli.main", "recover")
    status, found, err = tcpmig(host, "recover")        # with --json: the object

The tool whose start, stop or death is tried is started as people start it.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import weakref
from typing import IO, Any, NoReturn

from tests.hosts.host import Host
from tests.hosts.process import CommandFailed, HostProcess

__all__ = ["run", "tcpmig"]

#: what is imported before the first command
MODULES = ("cli.main", "cli.commands.migrate", "cli.commands.recover", "tests.workloads.left_behind")

_started: weakref.WeakKeyDictionary[Host, HostProcess] = weakref.WeakKeyDictionary()


def run(host: Host, module: str, *arguments: object) -> tuple[int, str, str]:
    """``python -m MODULE ARGUMENTS...`` in a host: exit status (-9: SIGKILL), what it printed, its errors."""
    process = _started.get(host)
    if process is None:
        pipe = subprocess.PIPE
        process = _started[host] = host.popen([sys.executable, "-m", __name__], stdin=pipe, stdout=pipe)
        # it ends with its host
        weakref.finalize(host, process.close)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([module, *map(str, arguments)]).encode() + b"\n")
    line = b""
    while not line.endswith(b"\n"):
        piece = process.stdout.read(1 << 16)
        if not piece:
            raise CommandFailed(f"{host.name}: the warm Python ended with {process.wait(5)}")
        line += piece
    status, out, err = json.loads(line)
    return int(status), str(out), str(err)


def tcpmig(host: Host, *arguments: object) -> tuple[int, dict[str, Any], str]:
    """As :func:`tests.hosts.tcpmig.tcpmig`, quickly: exit status, JSON object, its errors."""
    status, out, err = run(host, "cli.main", *arguments, "--json")
    lines = [line for line in out.splitlines() if line.startswith("{")]
    return status, json.loads(lines[-1]) if lines else {}, err


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    for module in MODULES:
        importlib.import_module(module)
    for request in requests:
        module, *arguments = json.loads(request)
        with _stream() as out, _stream() as err:
            pid = os.fork()
            if pid == 0:
                _be(module, arguments, out.fileno(), err.fileno())
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            texts = [_all(stream) for stream in (out, err)]
        answers.write(json.dumps([status, *texts]).encode() + b"\n")
        answers.flush()


def _stream() -> IO[bytes]:
    return os.fdopen(os.memfd_create("stream"), "w+b", buffering=0)


def _all(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")


def _be(module: str, arguments: list[str], out: int, err: int) -> NoReturn:
    """The command, in the child."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for stream, number in ((null, 0), (out, 1), (err, 2)):
        os.dup2(stream, number)
    os.closerange(3, 256)
    sys.argv = [module, *arguments]
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve(os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb"))
