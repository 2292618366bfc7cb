"""nf_tables by raw netlink messages: tables, chains, sets and rules, all of one table in one transaction.

Only what :mod:`tcpstate.uses.hold` needs.  pyroute2 knows the messages too, but not keys made of several fields, and
its sets cost a message each element; the program `nft` need not be installed.

Source: include/uapi/linux/netfilter/nfnetlink.h, nf_tables.h; net/netfilter/nfnetlink.c nfnetlink_rcv_batch.
"""

from __future__ import annotations

import enum
import socket
import struct
from collections.abc import Iterable, Sequence

from tcpstate.kernel.netlink import Netlink, Protocol, Request, attribute, attributes
from tcpstate.kernel.sockets import SO, Level
from tcpstate.slotted import dataclass

__all__ = [
    "ACCEPT",
    "DROP",
    "EQUAL",
    "REGISTER",
    "VERDICT_REGISTER",
    "Base",
    "Bitwise",
    "Compare",
    "Direction",
    "Immediate",
    "KeyType",
    "Lookup",
    "Meta",
    "MetaKey",
    "NfTables",
    "Operation",
    "Payload",
    "SetKey",
    "expression",
    "number",
    "text",
    "value",
    "verdict",
]

_GENERIC = struct.Struct(">BBH")  # struct nfgenmsg: family, version, res_id
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
_INET = 1  # NFPROTO_INET
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_NESTED = 0x8000  # NLA_F_NESTED
_ACCEPT = 1  # NF_ACCEPT
#: elements of one message: the list of them is one attribute, of at most 64 KiB
_ELEMENTS = 512
#: bytes of a transaction on its way into the kernel
_SEND_BUFFER = 16 << 20


class _Message(enum.IntEnum):
    """NFNL_MSG_BATCH_* and NFT_MSG_*."""

    BATCH_BEGIN = 0x10
    BATCH_END = 0x11
    NEWTABLE = _SUBSYSTEM << 8 | 0
    GETTABLE = _SUBSYSTEM << 8 | 1
    DELTABLE = _SUBSYSTEM << 8 | 2
    NEWCHAIN = _SUBSYSTEM << 8 | 3
    NEWRULE = _SUBSYSTEM << 8 | 6
    NEWSET = _SUBSYSTEM << 8 | 9
    NEWSETELEM = _SUBSYSTEM << 8 | 12


class _Table(enum.IntEnum):
    """NFTA_TABLE_*."""

    NAME = 1


class _Chain(enum.IntEnum):
    """NFTA_CHAIN_*."""

    TABLE = 1
    NAME = 3
    HOOK = 4
    POLICY = 5
    TYPE = 7


class _Hook(enum.IntEnum):
    """NFTA_HOOK_*."""

    NUMBER = 1
    PRIORITY = 2


class _Rule(enum.IntEnum):
    """NFTA_RULE_*."""

    TABLE = 1
    CHAIN = 2
    EXPRESSIONS = 4


class _Expression(enum.IntEnum):
    """NFTA_EXPR_*."""

    NAME = 1
    DATA = 2


class _Set(enum.IntEnum):
    """NFTA_SET_*."""

    TABLE = 1
    NAME = 2
    FLAGS = 3
    KEY_TYPE = 4
    KEY_LENGTH = 5
    ID = 10


class _Elements(enum.IntEnum):
    """NFTA_SET_ELEM_LIST_*."""

    TABLE = 1
    SET = 2
    LIST = 3


class _Element(enum.IntEnum):
    """NFTA_SET_ELEM_*."""

    KEY = 1
    TIMEOUT = 4


class Meta(enum.IntEnum):
    """NFTA_META_*."""

    TO = 1
    KEY = 2


class MetaKey(enum.IntEnum):
    """enum nft_meta_keys."""

    MARK = 3
    FAMILY = 15
    PROTOCOL = 16


class Compare(enum.IntEnum):
    """NFTA_CMP_*."""

    REGISTER = 1
    OPERATION = 2
    DATA = 3


