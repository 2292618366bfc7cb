"""A Python in a test host that has imported tcpmig and forks for each command, which so begins within milliseconds.

    status, out, err = run(host, "cli.main", "recover")
    status, found, err = tcpmig(host, "recover")        # with --json: the object
    process = popen(host, "cli.main", "receive")        # as Host.popen
    [*RSH, "--warm"]                                    # as the remote shell, once `ready(host)` has been called

It takes the same requests as the host's init, for commands that are ``python -m MODULE ...``.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import weakref
from typing import IO, Any, NoReturn

from tests.hosts.host import Host
from tests.hosts.init import DEFAULT_SIGNALS, Config, Init
from tests.hosts.process import CommandFailed, HostProcess, Stream

__all__ = ["name_of", "popen", "ready", "run", "tcpmig"]

#: what is imported before the first command, with what it imports only when it is needed
MODULES = (
    "cli.main",
    *(f"cli.commands.{name}" for name in ("migrate", "receive", "recover", "checkpoint", "restore", "handover")),
    "tests.workloads.killed_at",
    "tests.workloads.left_behind",
    "psutil",
    "pyroute2",
)

_started: weakref.WeakKeyDictionary[Host, HostProcess] = weakref.WeakKeyDictionary()


def name_of(command: str) -> str:
    """The name (comm) of a process that runs such a command of tcpmig: its command line is the warm Python's."""
    return f"tcpmig {command}"[:15]


def ready(host: Host) -> str:
    """Where it takes requests; it is started if it does not run."""
    path = str(host.directory / f"{host.name}.warm.sock")
    if host not in _started:
        argv = [sys.executable, "-m", __name__, path]
        process = _started[host] = host.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        # it ends with its host
        weakref.finalize(host, process.close)
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise CommandFailed(f"{host.name}: the warm Python ended with {process.wait(5)}")
    return path


def popen(
    host: Host,
    module: str,
    *arguments: object,
    stdin: Stream = subprocess.DEVNULL,
    stdout: Stream = None,
    stderr: Stream = None,
) -> HostProcess:
    """``python -m MODULE ARGUMENTS...`` in a host."""
    argv = [sys.executable, "-m", module, *arguments]
    return HostProcess(ready(host), argv, stdin=stdin, stdout=stdout, stderr=stderr)


def run(host: Host, module: str, *arguments: object) -> tuple[int, str, str]:
    """The same to its end: exit status (-9: SIGKILL), what it printed, its errors."""
    with _stream() as out, _stream() as err:
        with popen(host, module, *arguments, stdout=out, stderr=err) as process:
            status = process.wait()
        return status, _all(out), _all(err)


def tcpmig(host: Host, *arguments: object) -> tuple[int, dict[str, Any], str]:
    """As :func:`tests.hosts.tcpmig.tcpmig`, quickly: exit status, JSON object, its errors."""
    status, out, err = run(host, "cli.main", *arguments, "--json")
    lines = [line for line in out.splitlines() if line.startswith("{")]
    return status, json.loads(lines[-1]) if lines else {}, err


def _stream() -> IO[bytes]:
    return os.fdopen(os.memfd_create("stream"), "w+b", buffering=0)


def _all(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")


class WarmInit(Init):
    """Takes requests as an init does, and forks."""

    def _start(self, argv: list[str], environment: dict[str, str], descriptors: dict[int, int]) -> int:
        if argv[1:2] != ["-m"]:
            raise ValueError(f"not python -m MODULE: {argv}")
        pid = os.fork()
        if pid == 0:
            _be(argv[2:], environment, descriptors)
        return pid


def _be(words: list[str], environment: dict[str, str], descriptors: dict[int, int]) -> NoReturn:
    """The command, in the child."""
    status = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (*DEFAULT_SIGNALS, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        # as an interpreter that has just been started has them
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for to, descriptor in descriptors.items():
            os.dup2(descriptor, to)
        os.closerange(max(descriptors) + 1, 1024)
        # they remember whether their descriptors can seek
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace", buffering=1)
        os.environ.clear()
        os.environ.update(environment)
        command = next((word for word in words if word in COMMANDS), words[0])
        with open("/proc/self/comm", "w") as comm:
            comm.write(name_of(command))
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


COMMANDS = ("migrate", "receive", "recover", "checkpoint", "restore", "handover")


def _serve(path: str) -> NoReturn:
    for module in MODULES:
        importlib.import_module(module)
    # no child shall copy all of it because it looks for garbage
    gc.freeze()
    environment = dict(os.environ)
    # standard input is a pipe that the harness holds
    config = Config(name="", socket=path, lifetime=0, uptime_offset=0, first_pid=0, environment=environment)
    WarmInit(config).serve()


if __name__ == "__main__":
    _serve(sys.argv[1])
