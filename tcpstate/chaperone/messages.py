"""What is said on the chaperone's socket: one codec family, versioned by the greeting.

A later version may add fields with defaults and new messages; the shape of Hello never changes.  A request with an
empty ``conn`` speaks of the socket that comes with it (SCM_RIGHTS, one descriptor, with the first byte of its frame).
"""

from __future__ import annotations

import math
from typing import Any

from tcpstate.codec import family, member
from tcpstate.slotted import dataclass

__all__ = [
    "VERSION",
    "Answer",
    "Discard",
    "Done",
    "Export",
    "Exported",
    "Failed",
    "Freeze",
    "Get",
    "Hello",
    "Item",
    "Items",
    "Limits",
    "Message",
    "Rebuild",
    "Release",
    "Request",
    "Resume",
    "Welcome",
    "items_of",
    "plain_items",
]

#: the version of the protocol that this program speaks
VERSION = 1
#: characters of a conn-ID: two IPv6 addresses with interface names and ports
_CONN_MAX = 200
_KEYWORDS_MAX = 200
_KEYWORD_MAX = 64
_NUMBER_MAX = 1 << 32
#: a record that was under way for longer is of no use: the peer has given up (seconds)
_ELAPSED_MAX = 24 * 3600.0


@family
@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Anything said in either direction."""


@member(Message, "hello")
@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(Message):
    """The client's first message: the versions that it speaks."""

    versions: tuple[int, ...] = (VERSION,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a client may ask for.

    frame    bytes of one message
    frozen   connections of one user that are frozen, or being rebuilt, at a time
    rate     requests per second of one user, on average
    burst    requests at once
    seconds  for how long a connection stays frozen at most
    """

    frame: int = 16 << 20
    frozen: int = 256
    rate: float = 500.0
    burst: int = 1000
    seconds: float = 60.0


@member(Message, "welcome")
@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome(Message):
    """The answer to Hello: the version that is spoken from here on, who the client is taken for, its limits."""

    version: int
    uid: int
    limits: Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(Message):
    """A request about one connection.

    number  chosen by the client; the answer has it
    conn    conn-ID in its text form; empty: the socket that comes with the request
    """

    number: int
    conn: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.number < _NUMBER_MAX:
            raise ValueError(f"request number {self.number} is out of range")
        if len(self.conn) > _CONN_MAX:
            raise ValueError("the conn-ID is too long")

    @property
    def passes_socket(self) -> bool:
        """Whether a descriptor belongs to it."""
        return not self.conn


@member(Message, "get")
@dataclass(frozen=True, slots=True, kw_only=True)
class Get(Request):
    """What can be read of it while it flows; of the socket options those that differ, and these."""

    keywords: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # the dataclass with slots is another class than the one that super() without arguments means
        Request.__post_init__(self)
        if len(self.keywords) > _KEYWORDS_MAX or any(len(word) > _KEYWORD_MAX for word in self.keywords):
            raise ValueError("too many keywords, or too long ones")


@member(Message, "freeze")
@dataclass(frozen=True, slots=True, kw_only=True)
class Freeze(Request):
    """Nothing comes in, nothing goes out."""


@member(Message, "resume")
@dataclass(frozen=True, slots=True, kw_only=True)
class Resume(Request):
    """A frozen connection flows again, exported or not."""


@member(Message, "export")
@dataclass(frozen=True, slots=True, kw_only=True)
class Export(Request):
    """The record of a frozen connection, which takes no more calls of its process from here on."""


@member(Message, "discard")
@dataclass(frozen=True, slots=True, kw_only=True)
class Discard(Request):
    """The silent end of an exported connection.

    anyway  even if its address is still here (both ends of a move are on one host)
    """

    anyway: bool = False


@member(Message, "rebuild")
@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuild(Request):
    """A connection is built, silent, out of a record.

    record   as Exported brought it
    elapsed  seconds since then by one clock, rather too much than too little
    """

    record: bytes
    elapsed: float

    def __post_init__(self) -> None:
        Request.__post_init__(self)
        if not (math.isfinite(self.elapsed) and 0 <= self.elapsed <= _ELAPSED_MAX):
            raise ValueError(f"{self.elapsed} seconds cannot have passed")

    @property
    def passes_socket(self) -> bool:
        """Never: the chaperone makes the socket."""
        return False


@member(Message, "release")
@dataclass(frozen=True, slots=True, kw_only=True)
class Release(Request):
    """A rebuilt connection lives; the answer brings its socket."""

    @property
    def passes_socket(self) -> bool:
        """Never: the client does not have it yet."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Message):
    """What became of the request with this number; 0: of none, the connection to the chaperone ends."""

    number: int


@member(Message, "done")
@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Answer):
    """It was done, to this connection; the answer to Release brings its socket."""

    conn: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One item: exactly one of the three is not None."""

    keyword: str
    numbers: tuple[int, ...] | None = None
    text: str | None = None
    data: bytes | None = None


@member(Message, "items")
@dataclass(frozen=True, slots=True, kw_only=True)
class Items(Answer):
    """The answer to Get."""

    items: tuple[Item, ...]


@member(Message, "exported")
@dataclass(frozen=True, slots=True, kw_only=True)
class Exported(Answer):
    """The answer to Export: the record, signed if the chaperone signs."""

    conn: str
    record: bytes


@member(Message, "failed")
@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Answer):
    """It was not done, and why: the fields of a :class:`~tcpstate.errors.TcpmigError`."""

    code: str
    message: str
    object: str = ""
    fix: str = ""


def items_of(values: dict[str, Any]) -> tuple[Item, ...]:
    """Numbers, tuples of them, text and bytes as items."""
    found = []
    for keyword, value in values.items():
        if isinstance(value, str):
            found.append(Item(keyword=keyword, text=value))
        elif isinstance(value, bytes):
            found.append(Item(keyword=keyword, data=value))
        else:
            numbers = tuple(map(int, value)) if isinstance(value, tuple) else (int(value),)
            found.append(Item(keyword=keyword, numbers=numbers))
    return tuple(found)


def plain_items(items: tuple[Item, ...]) -> dict[str, Any]:
    """The reverse; a single number is not in a tuple."""
    found: dict[str, Any] = {}
    for item in items:
        if item.numbers is not None:
            found[item.keyword] = item.numbers[0] if len(item.numbers) == 1 else item.numbers
        else:
            found[item.keyword] = item.text if item.text is not None else item.data
    return found
