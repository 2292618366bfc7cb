"""What two processes that stand in for each other know of a memory's lazy pages: a file that both have mapped.

The one that works reads the kernel's messages *into* the file: should it be killed right after the read, the other
finds them there.  Messages about changes stay, for whoever takes over to go through all of them again; questions for
pages do not: who still waits asks again when woken.

::

    0     magic   state u32   worker u32   guard u32   0 u32   missing u64   total u64   faults u64   reason (256)
    4096  slots of 40 bytes: number of the memory + 1 (u64), message (struct uffd_msg); the first empty one ends them
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from checkpoint.kernel.userfaultfd import MESSAGE_SIZE, Event, Message

__all__ = ["LogFull", "PageLog", "Progress", "State", "read_progress"]

_MAGIC: Final = b"TCPMIGLZ"
_HEAD: Final = struct.Struct("<8sIIIIQQQ")
_REASON: Final = slice(_HEAD.size, _HEAD.size + 256)
_SLOTS_AT: Final = 4096
_NUMBER: Final = struct.Struct("<Q")
_SLOT: Final = _NUMBER.size + MESSAGE_SIZE
#: bytes of the file, of which only what was written takes memory
_SIZE: Final = 256 << 20
#: messages in one read
_AT_ONCE: Final = 16


class LogFull(Exception):
    """There is no room for another message."""


class State(enum.IntEnum):
    """How it goes."""

    STARTING = 0
    SERVING = 1
    WAITING = 2  # the pages cannot be had at the moment
    DONE = 3  # all are there, or nobody needs them any more


class Progress(NamedTuple):
    """What the head of the file tells.

    worker, guard   PIDs
    missing, total  bytes
    faults          pages that were asked for
    reason          why it waits
    """

    state: State
    worker: int
    guard: int
    missing: int
    total: int
    faults: int
    reason: str


class PageLog:
    """The file, mapped. OSError."""

    def __init__(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, _SIZE)
            self._memory = mmap.mmap(fd, _SIZE)
        finally:
            os.close(fd)
        self._view = memoryview(self._memory)
        self._tail = _SLOTS_AT
        self.state = State.STARTING
        self.worker = self.guard = self.missing = self.total = self.faults = 0
        self.reason = ""
        self.tell()

    def tell(self) -> None:
        """Write the head."""
        head = (self.state, self.worker, self.guard, 0, self.missing, self.total, self.faults)
        _HEAD.pack_into(self._memory, 0, _MAGIC, *head)
        self._memory[_REASON] = self.reason.encode("utf-8", "replace")[:255].ljust(256, b"\0")

    @property
    def done(self) -> bool:
        """Whether the other has said that nothing is left to be done."""
        return State(_HEAD.unpack_from(self._memory)[1]) is State.DONE

    def read(self, number: int, fd: int) -> list[Message]:
        """Messages of memory ``number`` from its descriptor, which does not block. OSError, LogFull."""
        at = self._tail
        if at + _AT_ONCE * _SLOT > _SIZE:
            raise LogFull
        places = range(at, at + _AT_ONCE * _SLOT, _SLOT)
        for place in places:
            _NUMBER.pack_into(self._memory, place, number + 1)
        try:
            count = os.readv(fd, [self._view[place + _NUMBER.size : place + _SLOT] for place in places])
        except BlockingIOError:
            return []
        found = [self._at(place) for place in places[: count // MESSAGE_SIZE]]
        messages = [message for _, message in filter(None, found)]
        if all(message.event is Event.PAGEFAULT for message in messages):
            self._memory[at : at + len(messages) * _SLOT] = bytes(len(messages) * _SLOT)
        else:
            self._tail += len(messages) * _SLOT
        return messages

    def _at(self, place: int) -> tuple[int, Message] | None:
        message = Message.parse(self._view[place + _NUMBER.size : place + _SLOT])
        return None if message is None else (_NUMBER.unpack_from(self._memory, place)[0] - 1, message)

    def again(self) -> Iterator[tuple[int, Message]]:
        """(number of the memory, message about a change): all that were ever read; what comes next is put behind."""
        self._tail = _SLOTS_AT
        while self._tail + _SLOT <= _SIZE and (found := self._at(self._tail)) is not None:
            self._tail += _SLOT
            if found[1].event is not Event.PAGEFAULT:
                yield found


def read_progress(path: Path) -> Progress | None:
    """What the file of somebody else tells; None if it is no such file, or gone. OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file:
        head = file.read(_REASON.stop)
    if len(head) < _REASON.stop or not head.startswith(_MAGIC):
        return None
    _, state, worker, guard, _, missing, total, faults = _HEAD.unpack_from(head)
    reason = head[_REASON].rstrip(b"\0").decode("utf-8", "replace")
    return Progress(State(state), worker, guard, missing, total, faults, reason)
