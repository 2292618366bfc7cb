"""The line on which pages come to processes that run already: from the host where they were, asked for one by one.

It is a remote shell of its own.  `tcpmig receive` there is told Fetch instead of Check, hands the line to who brings
the pages (:mod:`migrate.bringer`), and stays as long as it is used.  From then on there are only, little endian::

    source          target
    GO                                       the line is the bringer's now
            <-      WANT pid origin size     any number of them, before the first is answered
    PAGE pid origin size crc32, bytes        each request, in its order; size as it was asked for
            <-      BEAT                     at times: it is still there
            <-      OVER                     no page is missing any more

When the line is lost the source dials again; what was asked for and did not come is asked for again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from checkpoint.errors import MemoryUnreadable
from checkpoint.image.frames import DATA_MAX
from checkpoint.image.writer import write_all
from checkpoint.memory import pages
from checkpoint.memory.ranges import Range
from checkpoint.memory.vma import PAGE
from checkpoint.tracee import Process
from migrate import holdline, lazystore
from migrate.errors import LinkLost, LinkSilent, PageLineLost, PagesPending, ProtocolError
from migrate.hostfacts import host_facts
from migrate.messages import (
    HIGHEST_VERSION,
    LOWEST_VERSION,
    TOKEN_SIZE,
    Fetch,
    Fetched,
    Hello,
    Keepalive,
    Message,
    PagesThere,
)
from migrate.protocol import SourceMachine
from migrate.summary import SourceOptions
from migrate.transport import DEFAULT_REMOTE_COMMAND, DEFAULT_RSH, Remote
from tcpstate.errors import TcpmigError
from tcpstate.slotted import dataclass

__all__ = ["NOTE", "LeftPages", "PageGiver", "PageLine", "giver_of", "hand_over", "pages_there"]

_log = logging.getLogger(__name__)

#: of the source's journal: pages were left here, and the target may still ask for them
NOTE: Final = "pages"
_GO: Final = b"GO\r\n"
_REQUEST: Final = struct.Struct("<4sIQQ")
_ANSWER: Final = struct.Struct("<4sIQQI")
_WANT, _BEAT, _OVER, _PAGE = b"WANT", b"BEAT", b"OVER", b"PAGE"
#: bytes that are asked for ahead of need before the first of them has come
_WINDOW: Final = 4 << 20
#: seconds: the bringer says that it is there; a line that says nothing for so long is lost
_BEATS: Final = 3.0
_SILENCE: Final = 20.0
#: seconds in which the source dials again before it leaves that to `tcpmig recover`, and between two times
_PATIENCE: Final = 60.0
_PAUSE: Final = 0.5


# --- the target: who brings the pages


class PageLine:
    """A ``pageserver.PageSource`` over such a line; none is there until :meth:`connect`."""

    #: pages take a while
    immediate = False

    def __init__(self) -> None:
        self._read_fd = self._write_fd = -1
        self._usable = False
        self._heard = bytearray()
        self._space = memoryview(bytearray(DATA_MAX))
        self._coming: tuple[int, int, int, int] | None = None
        self._got = 0
        self._came: list[tuple[int, int, memoryview]] = []
        self._flying: dict[int, list[Range]] = {}
        self._ahead = 0
        self._last = self._beat = 0.0
        self._gone: Callable[[int], None] = lambda _: None

    @property
    def usable(self) -> bool:
        """Whether there is a line, and its other end has said so."""
        return self._usable

    def connect(self, read_fd: int, write_fd: int, gone: Callable[[int], None]) -> None:
        """Use this line from now on; the descriptors are ours.

        gone  told of ``read_fd`` before it is closed
        """
        self.close()
        self._gone = gone
        for fd in (read_fd, write_fd):
            os.set_blocking(fd, False)
        self._read_fd, self._write_fd = read_fd, write_fd
        self._last = self._beat = time.monotonic()

    def close(self) -> None:
        """The line is of no use any more."""
        self._usable = False
        if self._read_fd >= 0:
            self._gone(self._read_fd)
        for fd in (self._read_fd, self._write_fd):
            if fd >= 0:
                os.close(fd)
        self._read_fd = self._write_fd = -1
        self._coming, self._got = None, 0
        self._heard.clear()
        self._came.clear()
        self.forget()

    def over(self) -> None:
        """No page is missing any more: say so, and close."""
        if self._usable:
            with contextlib.suppress(OSError):  # it is cut: the source asks, and hears the same
                os.set_blocking(self._write_fd, True)
                os.write(self._write_fd, _REQUEST.pack(_OVER, 0, 0, 0))
        self.close()

    def forget(self) -> None:
        """What was asked for is asked for again, if it is needed."""
        self._flying.clear()
        self._ahead = 0

    @property
    def room(self) -> bool:
        """Whether more may be asked for ahead of need."""
        return self._usable and self._ahead < _WINDOW

    def want(self, pid: int, origin: int, size: int, *, urgent: bool) -> bool:
        """Ask, unless it has been asked for; whether it was. PageLineLost."""
        if not self._usable:
            raise PageLineLost("there is no line to where the processes were")
        flying = self._flying.setdefault(pid, [])
        if not self._ahead:
            self._last = time.monotonic()  # nothing was due before
        if any(start <= origin and origin + size <= end for start, end in flying):
            return False
        self._write(_REQUEST.pack(_WANT, pid, origin, size))
        flying.append((origin, origin + size))
        self._ahead += size
        return True

    def _write(self, data: bytes) -> None:
        try:
            # short enough to be written whole or not at all
            os.write(self._write_fd, data)
        except OSError as error:
            self.close()
            raise PageLineLost(f"the line to where the processes were: {error.strerror}") from error

    def read(self) -> None:
        """Take in what has come. PageLineLost, ProtocolError: the line is closed then."""
        try:
            # what has come is put in its place before more is read: there is one buffer
            while not self._came:
                self._receive()
        except BlockingIOError:
            return
        except OSError as error:
            self.close()
            raise PageLineLost(f"the line to where the processes were: {error.strerror}") from error
        except TcpmigError:
            self.close()
            raise

    def _receive(self) -> None:
        """One read."""
        if self._coming is None:
            wanted = (_ANSWER.size if self._usable else len(_GO)) - len(self._heard)
            data = os.read(self._read_fd, wanted)
            self._heard += data
            self._progress(len(data))
            if len(data) == wanted:
                self._head()
            return
        size = self._coming[2]
        count = os.readv(self._read_fd, [self._space[self._got : size]])
        self._progress(count)
        self._got += count
        if self._got == size:
            self._complete()

    def _progress(self, count: int) -> None:
        if not count:
            raise PageLineLost("the line to where the processes were is closed")
        self._last = time.monotonic()

    def _head(self) -> None:
        head, self._heard = bytes(self._heard), bytearray()
        if not self._usable:
            if head != _GO:
                raise ProtocolError("the line does not begin as one for pages does")
            self._usable = True
            _log.info("the line is there")
            return
        kind, pid, origin, size, checksum = _ANSWER.unpack(head)
        if kind != _PAGE or not 0 < size <= DATA_MAX or (origin | size) % PAGE:
            raise ProtocolError("an answer on the line for pages is none")
        if (origin, origin + size) not in self._flying.get(pid, ()):
            raise ProtocolError(f"pages of process {pid} at {origin:#x} were not asked for")
        self._coming, self._got = (pid, origin, size, checksum), 0

    def _complete(self) -> None:
        if self._coming is None:
            return
        pid, origin, size, checksum = self._coming
        self._coming = None
        self._flying[pid].remove((origin, origin + size))
        self._ahead -= size
        data = self._space[:size]
        if zlib.crc32(data) != checksum:
            raise ProtocolError("pages have a wrong checksum")
        self._came.append((pid, origin, data))

    def ready(self) -> Iterator[tuple[int, int, memoryview]]:
        """What has come."""
        while self._came:
            yield self._came.pop(0)
            if self._read_fd >= 0:
                self.read()

    def look(self) -> None:
        """At times: say that we are there; PageLineLost if there is no line, or nothing has come for too long."""
        now = time.monotonic()
        if self._read_fd < 0:
            raise PageLineLost("there is no line to where the processes were")
        if self._usable and now - self._beat > _BEATS:
            self._beat = now
            self._write(_REQUEST.pack(_BEAT, 0, 0, 0))
        waits = self._ahead > 0 or not self._usable
        if self._read_fd >= 0 and waits and now - self._last > _SILENCE:
            self.close()
            raise PageLineLost("the host where the processes were does not answer")


# --- the target: `tcpmig receive`


def pages_there(lazy: str) -> tuple[PagesThere, socket.socket | None]:
    """Whether somebody here waits for pages of a migration, and the way to him."""
    try:
        sock = holdline.reach(lazystore.socket_path(lazy))
    except OSError:
        known = any(one.lazy == lazy for one in lazystore.survey())
        return (PagesThere.LOST if known else PagesThere.COMPLETE), None
    return PagesThere.WANTED, sock


def hand_over(sock: socket.socket, read_fd: int, write_fd: int) -> None:
    """Give the line away, and wait until it is not used any more."""
    with sock:
        socket.send_fds(sock, [b"line"], [read_fd, write_fd])
        with contextlib.suppress(OSError):  # its end, however it comes
            while sock.recv(1):
                pass


# --- the source


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftPages:
    """The source's note. ``processes``: number in the image to the one here."""

    processes: dict[int, int]


