"""Sealed records: only as they were exported, only by keys that are trusted."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstate import codec
from tcpstate.chaperone.seal import Sealed, Signer, Verifier
from tcpstate.errors import KeyUnusable, UntrustedRecord


def make_key(folder: Path, name: str, algorithm: str = "ed25519") -> tuple[Path, Path]:
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    for command in (
        ["openssl", "genpkey", "-algorithm", algorithm, "-out", private],
        ["openssl", "pkey", "-in", private, "-pubout", "-out", public],
    ):
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
    private.chmod(0o600)
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Signer, Verifier, Signer]:
    """A signer, who trusts it, and a signer who is not trusted."""
    folder = tmp_path_factory.mktemp("keys")
    private, public = make_key(folder, "a")
    other_private, _ = make_key(folder, "b")
    return Signer(private), Verifier([public]), Signer(other_private)


def test_what_was_sealed_is_opened(keys: tuple[Signer, Verifier, Signer]) -> None:
    sign, verify, _ = keys
    assert verify(sign(b"record", 1001)) == (b"record", 1001)


def test_what_was_not_is_refused(keys: tuple[Signer, Verifier, Signer]) -> None:
    sign, verify, stranger = keys
    sealed = codec.unpack(Sealed, sign(b"record", 1001))
    for odd in (
        replace(sealed, uid=1002),
        replace(sealed, record=b"Record"),
        replace(sealed, signature=bytes(64)),
        replace(sealed, key=codec.unpack(Sealed, stranger(b"record", 1001)).key),
    ):
        with pytest.raises(UntrustedRecord):
            verify(codec.pack(odd))
    for data in (b"record", b"", stranger(b"record", 1001)):
        with pytest.raises(UntrustedRecord):
            verify(data)


@given(st.integers(0), st.integers(1, 255))
def test_no_bit_may_change(keys: tuple[Signer, Verifier, Signer], place: int, change: int) -> None:
    sign, verify, _ = keys
    data = bytearray(sign(b"record", 1001))
    data[place % len(data)] ^= change
    with pytest.raises(UntrustedRecord):
        verify(bytes(data))


def test_keys_that_are_none_are_refused(tmp_path: Path) -> None:
    private, public = make_key(tmp_path, "a")
    other_private, other_public = make_key(tmp_path, "b", "X25519")
    for make in (
        lambda: Signer(public),
        lambda: Signer(other_private),
        lambda: Signer(tmp_path / "none"),
        lambda: Verifier([private]),
        lambda: Verifier([other_public]),
        lambda: Verifier([tmp_path]),
    ):
        with pytest.raises(KeyUnusable):
            make()
    private.chmod(0o640)
    with pytest.raises(KeyUnusable, match="others"):
        Signer(private)
