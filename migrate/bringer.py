"""Who brings the pages of processes that run already: two processes of ours, one at work and one that stands by.

::

    tool                                worker                      guard
    fork, early: nothing is open yet    (pages of a line: listens)
    begin: memories, where pages are ->  serves them
           "seal"                    ->  forks                   -> waits for the worker's end
    seal: hears that both are there
    (ends)                               all pages are there: DONE, ends   ends

Until it is sealed the worker ends with the tool, and the processes do too.  From then on it outlives the tool.  When
one of the two dies the other makes a new one: both have the descriptors by which pages are brought, so that whoever
waits for a page goes on waiting, and both have the log of what the application changed
(:mod:`checkpoint.memory.pagelog`).  Only if both are killed at once the kernel lets the processes go on with pages of
zeros.

It is a fork and not a program of its own because the processes are to run at once: a Python takes longer to start than
all the rest.
"""

from __future__ import annotations

import array
import contextlib
import gc
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from typing import Final

from checkpoint.image.lazypages import FileIndex, ImagePages
from checkpoint.latermemory import Armed
from checkpoint.memory.lazy import LazySpace
from checkpoint.memory.missing import Missing
from checkpoint.memory.pagelog import PageLog, State
from checkpoint.memory.ranges import Range
from checkpoint.pageserver import PageServer, PageSource
from migrate import holdline, lazystore, outlive
from migrate.errors import PageBringerFailed
from migrate.pageline import PageLine
from tcpstate import codec
from tcpstate.errors import TcpmigError
from tcpstate.slotted import dataclass

__all__ = ["Bringer"]

_log = logging.getLogger(__name__)

#: descriptors in one message; the kernel takes 253 (SCM_MAX_FD)
_AT_ONCE: Final = 200
_LISTENS, _BEGIN, _SEAL, _DESCRIPTORS = b"listens", b"begin", b"seal", b"descriptors"
_LONGEST: Final = 64
#: seconds after which the tool gives the worker up
_ANSWER: Final = 30.0
#: seconds before somebody takes over: whatever killed the other may hit this one as well
_PAUSE: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class _Memory:
    """One that waits: its number in the image, and what is missing, start and end (u64 each) by address."""

    pid: int
    missing: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What has to be done; the descriptors are, in this order: the image's, if pages come from one, and a userfaultfd
    and a pagemap of each memory."""

    source: str
    from_file: bool
    processes: tuple[int, ...]
    memories: tuple[_Memory, ...]
    index: FileIndex


class _TakeOver(Exception):
    """The guard becomes the worker."""


class _Abandoned(Exception):
    """The tool ended before it sealed."""


class _Finished(BaseException):
    """Nothing is left for the guard to do."""


class Bringer:
    """The tool's end: a ``checkpoint.latermemory.PageBringer``.

    Made before anything is opened that the worker must not have. PageBringerFailed.

    lazy    the ID
    source  where the pages are, for people: a path of an image (then :meth:`reads` comes before :meth:`begin`), or a
            host
    line    they come over a line that will be handed over (:mod:`migrate.pageline`)
    """

    def __init__(self, lazy: str, source: str, *, line: bool = False) -> None:
        self.lazy = lazy
        self._source = source
        self._begun = False
        self._image = -1
        try:
            self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            pid = os.fork()
        except OSError as error:
            raise PageBringerFailed(f"it cannot be started: {error.strerror}") from error
        if not pid:
            _become_worker(theirs, lazy, line=line)
        theirs.close()
        self._sock.settimeout(_ANSWER)
        if line:
            self._hear(_LISTENS)

    def reads(self, descriptor: int) -> None:
        """The open image; the caller's."""
        self._image = descriptor

    def begin(self, armed: Sequence[Armed], index: FileIndex) -> None:
        """The worker brings pages from now on; whether it does is heard in :meth:`seal`.

        Who needs a page earlier waits for it. PageBringerFailed.
        """
        memories = tuple(
            _Memory(pid=one.pid, missing=array.array("Q", [x for r in one.missing for x in r]).tobytes())
            for one in armed
        )
        image = [] if self._image < 0 else [self._image]
        work = _Work(
            source=self._source,
            from_file=bool(image),
            processes=tuple(one.here for one in armed),
            memories=memories,
            index=index,
        )
        told = os.memfd_create("tcpmig-lazy", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(told), "wb") as file:
                file.write(codec.pack(work))
            descriptors = [told, *image, *(fd for one in armed for fd in (one.fd, one.pagemap))]
            try:
                for start in range(0, len(descriptors), _AT_ONCE):
                    socket.send_fds(self._sock, [_DESCRIPTORS], descriptors[start : start + _AT_ONCE])
            except OSError as error:
                raise PageBringerFailed(f"it does not listen: {error}") from error
        finally:
            os.close(told)
        self._say(_BEGIN)
        # a guard takes milliseconds; until the processes survive us they and what waits for them end with us anyway
        self._say(_SEAL)
        self._begun = True

    def seal(self) -> None:
        """The worker outlives us from now on, and pages are brought until none is missing. PageBringerFailed."""
        if self._begun:
            self._hear(_BEGIN)
            self._hear(_SEAL)

    def _say(self, what: bytes) -> None:
        try:
            self._sock.send(what)
        except OSError as error:
            raise PageBringerFailed(f"it does not listen: {error}") from error

    def _hear(self, what: bytes) -> None:
        try:
            answer = self._sock.recv(_LONGEST)
        except OSError as error:
            raise PageBringerFailed(f"it does not answer: {error}") from error
        if answer != what:
            raise PageBringerFailed("it has died")

    def close(self) -> None:
        """The tool's end of the line: what is not sealed ends."""
        self._sock.close()


