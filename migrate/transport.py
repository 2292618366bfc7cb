"""The way to the target: the child process of ``--rsh`` at the source, standard input and output at the target.

``--rsh CMD`` runs ``CMD HOST tcpmig receive``, as rsync does.  CMD is split into words as a shell would; the remote
command only at its blanks, so that quotes in it reach the remote shell, to which ssh gives the words joined again.  The
child's standard input and output are one end of a socket pair: between two processes it carries three times what a pipe
does (6 GB/s and 2 GB/s on the development machine), because a pipe is made of single pages.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from migrate.errors import InDoubt, LinkLost, LinkSilent, NotTcpmig, RemoteStartFailed, RshSyntax
from migrate.messages import Message
from migrate.wire import SILENCE, Channel
from tcpstate.errors import TcpmigError

__all__ = ["DEFAULT_REMOTE_COMMAND", "DEFAULT_RSH", "Remote", "remote_words", "standard_channel"]

_log = logging.getLogger(__name__)

DEFAULT_RSH = "ssh"
DEFAULT_REMOTE_COMMAND = "tcpmig receive"
#: seconds until the target's first word: a person may have to type a password
CONNECT_WAIT = 60.0
#: seconds that the child gets to end by itself, and again after SIGTERM
END_WAIT = 3.0
#: seconds that a child whose line broke gets to say why
LAST_WORDS_WAIT = 0.2
#: lines of the child's standard error that an error message shows
LAST_LINES = 4
STDERR_ROOM = 1 << 16


def remote_words(rsh: str, host: str, remote_command: str) -> list[str]:
    """The command line: RshSyntax if a part cannot be split or is empty, or if HOST looks like an option."""
    if not host or host.startswith("-"):
        raise RshSyntax("HOST is empty or looks like an option", object=host)
    try:
        command = shlex.split(rsh)
    except ValueError as error:
        raise RshSyntax(f"--rsh cannot be split: {error}", object=rsh) from None
    remote = remote_command.split()
    if not command or not remote:
        raise RshSyntax("--rsh or --remote-command has no word", object=rsh)
    return [*command, host, *remote]


class Remote:
    """The remote shell and the channel through it. RshSyntax, RemoteStartFailed.

    silence  seconds without progress after which the line counts as dead

    The child ignores SIGINT: a Ctrl-C at the terminal reaches it as well, and would cut the line before the migration
    could be undone in good order.
    """

    def __init__(
        self,
        host: str,
        *,
        rsh: str = DEFAULT_RSH,
        remote_command: str = DEFAULT_REMOTE_COMMAND,
        silence: float = SILENCE,
    ) -> None:
        self.host = host
        words = remote_words(rsh, host, remote_command)
        self._lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self._partial = b""
        ours, theirs = socket.socketpair()
        self._socket = ours
        try:
            with theirs, _interrupts_ignored():
                self._child = subprocess.Popen(
                    words, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.PIPE
                )
        except OSError as error:
            ours.close()
            raise RemoteStartFailed(
                f"{words[0]} cannot be started: {error.strerror}", object=shlex.join(words)
            ) from error
        if self._child.stderr is None:
            raise RuntimeError("Popen made no pipe")
        self._stderr = self._child.stderr.fileno()
        os.set_blocking(self._stderr, False)
        self.channel = Channel(ours.fileno(), ours.fileno(), silence=silence, aside={self._stderr: self._relay})

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process of the remote shell."""
        return self._child.pid

    @property
    def descriptor(self) -> int:
        """Our end of the line, for who uses it beside the channel."""
        return self._socket.fileno()

    def relay(self) -> None:
        """Pass on what the child has written to its standard error."""
        self._relay()

    def first(self, timeout: float = CONNECT_WAIT) -> Message:
        """The target's first message. RemoteStartFailed, with the child's last words, if the line ends before it;
        NotTcpmig, BadFrame."""
        silence, self.channel.silence = self.channel.silence, timeout
        try:
            message = self.channel.receive()
        except LinkLost as error:
            status = self._ended(END_WAIT)
            how = "closed the line" if status is None else _status_text(status)
            raise RemoteStartFailed(f"the remote shell {how}{self.last_words}", object=self.host) from error
        except LinkSilent as error:
            raise RemoteStartFailed(
                f"no answer within {timeout:g} seconds{self.last_words}", object=self.host
            ) from error
        finally:
            self.channel.silence = silence
        if not isinstance(message, Message):
            raise NotTcpmig("the other side does not begin with a message", object=self.host)
        return message

    def explain(self, error: TcpmigError) -> TcpmigError:
        """The same error, with what the remote shell said last, if it was the line that broke."""
        if isinstance(error, LinkLost | LinkSilent | InDoubt):
            self._ended(LAST_WORDS_WAIT)
            error.object = self.host
            error.message += self.last_words
        return error

    @property
    def last_words(self) -> str:
        """The last lines of the child's standard error, to be appended to a message; empty if it said nothing."""
        self._relay()
        lines = [*self._lines] + ([self._partial.decode(errors="replace")] if self._partial else [])
        return f"; it said: {' / '.join(lines)}" if lines else ""

    def close(self) -> None:
        """Close the line and end the child: by end of file, then SIGTERM, then SIGKILL."""
        self.channel.close()
        self._socket.close()
        for end in (None, self._child.terminate, self._child.kill):
            if end is not None:
                end()
            if self._ended(END_WAIT) is not None:
                break
        self._relay()
        if self._child.stderr is not None:
            self._child.stderr.close()

    def _ended(self, wait: float) -> int | None:
        """The child's exit status within ``wait`` seconds, or None. Its standard error is read meanwhile: a child that
        cannot write does not end."""
        deadline = time.monotonic() + wait
        while True:
            status = self._child.poll()
            self._relay()
            left = deadline - time.monotonic()
            if status is not None or left <= 0:
                return status
            # suppressed: the loop looks again
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(min(0.05, left))

    def _relay(self) -> bool:
        """Pass on what the child wrote to its standard error, line by line. False at its end."""
        while True:
            try:
                data = os.read(self._stderr, STDERR_ROOM)
            except BlockingIOError:
                return True
            except OSError:
                # closed by us
                return False
            if not data:
                return False
            *lines, self._partial = (self._partial + data).split(b"\n")
            for line in lines:
                text = line.decode(errors="replace").rstrip()
                if text:
                    self._lines.append(text)
                    _log.info("%s: %s", self.host, text)


def _status_text(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A child started in here ignores SIGINT from its first instruction on (dispositions to ignore survive exec)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def standard_channel(*, silence: float = SILENCE) -> Iterator[Channel]:
    """The target's end: a channel over standard input and output.

    Nothing else gets at them: descriptor 0 becomes /dev/null and descriptor 1 standard error for the time, so that a
    stray print, or a child, does not end up in the protocol. Given back at the end.
    """
    sys.stdout.flush()
    read_fd, write_fd = (os.dup(fd) for fd in (0, 1))
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.dup2(null, 0)
        os.dup2(2, 1)
        channel = Channel(read_fd, write_fd, silence=silence, listens=False)
        try:
            yield channel
        finally:
            channel.close()
    finally:
        sys.stdout.flush()
        os.dup2(read_fd, 0)
        os.dup2(write_fd, 1)
        for fd in (read_fd, write_fd, null):
            os.close(fd)
