"""Signed records: what a chaperone has exported, for whom, such that another one can trust it (paper, 5.6).

A record says what a connection is; whoever may rebuild any record may claim to be in any connection that his address
and ports allow.  With a seal only what a trusted chaperone has read from a kernel is rebuilt, and only for the user
whose connection it was.  The signature (Ed25519) covers the record, the uid and a fixed prefix, so that no other
signature of the same key can be taken for it.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tcpstate import codec
from tcpstate.errors import BadRecord, KeyUnusable, UntrustedRecord

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["Sealed", "Signer", "Verifier"]

_PREFIX = b"tcpmig: a connection as its owner's chaperone has exported it\0"
_UID = struct.Struct("!Q")
_KEY_SIZE = 32
_SIGNATURE_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """What leaves the host.

    record     the bytes of a ConnectionRecord
    uid        whose connection it was
    key        the public key, 32 bytes
    signature  64 bytes
    """

    record: bytes
    uid: int
    key: bytes
    signature: bytes

    def __post_init__(self) -> None:
        if len(self.key) != _KEY_SIZE or len(self.signature) != _SIGNATURE_SIZE or not 0 <= self.uid < 1 << 32:
            raise ValueError("key, signature or uid has a wrong size")


def _signed(record: bytes, uid: int) -> bytes:
    return _PREFIX + _UID.pack(uid) + record


class Signer:
    """Seals with the private key in a PEM file, which must be its owner's alone. KeyUnusable."""

    def __init__(self, path: Path) -> None:
        mode = _read_mode(path)
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise KeyUnusable("others than its owner may read the private key", object=str(path))
        self._key = _private(path)
        self._public = self._key.public_key().public_bytes_raw()

    def __call__(self, record: bytes, uid: int) -> bytes:
        """The sealed record."""
        signature = self._key.sign(_signed(record, uid))
        return codec.pack(Sealed(record=record, uid=uid, key=self._public, signature=signature))


class Verifier:
    """Opens what is sealed with one of the public keys in PEM files. KeyUnusable."""

    def __init__(self, paths: Sequence[Path]) -> None:
        keys = [_public(path) for path in paths]
        self._trusted = {key.public_bytes_raw(): key for key in keys}

    def __call__(self, data: bytes) -> tuple[bytes, int]:
        """The record, and whose connection it was. UntrustedRecord."""
        from cryptography.exceptions import InvalidSignature

        try:
            sealed = codec.unpack(Sealed, data)
        except (BadRecord, UnicodeError, OverflowError):
            raise UntrustedRecord("the record is not signed") from None
        key = self._trusted.get(sealed.key)
        if key is None:
            raise UntrustedRecord("the record is signed with a key that is not trusted here", object=sealed.key.hex())
        try:
            key.verify(sealed.signature, _signed(sealed.record, sealed.uid))
        except InvalidSignature:
            raise UntrustedRecord("the record was altered after it was signed", object=sealed.key.hex()) from None
        return sealed.record, sealed.uid


def _read_mode(path: Path) -> int:
    try:
        return os.stat(path).st_mode
    except OSError as error:
        raise KeyUnusable(f"it cannot be read: {error.strerror}", object=str(path)) from None


def _pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KeyUnusable(f"it cannot be read: {error.strerror}", object=str(path)) from None


def _private(path: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_pem(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # not what it holds: the message of the library may quote it
        raise KeyUnusable("it holds no private key without a passphrase", object=str(path)) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyUnusable("it holds no Ed25519 key", object=str(path))
    return key


def _public(path: Path) -> Ed25519PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_pem(path))
    except (ValueError, UnsupportedAlgorithm):
        raise KeyUnusable("it holds no public key", object=str(path)) from None
    if not isinstance(key, Ed25519PublicKey):
        raise KeyUnusable("it holds no Ed25519 key", object=str(path))
    return key
