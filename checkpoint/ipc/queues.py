"""System V message queues: the messages, and who sent and received last.

Messages are read as copies (MSG_COPY), so they stay.  A rebuilt process has been the last sender after it has sent a
message of a type that nobody else uses, the last receiver after it has taken one.

Source: ipc/msg.c.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Final, Self

from checkpoint.ipc.base import SystemV
from checkpoint.kernel import sysvipc
from checkpoint.kernel.sysvipc import Listed, MsgFlag
from tcpstate.codec import member
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.spawn import Stub

__all__ = ["MessageQueue", "QueuedMessage"]

_TYPE_MAX: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedMessage:
    """One message: its type (mtype), and its text."""

    type: int
    text: bytes

    def __post_init__(self) -> None:
        if not 0 < self.type <= _TYPE_MAX:
            raise ValueError("type of a message out of range")


@member(SystemV, "message queue")
@dataclass(frozen=True, slots=True, kw_only=True)
class MessageQueue(SystemV):
    """One queue.

    room      bytes that it may hold (msg_qbytes)
    messages  the oldest first
    sender    the process that sent last; 0: none of the tree, and ``receiver``
    """

    what: ClassVar[str] = "message queue"
    option: ClassVar[str] = "-q"
    waits: ClassVar[frozenset[int]] = frozenset({SYS.msgsnd, SYS.msgrcv})

    room: int
    messages: tuple[QueuedMessage, ...]
    sender: int
    receiver: int

    def validate(self) -> None:
        if not 0 <= self.room < 1 << 31 or self.sender < 0 or self.receiver < 0:
            raise ValueError("room or users of a message queue out of range")

    def renumbered(self, number: Callable[[int], int]) -> Self:
        return dataclasses.replace(self, sender=number(self.sender), receiver=number(self.receiver))

    @classmethod
    def listed(cls) -> list[Listed]:
        return sysvipc.list_queues()

    @classmethod
    def users(cls, one: Listed, pids: Sequence[int]) -> set[int]:
        return set(one.users) - {0}

    @classmethod
    def capture(cls, one: Listed, pids: Sequence[int]) -> Self:
        messages = (sysvipc.peek(one.number, place, one.bytes) for place in range(one.count))
        sender, receiver = (pid if pid in pids else 0 for pid in one.users)
        return cls(
            number=one.number,
            key=one.key,
            mode=one.mode,
            uid=one.uid,
            gid=one.gid,
            room=sysvipc.queue_room(one.number),
            messages=tuple(QueuedMessage(type=sort, text=text) for sort, text in messages),
            sender=sender,
            receiver=receiver,
        )

    def create(self) -> bool:
        return sysvipc.create_queue(self.number, self.key, self.mode)

    def fill(self) -> None:
        if self.room != sysvipc.queue_room(self.number):
            # with its messages it may be fuller than it may be
            sysvipc.change_queue(self.number, self.uid, self.gid, self.mode, max(self.room, self._bytes))
        for message in self.messages:
            sysvipc.send(self.number, message.type, message.text)
        sysvipc.change_queue(self.number, self.uid, self.gid, self.mode, self.room)

    @property
    def _bytes(self) -> int:
        return sum(len(message.text) for message in self.messages)

    def used(self, stubs: Mapping[int, Stub]) -> None:
        sender, receiver = stubs.get(self.sender), stubs.get(self.receiver)
        known = {message.type for message in self.messages}
        unused = next(number for number in itertools.count(1) if number not in known)
        if receiver is not None:
            sysvipc.send(self.number, unused, b"")
            self._take(receiver, unused)
        if sender is None:
            return
        # what it sends is taken again, which makes whoever takes it the last receiver
        calls = CallTable()
        message = calls.put(unused.to_bytes(8, "little"))
        calls.call(SYS.msgsnd, self.number, message, 0, MsgFlag.NOWAIT, label=f"msgsnd to {self.name}")
        sender.run(calls)
        self._take(sender if receiver is None else receiver, unused)

    def _take(self, stub: Stub, type: int) -> None:
        calls = CallTable()
        room = calls.room(8)
        calls.call(SYS.msgrcv, self.number, room, 0, type, MsgFlag.NOWAIT, label=f"msgrcv from {self.name}")
        stub.run(calls)

    @classmethod
    def remove(cls, number: int) -> None:
        sysvipc.remove_queue(number)