class Payload(enum.IntEnum):
    """NFTA_PAYLOAD_*."""

    TO = 1
    BASE = 2
    OFFSET = 3
    LENGTH = 4


class Base(enum.IntEnum):
    """enum nft_payload_bases."""

    NETWORK = 1
    TRANSPORT = 2


class Bitwise(enum.IntEnum):
    """NFTA_BITWISE_*."""

    FROM = 1
    TO = 2
    LENGTH = 3
    MASK = 4
    XOR = 5


class Lookup(enum.IntEnum):
    """NFTA_LOOKUP_*."""

    SET = 1
    REGISTER = 2
    SET_ID = 4


class Immediate(enum.IntEnum):
    """NFTA_IMMEDIATE_*."""

    TO = 1
    DATA = 2


#: NFTA_LIST_ELEM, NFTA_DATA_VALUE, NFTA_DATA_VERDICT, NFTA_VERDICT_CODE
_ITEM, _VALUE, _VERDICT, _CODE = 1, 1, 2, 1
#: registers: the verdict; the first of the 32-bit ones, whose data a following one continues
VERDICT_REGISTER, REGISTER = 0, 8
#: NFT_CMP_EQ, NF_DROP, NF_ACCEPT
EQUAL, DROP, ACCEPT = 0, 0, 1
_SET_TIMEOUT = 0x10  # NFT_SET_TIMEOUT: elements may end by themselves


class Direction(enum.IntEnum):
    """Where a chain hooks in: enum nf_inet_hooks."""

    INPUT = 1


class KeyType(enum.IntEnum):
    """The types by which `nft list` shows a key (they are of user space: nftables' include/datatype.h)."""

    IPV4_ADDRESS = 7
    IPV6_ADDRESS = 8
    SERVICE = 13


_TYPE_BITS = 6  # nftables' TYPE_BITS
_TYPE_SIZE = {KeyType.IPV4_ADDRESS: 4, KeyType.IPV6_ADDRESS: 16, KeyType.SERVICE: 4}  # each fills whole registers


@dataclass(frozen=True, slots=True)
class SetKey:
    """The fields of which the keys of a set are made, each padded to a multiple of four bytes."""

    types: tuple[KeyType, ...]

    @property
    def size(self) -> int:
        """Bytes of a key; of a single field its own size."""
        if self.types == (KeyType.SERVICE,):
            return 2
        return sum(_TYPE_SIZE[kind] for kind in self.types)

    @property
    def type(self) -> int:
        """As nft encodes concatenated types."""
        number = 0
        for kind in self.types:
            number = number << _TYPE_BITS | kind
        return number


class Operation(enum.StrEnum):
    """Names of expressions."""

    META = "meta"
    COMPARE = "cmp"
    PAYLOAD = "payload"
    BITWISE = "bitwise"
    LOOKUP = "lookup"
    IMMEDIATE = "immediate"
    COUNTER = "counter"


def nested(kind: int, *inside: bytes) -> bytes:
    """An attribute made of attributes."""
    return attribute(kind | _NESTED, b"".join(inside))


def expression(name: Operation, *data: bytes) -> bytes:
    """One expression of a rule, of its attributes."""
    what = attribute(_Expression.NAME, name.encode() + b"\0")
    return nested(_ITEM, what, nested(_Expression.DATA, *data))


def number(kind: int, value: int) -> bytes:
    """A 32-bit attribute."""
    return attribute(kind, _U32.pack(value))


def text(kind: int, value: str) -> bytes:
    """A name."""
    return attribute(kind, value.encode() + b"\0")


def value(kind: int, data: bytes) -> bytes:
    """struct nft_data with a value."""
    return nested(kind, attribute(_VALUE, data))


def verdict(kind: int, code: int) -> bytes:
    """struct nft_data with a verdict."""
    return nested(kind, nested(_VERDICT, number(_CODE, code)))


