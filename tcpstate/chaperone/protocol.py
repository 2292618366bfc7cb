"""The chaperone's protocol without its sockets: frames, the greeting, and which descriptor belongs to which request.

A frame is its length (4 bytes, network order) and a msgpack message.  Descriptors arrive, in order, no later than the
first byte of the frame that they belong to (unix(7): SCM_RIGHTS acts as a barrier), so a request that passes a socket
takes the oldest that waits.  Whatever does not fit ends the connection with BadChaperoneMessage.
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import field

from tcpstate import codec
from tcpstate.chaperone.messages import VERSION, Answer, Hello, Limits, Message, Request, Welcome
from tcpstate.errors import BadChaperoneMessage, BadRecord
from tcpstate.slotted import dataclass

__all__ = ["HELLO_MAX", "ClientProtocol", "Frames", "Received", "ServerProtocol", "encode"]

_LENGTH = struct.Struct("!I")
#: bytes of a frame before the client is known
HELLO_MAX = 1 << 10
#: descriptors that may wait for their requests
_DESCRIPTORS_MAX = 8


def encode(message: Message) -> bytes:
    """The frame of a message."""
    body = codec.pack(message)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Bytes as they arrive, in any pieces, to whole frames."""

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Take what has arrived."""
        self._buffer += data

    def next(self) -> bytes | None:
        """The body of the next whole frame; None until there is one. BadChaperoneMessage for one that is too long."""
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if not 0 < length <= self.largest:
            raise BadChaperoneMessage(f"a frame of {length} bytes: 1 to {self.largest} are taken")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        body = bytes(memoryview(self._buffer)[_LENGTH.size : end])
        del self._buffer[:end]
        return body

    @property
    def partial(self) -> bool:
        """Whether a frame has begun and is not whole."""
        return bool(self._buffer)


def _decode(body: bytes) -> Message:
    try:
        return codec.unpack(Message, body)
    except (BadRecord, UnicodeError, OverflowError) as error:
        text = error.message if isinstance(error, BadRecord) else str(error)
        # the text may quote what came: at most a line of it
        raise BadChaperoneMessage(f"no message of this protocol: {text[:200]}") from None


@dataclass(frozen=True, slots=True)
class Received:
    """A request, and the descriptor that came with it (-1: none), which now belongs to whoever takes it."""

    request: Request
    descriptor: int = -1


class _Side(enum.Enum):
    GREETING = enum.auto()
    OPEN = enum.auto()
    ENDED = enum.auto()


@dataclass(slots=True)
class ServerProtocol:
    """The chaperone's side for one client.

    uid, limits  what it is told in the welcome
    """

    uid: int
    limits: Limits
    _side: _Side = _Side.GREETING
    _frames: Frames = field(default_factory=lambda: Frames(HELLO_MAX))
    _waiting: deque[int] = field(default_factory=deque)

    def receive(self, data: bytes, descriptors: Sequence[int] = ()) -> Iterator[Received | Welcome]:
        """What the bytes bring, one by one: the welcome that is to be sent, then requests. BadChaperoneMessage ends it:
        nothing more is taken, and :meth:`leftover` are to be closed."""
        self._waiting += descriptors
        if self._side is _Side.ENDED:
            return
        try:
            if len(self._waiting) > _DESCRIPTORS_MAX:
                raise BadChaperoneMessage("too many descriptors wait for their requests")
            self._frames.feed(data)
            while (body := self._frames.next()) is not None:
                yield self._one(_decode(body))
            if self._waiting and not self._frames.partial:
                raise BadChaperoneMessage("a descriptor belongs to no request")
        except BadChaperoneMessage:
            self._side = _Side.ENDED
            raise

    def _one(self, message: Message) -> Received | Welcome:
        if self._side is _Side.GREETING:
            if not isinstance(message, Hello):
                raise BadChaperoneMessage("the first message is not a hello")
            if VERSION not in message.versions:
                raise BadChaperoneMessage(f"version {VERSION} is spoken here, the client speaks others")
            self._side = _Side.OPEN
            self._frames.largest = self.limits.frame
            return Welcome(version=VERSION, uid=self.uid, limits=self.limits)
        if not isinstance(message, Request):
            raise BadChaperoneMessage(f"a {codec.kind_of(type(message))} is no request")
        if not message.passes_socket:
            return Received(message)
        if not self._waiting:
            raise BadChaperoneMessage("the request names no connection, and no socket came with it")
        return Received(message, self._waiting.popleft())

    @property
    def busy(self) -> bool:
        """Whether a frame has begun and is not whole, or the greeting has not come."""
        return self._frames.partial or self._side is _Side.GREETING

    def leftover(self) -> list[int]:
        """Descriptors that belong to nobody; they are the caller's."""
        found = list(self._waiting)
        self._waiting.clear()
        return found


class ClientProtocol:
    """The client's side: every answer belongs to the one request that is under way."""

    def __init__(self) -> None:
        self._frames = Frames(HELLO_MAX)
        self._number = 0
        self.limits: Limits | None = None

    def hello(self) -> bytes:
        """What is sent first."""
        return encode(Hello())

    def next_number(self) -> int:
        """The number of the next request."""
        self._number += 1
        return self._number

    def check(self, frame: bytes) -> None:
        """BadChaperoneMessage if the chaperone would not take so long a frame."""
        if self.limits is not None and len(frame) - _LENGTH.size > self.limits.frame:
            raise BadChaperoneMessage(f"a frame of {len(frame)} bytes: {self.limits.frame} are taken")

    def receive(self, data: bytes) -> Welcome | Answer | None:
        """The welcome or answer that the bytes complete; None until they do. BadChaperoneMessage."""
        self._frames.feed(data)
        body = self._frames.next()
        if body is None:
            return None
        message = _decode(body)
        if isinstance(message, Welcome) and self.limits is None:
            if message.version != VERSION:
                raise BadChaperoneMessage(f"the chaperone speaks version {message.version}, {VERSION} is spoken here")
            self.limits = message.limits
            # an export's answer is a little longer than the record that rebuild sends
            self._frames.largest = max(HELLO_MAX, message.limits.frame + HELLO_MAX)
            return message
        if not isinstance(message, Answer) or message.number not in (0, self._number):
            raise BadChaperoneMessage("this answers no request")
        return message