class PageGiver:
    """Answers for processes that stand still. :meth:`connect` first, then :meth:`start`, which works in a thread.

    migration   the ID
    dial        starts a remote shell to the target
    """

    def __init__(self, migration: str, dial: Callable[[], Remote]) -> None:
        self._migration = migration
        self._dial = dial
        self._remote: Remote | None = None
        self._processes: dict[int, Process] = {}
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._failed: TcpmigError | None = None
        self.bytes = 0

    def connect(self) -> bool:
        """Dial; False: no page is missing there (any more). PagesPending if what is missing cannot come any more;
        RemoteStartFailed, LinkLost, ..."""
        self._hang_up()
        self._remote = remote = self._dial()
        machine = SourceMachine(self._migration, bytes(TOKEN_SIZE))
        try:
            ours = Hello(lowest=LOWEST_VERSION, highest=HIGHEST_VERSION, host=host_facts(), program="tcpmig pages")
            with contextlib.suppress(LinkLost):
                # the remote shell has ended already: the next line tells why
                remote.channel.send(machine.send(ours))
            machine.receive(remote.first())
            remote.channel.send(machine.send(Fetch(migration=self._migration)))
            while True:
                message = remote.channel.receive()
                if not isinstance(message, Message):
                    raise ProtocolError("bytes of an image came where a message was due")
                heard = machine.receive(message)
                if isinstance(heard, Fetched):
                    break
                if not isinstance(heard, Keepalive):
                    raise ProtocolError(f"{type(heard).__name__} is no answer")
        except TcpmigError as error:
            raise remote.explain(error) from None
        if heard.there is PagesThere.LOST:
            raise PagesPending("those who bring the pages there were killed", object=remote.host)
        return heard.there is PagesThere.WANTED

    def start(self, processes: Mapping[int, int]) -> None:
        """Answer from now on for these processes, number in the image to ours; they stand still until :meth:`wait`
        returns."""
        self._processes = {number: Process(pid) for number, pid in processes.items()}
        self._thread = threading.Thread(target=self._run, name="pages", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until no page is missing there. PagesPending."""
        if self._thread is not None:
            self._thread.join()
        if self._failed is not None:
            raise self._failed

    def close(self) -> None:
        """Stop answering."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._hang_up()
        while self._processes:
            self._processes.popitem()[1].close()

    def _hang_up(self) -> None:
        remote, self._remote = self._remote, None
        if remote is not None:
            remote.close()

    def _run(self) -> None:
        deadline, seen = time.monotonic() + _PATIENCE, 0
        while not self._stop.is_set():
            try:
                if self._remote is None and not self.connect():
                    return
                if self._serve():
                    return
            except PagesPending as error:
                self._failed = error
                return
            except MemoryUnreadable as error:
                self._failed = PagesPending(f"{error.message} ({error.object})", object=error.object)
                return
            except (TcpmigError, OSError) as error:
                _log.warning("the line for pages: %s", error)
                reason = error
            else:
                continue
            self._hang_up()
            if seen != self.bytes:
                seen, deadline = self.bytes, time.monotonic() + _PATIENCE
            if time.monotonic() > deadline:
                self._failed = PagesPending(f"the line for pages is lost: {reason}")
                return
            self._stop.wait(_PAUSE)

    def _serve(self) -> bool:
        """Answer until all is over (True), or we are told to stop."""
        remote = self._remote
        if remote is None:
            return False
        fd = remote.descriptor
        os.set_blocking(fd, True)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        write_all(fd, [_GO])
        heard = bytearray()
        last = time.monotonic()
        while not self._stop.is_set():
            remote.relay()
            if not poll.poll(100):
                if time.monotonic() - last > _SILENCE:
                    raise LinkSilent(f"nothing was heard for {_SILENCE:g} seconds")
                continue
            data = os.read(fd, 64 * _REQUEST.size)
            if not data:
                raise LinkLost("the other side closed the line for pages")
            last = time.monotonic()
            heard += data
            while len(heard) >= _REQUEST.size:
                kind, pid, origin, size = _REQUEST.unpack_from(heard)
                del heard[: _REQUEST.size]
                if kind == _OVER:
                    return True
                if kind == _WANT:
                    self._answer(fd, pid, origin, size)
                elif kind != _BEAT:
                    raise ProtocolError("a request on the line for pages is none")
        return False

    def _answer(self, fd: int, pid: int, origin: int, size: int) -> None:
        process = self._processes.get(pid)
        if process is None or not 0 < size <= DATA_MAX or (origin | size) % PAGE:
            raise ProtocolError(f"pages of process {pid} at {origin:#x} were never left for later")
        for run in pages.read_runs(process, pid, [(origin, origin + size)]):
            write_all(fd, [_ANSWER.pack(_PAGE, pid, origin, size, zlib.crc32(run.data)), run.data])
        self.bytes += size


def giver_of(migration: str, host: str, options: SourceOptions) -> PageGiver:
    """One with a line, to the target of a migration that is about to begin. RemoteStartFailed, ..."""
    rsh, command = options.rsh or DEFAULT_RSH, options.remote_command or DEFAULT_REMOTE_COMMAND
    giver = PageGiver(migration, lambda: Remote(host, rsh=rsh, remote_command=command))
    try:
        if not giver.connect():
            raise ProtocolError("nobody there expects pages", object=host)
    except BaseException:
        giver.close()
        raise
    return giver