class NfTables(Netlink):
    """A netlink socket for nf_tables of the calling thread's network namespace; a context manager. OSError.

    The methods that make things return messages, for :meth:`commit`: all of them or none.
    """

    def __init__(self) -> None:
        super().__init__(Protocol.NETFILTER)
        self._socket.setsockopt(Level.SOCKET, SO.SNDBUFFORCE, _SEND_BUFFER)

    @staticmethod
    def table(name: str) -> tuple[int, Request, bytes]:
        """A new table of the family inet; EEXIST if there is one of this name."""
        return _Message.NEWTABLE, Request.CREATE | Request.EXCLUSIVE, _family() + text(_Table.NAME, name)

    @staticmethod
    def without_table(name: str) -> tuple[int, Request, bytes]:
        """The end of a table and of all in it; ENOENT."""
        return _Message.DELTABLE, Request(0), _family() + text(_Table.NAME, name)

    @staticmethod
    def chain(table: str, name: str, direction: Direction, priority: int) -> tuple[int, Request, bytes]:
        """A chain that every packet passes which a filter at this place sees."""
        hook = nested(
            _Chain.HOOK,
            number(_Hook.NUMBER, direction),
            attribute(_Hook.PRIORITY, struct.pack(">i", priority)),
        )
        body = (
            text(_Chain.TABLE, table)
            + text(_Chain.NAME, name)
            + hook
            + number(_Chain.POLICY, _ACCEPT)
            + text(_Chain.TYPE, "filter")
        )
        return _Message.NEWCHAIN, Request.CREATE, _family() + body

    @staticmethod
    def set(table: str, name: str, key: SetKey, identity: int) -> tuple[int, Request, bytes]:
        """A set whose elements may have a time-out; ``identity``: another one for each set of a transaction."""
        body = (
            text(_Set.TABLE, table)
            + text(_Set.NAME, name)
            + number(_Set.FLAGS, _SET_TIMEOUT)
            + number(_Set.KEY_TYPE, key.type)
            + number(_Set.KEY_LENGTH, key.size)
            + number(_Set.ID, identity)
        )
        return _Message.NEWSET, Request.CREATE, _family() + body

    @staticmethod
    def rule(table: str, chain: str, expressions: Sequence[bytes]) -> tuple[int, Request, bytes]:
        """A rule at the end of a chain."""
        body = text(_Rule.TABLE, table) + text(_Rule.CHAIN, chain) + nested(_Rule.EXPRESSIONS, *expressions)
        return _Message.NEWRULE, Request.CREATE | Request.APPEND, _family() + body

    @staticmethod
    def elements(
        table: str, name: str, keys: Sequence[bytes], timeout_ms: int = 0
    ) -> Iterable[tuple[int, Request, bytes]]:
        """Elements of a set; ``timeout_ms``: after which they end by themselves, 0 never."""
        last = attribute(_Element.TIMEOUT, _U64.pack(timeout_ms)) if timeout_ms else b""
        head = _family() + text(_Elements.TABLE, table) + text(_Elements.SET, name)
        for start in range(0, len(keys), _ELEMENTS):
            items = (nested(_ITEM, value(_Element.KEY, key), last) for key in keys[start : start + _ELEMENTS])
            yield _Message.NEWSETELEM, Request.CREATE, head + nested(_Elements.LIST, *items)

    def commit(self, messages: Iterable[tuple[int, Request, bytes]]) -> None:
        """Make all changes or none. OSError of the first that was refused."""
        edge = _GENERIC.pack(socket.AF_UNSPEC, 0, _SUBSYSTEM)
        self.transaction((_Message.BATCH_BEGIN, edge), messages, (_Message.BATCH_END, edge))

    def tables(self) -> list[str]:
        """The names of all tables of the family inet."""
        return self._tables(_family())

    def of_all_families(self) -> list[str]:
        """The names of all tables."""
        return self._tables(_GENERIC.pack(socket.AF_UNSPEC, 0, 0))

    def _tables(self, family: bytes) -> list[str]:
        names = []
        for body in self.dump(_Message.GETTABLE, family):
            found = dict(attributes(body, _GENERIC.size))
            names.append(found[_Table.NAME].rstrip(b"\0").decode(errors="replace"))
        return names


def _family() -> bytes:
    return _GENERIC.pack(_INET, 0, 0)
