"""Errors of records of connections, of single items of their state, and of signatures."""

from __future__ import annotations

from tcpstate.errors.tree import Outcome, TcpmigError

__all__ = [
    "BadExtents",
    "BadKeyFile",
    "BadRecord",
    "BadSignature",
    "BadStateItem",
    "NotSettable",
    "RecordOfAnother",
    "StateNotSet",
    "UnknownHardState",
    "UnknownStateKeyword",
    "UnsignedRecord",
    "UntrustedKey",
]


class BadRecord(TcpmigError):
    """A portable record (of a connection, or inside an image or a message) is truncated, malformed, of an unknown
    version, or holds a value outside its range. Nothing was changed."""

    code = "TM-0203"
    outcome = Outcome.REFUSED
    fix = "Make the record again; do not edit it by hand."


class RecordOfAnother(TcpmigError):
    """A chaperone that only rebuilds signed records was given one that was exported for another user. Nothing was
    built."""

    code = "TM-0267"
    outcome = Outcome.REFUSED
    fix = "Let the user whose connection it was ask for it, or root."


class UnknownStateKeyword(TcpmigError):
    """There is no item of a connection's state with this keyword. Keywords stand in docs/reference/keywords.md; the
    wild cards ALL, ALL_HARD and ALL_SOFT need none. Nothing was changed."""

    code = "TM-0220"
    outcome = Outcome.USAGE
    fix = "Look the keyword up in docs/reference/keywords.md."


class NotSettable(TcpmigError):
    """This item of the state can be read only: it follows from others, counts what has happened, or this kernel has no
    way to write it. Nothing was changed."""

    code = "TM-0221"
    outcome = Outcome.REFUSED
    fix = "See the column `set` in docs/reference/keywords.md."


class BadStateItem(TcpmigError):
    """The value of a state item has the wrong type, lies outside its range, or contradicts the rest of the connection's
    state (more bytes sent than there are, a window without a connection). None of the items was set."""

    code = "TM-0222"
    outcome = Outcome.REFUSED
    fix = "See docs/reference/keywords.md for datatype, unit and range."


class StateNotSet(TcpmigError):
    """The kernel refused to take one of the items that were to be set. Those that had been set were given their former
    values again: the connection is as it was."""

    code = "TM-0223"
    fix = "See the named item and the kernel's reason; set the others without it."


class BadExtents(TcpmigError):
    """Extents of pending data are in ascending order, do not overlap, begin at or after 0, and fit the receive window.
    Nothing was changed."""

    code = "TM-0225"
    outcome = Outcome.REFUSED
    fix = "Give the extents as transport_read_pending returned them."


class UnknownHardState(TcpmigError):
    """A record carries an item of hard state that this version does not know. To go on without it would not be the same
    connection for its peer. Nothing was built."""

    code = "TM-0227"
    outcome = Outcome.REFUSED
    fix = "Use the version of tcpmig that wrote the record, or a younger one."


class UnsignedRecord(TcpmigError):
    """The policy of this host takes only records that carry a signature, and this one carries none. Nothing was
    built."""

    code = "TM-0230"
    outcome = Outcome.REFUSED
    fix = "Sign the record where it is made, with a key that this host trusts."


class BadSignature(TcpmigError):
    """A record's signature does not belong to its bytes: it was altered on its way, or signed with another key than the
    one it names. Nothing was built."""

    code = "TM-0231"
    outcome = Outcome.REFUSED
    fix = "Fetch the record again from where it was made."


class UntrustedKey(TcpmigError):
    """A record is signed, but by a key that this host's policy does not name. Nothing was built."""

    code = "TM-0232"
    outcome = Outcome.REFUSED
    fix = "Add the signer's public key to the policy, if it is to be trusted."


class BadKeyFile(TcpmigError):
    """A key file cannot be read, is no Ed25519 key in PEM form without a passphrase, or is a private key that others
    than its owner may read (its mode must be 0600 or stricter)."""

    code = "TM-0233"
    outcome = Outcome.REFUSED
    fix = "Make a key with tcpstate.signing.generate_key or `openssl genpkey -algorithm ed25519`; `chmod 600` the file."