def _become_worker(sock: socket.socket, lazy: str, *, line: bool) -> None:
    """The life of the fork; does not return."""
    status = 1
    try:
        # what the tool had must not be closed, flushed or undone by us
        gc.disable()
        gc.freeze()
        outlive.detach(sock.fileno())
        outlive.keep_log("lazy", f"pages of {lazy}")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        cgroup = outlive.prepare("lazy", lazy)
        try:
            _Duty(sock, lazy, line=line).live()
        finally:
            outlive.go_home(cgroup)
        status = 0
    except _Finished:
        status = 0
    except BaseException:
        _log.exception("this is the end")
    finally:
        os._exit(status)


class _Duty:
    """Worker or guard."""

    def __init__(self, sock: socket.socket, lazy: str, *, line: bool) -> None:
        self._sock: socket.socket | None = sock
        self._listener: socket.socket | None = None
        self._pages: PageLine | None = None
        #: who has handed the line over, and lives as long as it is used
        self._dialled: socket.socket | None = None
        if line:
            self._listener = holdline.bind(lazystore.socket_path(lazy))
            sock.send(_LISTENS)
        self._lazy = lazy
        self._sealed = False
        self._again = False
        self._guard = 0
        self._guard_fd = -1
        self._line: socket.socket | None = None
        #: the memories of children that were forked meanwhile, in their order
        self._children: list[int] = []
        self._server: PageServer | None = None
        self._log: PageLog

    def live(self) -> None:
        """Until nothing is left to be done."""
        found = self._receive()
        if found is None:
            lazystore.forget(self._lazy)
            return
        work, self._descriptors = found
        self._work = work
        self._missing = [_ranges(one.missing) for one in work.memories]
        self._log = PageLog(lazystore.pages_path(self._lazy))
        self._log.total = sum(Missing(ranges).bytes for ranges in self._missing)
        while True:
            try:
                self._serve()
                break
            except _Abandoned:
                _log.info("the tool ended before the processes ran")
                break
            except _TakeOver:
                time.sleep(_PAUSE)
            except Exception as error:
                # whoever waits for a page goes on waiting: never a page that is not right
                _log.exception("it is begun anew")
                self._log.state, self._log.reason = State.WAITING, f"{type(error).__name__}: {error}"
                self._log.tell()
                time.sleep(1.0)
            self._again = True
        self._log.state = State.DONE
        self._log.missing = 0
        self._log.tell()
        lazystore.forget(self._lazy)
        _log.info("done")

    def _receive(self) -> tuple[_Work, list[int]] | None:
        """None: the tool ended."""
        descriptors: list[int] = []
        while self._sock is not None:
            data, fds, _, _ = socket.recv_fds(self._sock, _LONGEST, _AT_ONCE)
            descriptors += fds
            if not data:
                return None
            if data == _BEGIN:
                with os.fdopen(descriptors.pop(0), "rb") as file:
                    file.seek(0)
                    return codec.unpack(_Work, file.read()), descriptors
        return None

    # -- the worker

    def _serve(self) -> None:
        first = int(self._work.from_file)
        pairs = zip(self._descriptors[first::2], self._descriptors[first + 1 :: 2], strict=True)
        spaces = [
            LazySpace(one.pid, fd, Missing(ranges), pagemap, cursor=_first(ranges))
            for one, ranges, (fd, pagemap) in zip(self._work.memories, self._missing, pairs, strict=True)
        ]
        if self._sealed and not self._guard:
            self._new_guard()
        source: PageSource
        if self._work.from_file:
            source = ImagePages(self._descriptors[0], self._work.index, self._work.source)
        else:
            if self._pages is not None:
                self._pages.close()
            source = self._pages = PageLine()
        self._server = server = PageServer(spaces, source, self._log, self._forked)
        if self._again:
            server.resume(self._children)
        if self._sock is not None:
            server.also(self._sock.fileno(), self._hear)
            if not self._again and not self._sealed:
                self._answer(_BEGIN)
        if self._guard:
            server.also(self._guard_fd, self._guard_died)
        if self._listener is not None:
            server.also(self._listener.fileno(), self._take_line)
        server.run()
        while not self._sealed:
            self._hear()
        self._dismiss(server)
        if self._pages is not None:
            # not earlier: their memory is like any other by now
            self._pages.over()

    def _dismiss(self, server: PageServer) -> None:
        """Nothing is missing: the guard ends, and the last descriptors are closed."""
        self._log.state = State.DONE
        self._log.tell()
        if self._line is not None:
            self._line.close()
        if _readable(self._guard_fd, timeout=1e3 * _ANSWER):
            os.waitpid(self._guard, 0)
        self._server = None
        for space in server.spaces:
            space.close()

    def _take_line(self) -> None:
        """`tcpmig receive` hands a line over."""
        if self._listener is None or self._pages is None or self._server is None:
            return
        sock, _ = self._listener.accept()
        sock.settimeout(_ANSWER)
        try:
            _, fds, _, _ = socket.recv_fds(sock, _LONGEST, 2)
        except OSError as error:
            _log.warning("a line was not handed over: %s", error)
            fds = []
        if len(fds) != 2:
            sock.close()
            return
        self._pages.connect(fds[0], fds[1], self._line_gone)
        self._dialled = sock
        self._server.also(fds[0], self._line_speaks)

    def _line_speaks(self) -> None:
        if self._pages is None or self._server is None:
            return
        usable = self._pages.usable
        try:
            self._pages.read()
        except TcpmigError as error:
            _log.warning("%s", error)
        if not usable and self._pages.usable:
            self._server.go_on()

    def _line_gone(self, descriptor: int) -> None:
        """It is about to be closed."""
        if self._server is not None:
            self._server.no_more(descriptor)
            self._server.interrupted()
        if self._dialled is not None:
            self._dialled.close()
            self._dialled = None

    def _hear(self) -> None:
        """A word of the tool's."""
        if self._sock is None:
            return
        try:
            word = self._sock.recv(_LONGEST)
        except OSError:
            word = b""
        if word == _SEAL:
            self._sealed = True
            lazystore.remember(self._lazy, self._work.source, self._work.processes)
            self._new_guard()
            self._answer(_SEAL)
            return
        if self._server is not None:
            self._server.no_more(self._sock.fileno())
        self._sock.close()
        self._sock = None
        if not self._sealed:
            raise _Abandoned

    def _answer(self, word: bytes) -> None:
        if self._sock is not None:
            with contextlib.suppress(OSError):  # it has ended, and is heard so
                self._sock.send(word)

    def _forked(self, descriptor: int) -> None:
        self._children.append(descriptor)
        if self._line is not None:
            with contextlib.suppress(OSError):  # it has died: the next one is forked with all of them
                socket.send_fds(self._line, [_DESCRIPTORS], [descriptor])

    def _new_guard(self) -> None:
        me = os.pidfd_open(os.getpid())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if not pid:
            ours.close()
            self._stand_by(me, theirs)
        os.close(me)
        theirs.close()
        if self._line is not None:
            self._line.close()
        self._line = ours
        self._guard, self._guard_fd = pid, os.pidfd_open(pid)
        self._log.guard = pid
        if self._server is not None:
            self._server.also(self._guard_fd, self._guard_died)

    def _guard_died(self) -> None:
        _log.warning("the guard has died")
        if self._server is not None:
            self._server.no_more(self._guard_fd)
        os.close(self._guard_fd)
        os.waitpid(self._guard, 0)
        time.sleep(_PAUSE)
        self._new_guard()

    # -- the guard

    def _stand_by(self, worker: int, line: socket.socket) -> None:
        """Wait for the worker's end; raises _TakeOver, or ends with it."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._line is not None:
            self._line.close()
        if self._guard:
            os.close(self._guard_fd)
        self._line, self._guard, self._server, self._guard_fd = None, 0, None, -1
        if self._pages is not None:
            # only a copy: the worker uses it
            self._pages.close()
        while True:
            _readable(worker, line.fileno())
            with contextlib.suppress(BlockingIOError):
                while True:
                    data, fds, _, _ = socket.recv_fds(line, _LONGEST, _AT_ONCE, socket.MSG_DONTWAIT)
                    self._children += fds
                    if not data:
                        break
            if self._log.done:
                raise _Finished
            if _readable(worker, timeout=0):
                break
        line.close()
        os.close(worker)
        _log.warning("the worker has died: this process takes over")
        raise _TakeOver


def _readable(*descriptors: int, timeout: float | None = None) -> bool:
    """Whether one of them is, within ``timeout`` milliseconds (None: wait)."""
    poll = select.poll()
    for fd in descriptors:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout))


def _first(ranges: Sequence[Range]) -> int:
    """Where to begin: behind the largest piece.  What every program soon touches (its stacks, the data of libraries, a
    heap) is small; it comes while the tool makes the processes run, and of gigabytes nobody knows what is needed."""
    return max(ranges, key=lambda one: one[1] - one[0])[1] if ranges else 0


def _ranges(words: bytes) -> list[Range]:
    found: array.array[int] = array.array("Q")
    found.frombytes(words)
    return list(zip(found[0::2], found[1::2], strict=True))
