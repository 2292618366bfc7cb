"""How the source's half of a migration speaks: each message past the protocol's machine, the clock measured, phases
timed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from migrate.clock import Offset, monotonic_ns
from migrate.driving import remote_error
from migrate.errors import LinkLost, ProtocolError, TargetAborted, TargetRefused, refused
from migrate.hostfacts import CHECK_FOLLOWS, host_facts
from migrate.messages import (
    HIGHEST_VERSION,
    LOWEST_VERSION,
    Abort,
    Hello,
    Keepalive,
    Measure,
    Measured,
    Message,
    Refused,
)
from migrate.protocol import SourceMachine
from migrate.summary import Checked
from migrate.transport import Remote

__all__ = ["SourceTalk"]

_M = TypeVar("_M", bound=Message)


class SourceTalk:
    """What :class:`migrate.source.Source` says and hears."""

    def __init__(self, remote: Remote, machine: SourceMachine) -> None:
        self._remote = remote
        self._channel = remote.channel
        self._machine = machine
        self._offset = Offset()
        self._phases: dict[str, float] = {}
        self._asked: Checked | None = None
        self._refused: Checked | None = None

    def _greet(self, *, follows: bool) -> None:
        """The first word; ``follows``: the target may get ready what Check will ask for."""
        hello = Hello(
            lowest=LOWEST_VERSION,
            highest=HIGHEST_VERSION,
            host=replace(host_facts(), features=frozenset((CHECK_FOLLOWS,) if follows else ())),
            program="tcpmig migrate",
        )
        with contextlib.suppress(LinkLost):
            # a remote shell that has ended already: the next line tells why
            self._say(hello)

    def _measure(self, count: int) -> None:
        for number in range(count):
            sent = monotonic_ns()
            self._say(Measure(number=number))
            answer = self._hear(Measured)
            self._offset.exchange(sent, answer.clock_ns, monotonic_ns())

    def _say(self, message: Message) -> None:
        self._channel.send(self._machine.send(message))

    def _expect(self, message: object) -> Message:
        if not isinstance(message, Message):
            raise ProtocolError("image bytes came from the target")
        return message

    def _hear(self, kind: type[_M]) -> _M:
        """The next message, which must be of this kind; what else may come raises."""
        while True:
            message = self._machine.receive(self._expect(self._channel.receive()))
            if isinstance(message, kind):
                return message
            self._object(message)

    def _object(self, message: Message) -> None:
        if isinstance(message, Abort):
            raise remote_error(message.failure, TargetAborted)
        if isinstance(message, Refused):
            if self._asked is not None:
                self._refused = replace(self._asked, there=message.items)
            raise refused(remote_error(message.failure, TargetRefused))
        if not isinstance(message, Keepalive):
            raise ProtocolError(f"{type(message).__name__} was not asked for")

    def _attend(self) -> None:
        """Between two frames of the image: has the target given up?"""
        self._channel.look()
        while self._channel.pending:
            self._object(self._machine.receive(self._expect(self._channel.receive())))

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = monotonic_ns()
        try:
            yield
        except LinkLost as error:
            # the target's last words, if it had time for them, are the better reason
            if self._channel.pending:
                self._attend()
            raise error
        finally:
            self._phases[name] = (monotonic_ns() - start) / 1e6
