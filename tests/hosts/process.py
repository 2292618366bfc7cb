"""A command that runs in a test host, used like subprocess.Popen."""

from __future__ import annotations

import array
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import IO

from tests.hosts import wire

__all__ = ["CommandFailed", "HostProcess", "Stream"]

Stream = int | IO[bytes] | IO[str] | None  # None, PIPE, DEVNULL, STDOUT, a descriptor or a file, as in subprocess


class CommandFailed(AssertionError):
    """A command of a test host ended with another status than 0; the message holds what it printed."""


class HostProcess:
    """One command in a host.

    pid         its PID inside the host
    outer_pid   its PID for the harness (in the machine's PID namespace)
    """

    def __init__(
        self,
        path: str,
        argv: Sequence[object],
        *,
        stdin: Stream = subprocess.DEVNULL,
        stdout: Stream = None,
        stderr: Stream = None,
        cwd: str | os.PathLike[str] = "/",
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.args = [os.fsdecode(a) if isinstance(a, bytes) else str(a) for a in argv]
        self.returncode: int | None = None
        self._fresh: list[int] = []
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        self.stderr: IO[bytes] | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.connect(path)
            zero = self._end(0, stdin)
            one = self._end(1, stdout)
            two = one if stderr == subprocess.STDOUT else self._end(2, stderr)
            request = {
                "argv": self.args,
                "cwd": os.fspath(cwd),
                "env": dict(env or {}),
                "fds": [0, 1, 2, *pass_fds],
            }
            descriptors = array.array("i", [zero, one, two, *pass_fds])
            self._socket.sendmsg(
                [wire.REQUEST + json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
            )
            self.pid, self._pidfd = self._started()
        except BaseException:
            self._socket.close()
            for pipe in (self.stdin, self.stdout, self.stderr):
                if pipe is not None:
                    pipe.close()
            raise
        finally:
            for descriptor in self._fresh:
                os.close(descriptor)
        self.outer_pid = _pid_of(self._pidfd)

    def _end(self, number: int, stream: Stream) -> int:
        """The descriptor that the command gets as `number`; our end of a pipe becomes the attribute of that name."""
        if stream is None:
            return number
        if stream == subprocess.DEVNULL:
            self._fresh.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
            return self._fresh[-1]
        if stream == subprocess.PIPE:
            read, write = os.pipe2(os.O_CLOEXEC)
            theirs, ours = (read, write) if number == 0 else (write, read)
            self._fresh.append(theirs)
            setattr(self, ("stdin", "stdout", "stderr")[number], os.fdopen(ours, "wb" if number == 0 else "rb", 0))
            return theirs
        return stream if isinstance(stream, int) else stream.fileno()

    def _started(self) -> tuple[int, int]:
        answer, descriptors, _, _ = socket.recv_fds(self._socket, wire.MAX_MESSAGE, 1)
        if answer.startswith(wire.FAILED):
            number, _, text = answer[len(wire.FAILED) :].decode().partition(" ")
            raise OSError(int(number), text)
        if not answer.startswith(wire.STARTED):
            raise CommandFailed(f"the host's init ended before it started {self.args}")
        os.set_inheritable(descriptors[0], False)
        return int(answer[len(wire.STARTED) :]), descriptors[0]

    def poll(self) -> int | None:
        """The exit status (below zero: killed by that signal), None while the command runs."""
        return self._status(0)

    def _status(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self._socket.settimeout(timeout)
            try:
                answer = self._socket.recv(wire.MAX_MESSAGE)
            except (BlockingIOError, TimeoutError):
                return None
            except ConnectionResetError:
                answer = b""
            # The init is gone only when the whole host was ended, which kills what runs in it.
            self.returncode = int(answer[len(wire.EXIT) :]) if answer else -signal.SIGKILL
            self._socket.close()
            os.close(self._pidfd)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises subprocess.TimeoutExpired."""
        status = self._status(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal; nothing happens if the command has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, data: bytes | None = None, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Write `data`, read both outputs to their ends, wait. Raises subprocess.TimeoutExpired."""
        end = None if timeout is None else time.monotonic() + timeout
        left = memoryview(data or b"")
        read: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        with selectors.DefaultSelector() as selector:
            if self.stdin is not None:
                os.set_blocking(self.stdin.fileno(), False)
                selector.register(self.stdin, selectors.EVENT_WRITE, "stdin")
            for name in read:
                pipe = getattr(self, name)
                if pipe is not None:
                    selector.register(pipe, selectors.EVENT_READ, name)
            while selector.get_map():
                rest = None if end is None else end - time.monotonic()
                if rest is not None and rest <= 0:
                    raise subprocess.TimeoutExpired(
                        self.args, timeout or 0, bytes(read["stdout"]), bytes(read["stderr"])
                    )
                for key, _ in selector.select(rest):
                    done = True
                    if key.data == "stdin":
                        with contextlib.suppress(BrokenPipeError):
                            left = left[os.write(key.fd, left[: 64 << 10]) :] if left else left
                            done = not left
                    else:
                        piece = os.read(key.fd, 1 << 20)
                        read[key.data] += piece
                        done = not piece
                    if done:
                        selector.unregister(key.fileobj)
                        getattr(self, key.data).close()
        self.wait(None if end is None else max(0.0, end - time.monotonic()) or 0.001)
        return bytes(read["stdout"]), bytes(read["stderr"])

    def close(self) -> None:
        """Kill it if it runs, collect its status, close our pipes."""
        self.kill()
        self.wait(10)
        for pipe in (self.stdin, self.stdout, self.stderr):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> HostProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pid_of(pidfd: int) -> int:
    """The PID behind a pidfd as this process's /proc names it (-1 once it is reaped). Source: Linux fs/pidfs.c."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Pid:"))
