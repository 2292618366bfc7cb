"""Brings the pages of memories that wait for them (:mod:`checkpoint.memory.lazy`): those that are asked for at once,
with what lies around them, all others one after the other in between.

Where the pages come from is a :class:`PageSource`: an image file, or the host where the processes were.  If it fails,
who waits for such a page goes on waiting, and everything else runs on; it is tried again until it can be had.

One thread does it all: a message about a change of mappings is taken in before another page is brought, and the kernel
refuses to bring any before it was read.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import os
import select
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

from checkpoint.kernel import process_vm
from checkpoint.kernel.userfaultfd import Event, Message
from checkpoint.memory.lazy import Changing, Gone, LazySpace
from checkpoint.memory.pagelog import PageLog, State
from checkpoint.memory.ranges import Range
from checkpoint.memory.vma import PAGE
from tcpstate.errors import TcpmigError

__all__ = ["PageServer", "PageSource", "Sourced"]

_log = logging.getLogger(__name__)

#: bytes that are brought for one page that is asked for: aligned, what is missing of them
AROUND: Final = 64 << 10
#: the same where nothing has to be waited for: to copy four times as much takes less than to be asked once more
AROUND_AT_HAND: Final = 256 << 10
#: bytes that are brought at a time when nobody asks
_AHEAD: Final = 256 << 10
#: milliseconds after a question in which the next one is waited for, rather than anything else done ..
_GRACE_MS: Final = 1
#: .. but not so many times in a row
_IN_A_ROW: Final = 16
#: seconds until a source that has failed, or a kernel without memory, is tried again
_AGAIN: Final = 0.5
#: seconds between two looks at how it goes, for whoever wants to know
_TELL: Final = 0.1

#: pid in the image, address there, bytes; the bytes are valid until the next is asked for
Sourced = tuple[int, int, memoryview]


class PageSource(Protocol):
    """Where pages come from. Whatever fails raises a TcpmigError or OSError, and may be tried again."""

    @property
    def immediate(self) -> bool:
        """Whether pages are there as soon as they are wanted."""
        ...

    def want(self, pid: int, origin: int, size: int, *, urgent: bool) -> bool:
        """They are needed, at once or some time; False if they are on their way already."""
        ...

    def ready(self) -> Iterator[Sourced]:
        """What has come."""
        ...

    @property
    def room(self) -> bool:
        """Whether more may be asked for that is not urgent."""
        ...

    def forget(self) -> None:
        """Nothing is wanted any more: after a failure everything is asked for again."""
        ...

    def look(self) -> None:
        """Now and then: does it still work?"""
        ...


class PageServer:
    """See the module's docstring.

    spaces  the memories; their place in the list is their number in the log
    forked  told of the descriptor of a child's memory
    """

    def __init__(
        self, spaces: Sequence[LazySpace], source: PageSource, log: PageLog, forked: Callable[[int], None]
    ) -> None:
        self.spaces = list(spaces)
        self._living = set(range(len(self.spaces)))
        self._source = source
        self._log = log
        self._forked = forked
        self._poll = select.poll()
        self._numbers: dict[int, int] = {}
        self._others: dict[int, Callable[[], None]] = {}
        #: (number of the memory, page) that somebody waits for
        self._asked: collections.deque[tuple[int, int]] = collections.deque()
        #: the same, of what could not be had
        self._stuck: list[tuple[int, int]] = []
        self._in_a_row = 0
        #: when what failed is tried again; 0: nothing has
        self._again = 0.0
        self._told = 0.0
        for number in self._living:
            self._watch(number)
        #: all that is missing has been asked for
        self._asked_all = False

    def also(self, fd: int, call: Callable[[], None]) -> None:
        """Call it whenever ``fd`` is readable, or its other end is gone."""
        self._others[fd] = call
        self._poll.register(fd, select.POLLIN)

    def no_more(self, fd: int) -> None:
        """Do not look at ``fd`` any longer."""
        if self._others.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _watch(self, number: int) -> None:
        fd = self.spaces[number].fd
        self._numbers[fd] = number
        self._poll.register(fd, select.POLLIN)

    @property
    def missing(self) -> int:
        """Bytes."""
        return sum(self.spaces[number].missing.bytes for number in self._living)

    def run(self) -> None:
        """Until no page is missing."""
        while self.missing:
            self._look(self._patience())
            try:
                self._work()
            except Changing:
                continue  # the messages come first
            self._tell()
        self._tell(now=True)

    def _work(self) -> None:
        if self._again and time.monotonic() >= self._again:
            self._again = 0.0
            self._asked.extend(self._stuck)
            self._stuck.clear()
        if self._asked and (self._source.immediate or not self._again):
            self._in_a_row += 1
            self._answer()
            if self._source.immediate:
                return
        self._in_a_row = 0
        if self._again:
            return
        try:
            self._source.look()
            self._arrive()
            self._push()
            self._arrive()
        except (TcpmigError, OSError) as error:
            self._fail(error)
        else:
            self._serving()

    def _patience(self) -> float:
        """Milliseconds to wait for messages."""
        if self._asked and self._source.immediate:
            return 0
        if self._again:
            return max(0.0, 1e3 * (self._again - time.monotonic()))
        if self._asked:
            return 0
        if 0 < self._in_a_row <= _IN_A_ROW:
            return _GRACE_MS
        return 0 if self._source.room and not self._asked_all else 1e3 * _AGAIN

    def _look(self, timeout: float) -> None:
        """Read messages until there are none."""
        ready = self._poll.poll(timeout)
        while ready:
            asked = False
            for fd, events in ready:
                if fd in self._others:
                    self._others[fd]()
                elif fd in self._numbers:
                    asked |= self._read(self._numbers[fd], broken=not events & select.POLLIN)
            if asked:
                return
            ready = [one for one in self._poll.poll(0) if one[0] in self._numbers]

    def _read(self, number: int, *, broken: bool) -> bool:
        """Whether a page was asked for."""
        if broken:
            self._end(number)
            return False
        space, asked = self.spaces[number], False
        for message in self._log.read(number, space.fd):
            if message.event is Event.PAGEFAULT:
                self._log.faults += 1
                self._asked.append((number, message.second & -PAGE))
                asked = True
            else:
                self.change(number, message)
        return asked

    def change(self, number: int, message: Message) -> None:
        """Take one change of mappings in."""
        child = self.spaces[number].changed(message)
        if child is not None:
            self._forked(child.fd)
            self.adopt(child)

    def adopt(self, child: LazySpace) -> None:
        """A child's memory."""
        self.spaces.append(child)
        self._living.add(len(self.spaces) - 1)
        self._watch(len(self.spaces) - 1)

    def _end(self, number: int) -> None:
        """Nobody uses that memory any more. Its descriptor stays open until the end: so do those of who stands in for
        us."""
        if number in self._living:
            self._living.remove(number)
            self._numbers.pop(self.spaces[number].fd, None)
            self._poll.unregister(self.spaces[number].fd)

    @contextlib.contextmanager
    def _of(self, number: int) -> Iterator[LazySpace]:
        try:
            yield self.spaces[number]
        except Gone:
            self._end(number)

    # -- what is asked for

    def _answer(self) -> None:
        while self._asked:
            number, page = self._asked[0]
            if number in self._living:
                try:
                    with self._of(number) as space:
                        self._bring(space, page)
                except (TcpmigError, OSError) as error:
                    self._stuck.append((number, page))
                    self._fail(error)
            self._asked.popleft()

    def _bring(self, space: LazySpace, page: int) -> None:
        if not space.missing.find(page, page + PAGE):
            space.clear(page)
            return
        around = AROUND_AT_HAND if self._source.immediate else AROUND
        low = page & -around
        for piece in space.missing.find(low, low + around):
            self._source.want(space.pid, piece.origin, piece.size, urgent=True)
        # what comes next is likely to be near
        space.cursor = low + around
        self._arrive()

    def _push(self) -> None:
        self._asked_all = False
        for number in sorted(self._living):
            space = self.spaces[number]
            while self._source.room and space.missing:
                piece = space.missing.after(space.cursor, _AHEAD)
                if piece is None:
                    break
                space.cursor = piece.end
                if not self._source.want(space.pid, piece.origin, piece.size, urgent=False):
                    break
                if self._source.immediate:
                    return  # one at a time: somebody may ask meanwhile
        self._asked_all = self._source.room

    def _arrive(self) -> None:
        for pid, origin, data in self._source.ready():
            with process_vm.address_of(data) as address:
                for number in sorted(self._living):
                    if self.spaces[number].pid == pid:
                        self._put(number, (origin, origin + len(data)), address)

    def _put(self, number: int, came: Range, address: int) -> None:
        with self._of(number) as space:
            while True:
                try:
                    for piece in space.missing.of_origin(*came):
                        space.put(piece, address + piece.origin - came[0])
                except Changing:
                    # not to be given up: the bytes are only here now
                    self._look(_GRACE_MS)
                    if number not in self._living:
                        return
                    continue
                return

    # -- how it goes

    def _serving(self) -> None:
        if not self._stuck and self._log.state is not State.SERVING:
            if self._log.reason:
                _log.warning("it goes on")
            self._log.state, self._log.reason = State.SERVING, ""
            self._tell(now=True)

    def _fail(self, error: TcpmigError | OSError) -> None:
        reason = str(error)
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            reason = "no memory is left on this host"
        if reason != self._log.reason:
            _log.error("pages cannot be brought: %s", reason)
        self._log.state, self._log.reason = State.WAITING, reason
        self._tell(now=True)
        self._source.forget()
        self._again = time.monotonic() + _AGAIN
        for number in sorted(self._living):
            if not self.spaces[number].alive:
                self._end(number)

    def _tell(self, *, now: bool = False) -> None:
        moment = time.monotonic()
        if now or moment - self._told > _TELL:
            self._told = moment
            self._log.worker = os.getpid()
            self._log.missing = self.missing
            self._log.tell()

    def interrupted(self) -> None:
        """What was asked for will not come: the line is cut. Who waits asks again."""
        self._asked.clear()
        self._stuck.clear()
        for number in sorted(self._living):
            self.spaces[number].cursor = 0
            self.spaces[number].wake_all()

    def go_on(self) -> None:
        """There is a line again: do not wait any longer."""
        if self._again:
            self._again = time.monotonic()

    # -- taking over

    def resume(self, children: Sequence[int]) -> None:
        """Go through everything that was ever read, in place of who did it; ``children``: the descriptors of the
        memories of children, in their order. Then all who wait are woken, and ask again."""
        left = list(children)
        for number, message in self._log.again():
            if number >= len(self.spaces):
                continue  # of a child that is lost
            child = self.spaces[number].changed(message)
            if child is not None and left:
                child.fd = left.pop(0)
                self.adopt(child)
            elif child is not None:
                _log.error("the memory of a child that has just been forked is lost: what is missing of it is empty")
        for number in sorted(self._living):
            with self._of(number) as space:
                space.wake_all()
