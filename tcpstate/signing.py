"""Signed records (paper, 5.6): who exported a connection, and that nobody has altered it since.

A record is wrapped with an Ed25519 signature (RFC 8032) over its bytes, the public key of the signer and the user it
was exported for.  A host has a :class:`Policy`: whose signatures it takes, and whether it takes records that carry
none::

    generate_key(Path("/etc/tcpmig/key"))                       # 0600, and /etc/tcpmig/key.pub
    data = sign(record.to_bytes(), load_private(Path("/etc/tcpmig/key")))
    ...
    policy = Policy(trusted=(load_public(Path("/etc/tcpmig/peer.pub")),))
    record = ConnectionRecord.from_bytes(verify(data, policy).record)

A chaperone signs what it has exported, for whom, so that another one can trust it (:class:`Signer`,
:class:`Verifier`): whoever may rebuild any record may claim to be in any connection that his address and ports allow.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tcpstate import codec
from tcpstate.errors import BadKeyFile, BadRecord, BadSignature, UnsignedRecord, UntrustedKey
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = [
    "Policy",
    "Signed",
    "Signer",
    "Verified",
    "Verifier",
    "generate_key",
    "load_private",
    "load_public",
    "sign",
    "verify",
]

_FORM: Final = "tcpmig-signed-record"
_VERSION: Final = 1
_KEY_SIZE: Final = 32
_SIGNATURE_SIZE: Final = 64
_OTHERS: Final = 0o077


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """The wrapping.

    form, version  what this is
    key            public key of the signer, 32 bytes
    owner          user that the record was exported for; None: not told
    record         the bytes of the record
    signature      over all of that
    """

    form: str
    version: int
    key: bytes
    record: bytes
    signature: bytes
    owner: int | None = None

    def message(self) -> bytes:
        """What is signed: lengths first, so that no two wrappings have the same."""
        owner = b"" if self.owner is None else str(self.owner).encode("ascii")
        head = f"{self.form}\n{self.version}\n{len(owner)}\n{len(self.record)}\n".encode("ascii")
        return head + self.key + owner + self.record


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What records a host takes.

    trusted  public keys, 32 bytes each, whose signatures count
    require  whether a record without a signature is refused; one with a bad signature always is
    """

    trusted: tuple[bytes, ...] = ()
    require: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What :func:`verify` found.

    record  the bytes of the record
    key     public key of the signer; None: it carries no signature
    owner   user that it was exported for; None: not told
    """

    record: bytes
    key: bytes | None
    owner: int | None


def generate_key(path: Path) -> bytes:
    """Make a key: the private half in ``path``, 0600, the public half beside it with ``.pub``. The public key's bytes.

    FileExistsError; OSError.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for place, data, mode in ((path, private, 0o600), (path.with_name(path.name + ".pub"), public, 0o644)):
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    return key.public_key().public_bytes_raw()


def _read(path: Path) -> tuple[bytes, int]:
    """What a regular file holds, and its mode: of the open file, the name may lead elsewhere a moment later."""
    try:
        # not waiting: it may be a pipe that nobody writes to
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise BadKeyFile("it is no regular file", object=str(path))
            return file.read(), mode
    except OSError as error:
        raise BadKeyFile(f"it cannot be read: {error.strerror}", object=str(path)) from None


def load_private(path: Path) -> Ed25519PrivateKey:
    """The private key in a PEM file that only its owner may read. BadKeyFile."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    data, mode = _read(path)
    if mode & _OTHERS:
        raise BadKeyFile(f"others may read it (mode {stat.S_IMODE(mode):04o})", object=str(path))
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # the reason might quote the key
        raise BadKeyFile("it is no private key in PEM form without a password", object=str(path)) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise BadKeyFile("it is no Ed25519 key", object=str(path))
    return key


def load_public(path: Path) -> bytes:
    """The public key in a PEM file, 32 bytes. BadKeyFile."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = serialization.load_pem_public_key(_read(path)[0])
    except (ValueError, UnsupportedAlgorithm):
        raise BadKeyFile("it is no public key in PEM form", object=str(path)) from None
    if not isinstance(key, Ed25519PublicKey):
        raise BadKeyFile("it is no Ed25519 key", object=str(path))
    return key.public_bytes_raw()


def sign(record: bytes, key: Ed25519PrivateKey, owner: int | None = None) -> bytes:
    """The record's bytes with a signature, for :func:`verify`; ``owner``: the user that it is exported for."""
    bare = Signed(
        form=_FORM, version=_VERSION, key=key.public_key().public_bytes_raw(), record=record, signature=b"", owner=owner
    )
    return codec.pack(
        Signed(
            form=_FORM, version=_VERSION, key=bare.key, record=record, signature=key.sign(bare.message()), owner=owner
        )
    )


def verify(data: bytes, policy: Policy) -> Verified:
    """The record in ``data``, if the policy takes it.

    UnsignedRecord, UntrustedKey, BadSignature; BadRecord for what is neither a record nor a signed one. What comes back
    unsigned is not looked at here.
    """
    signed = _unwrapped(data)
    if signed is None:
        if policy.require:
            raise UnsignedRecord("the record carries no signature")
        return Verified(record=data, key=None, owner=None)
    # what is said of the key is only believed once the signature holds
    if not _holds(signed):
        raise BadSignature("its signature does not hold")
    if signed.key not in policy.trusted:
        raise UntrustedKey("its signer is not trusted here", object=signed.key.hex())
    return Verified(record=signed.record, key=signed.key, owner=signed.owner)


def _unwrapped(data: bytes) -> Signed | None:
    """The wrapping; None if ``data`` is something else. BadRecord if it is a wrapping that is damaged."""
    try:
        signed = codec.unpack(Signed, data)
    except (BadRecord, UnicodeError, OverflowError):
        if _FORM.encode("ascii") in data[:_HEAD]:
            raise BadRecord("its wrapping is damaged") from None
        return None
    if signed.form != _FORM:
        return None
    if signed.version != _VERSION:
        raise BadRecord(f"version {signed.version} of a signed record is unknown, {_VERSION} is known")
    return signed


#: the form is the first entry of the map
_HEAD: Final = 64


def _holds(signed: Signed) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if len(signed.key) != _KEY_SIZE or len(signed.signature) != _SIGNATURE_SIZE:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(signed.key).verify(signed.signature, signed.message())
    except (InvalidSignature, ValueError):
        return False
    return True


class Signer:
    """Signs with the private key in a file: a record, and for whom it was exported. BadKeyFile."""

    def __init__(self, path: Path) -> None:
        self._key = load_private(path)

    def __call__(self, record: bytes, uid: int) -> bytes:
        """The signed record."""
        return sign(record, self._key, owner=uid)


class Verifier:
    """Takes what is signed with one of the keys in files, and for somebody. BadKeyFile."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._policy = Policy(trusted=tuple(map(load_public, paths)))

    def __call__(self, data: bytes) -> tuple[bytes, int]:
        """The record, and whose connection it was. UnsignedRecord, UntrustedKey, BadSignature, BadRecord."""
        found = verify(data, self._policy)
        if found.owner is None:
            raise UnsignedRecord("its signature does not say for whom it was exported")
        return found.record, found.owner
