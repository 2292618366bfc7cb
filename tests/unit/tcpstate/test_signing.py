"""Signed records: what is refused, and by which name."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpstate import codec
from tcpstate.errors import BadKeyFile, BadRecord, BadSignature, TcpmigError, UnsignedRecord, UntrustedKey
from tcpstate.record import ConnectionRecord
from tcpstate.signing import Policy, Signed, Signer, Verifier, generate_key, load_private, load_public, sign, verify
from tests.unit.tcpstate.test_keywords import RECORD


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("keys")
    generate_key(directory / "ours")
    generate_key(directory / "theirs")
    return directory


def test_a_signed_record_comes_back_whole(keys: Path) -> None:
    policy = Policy(trusted=(load_public(keys / "ours.pub"),))
    found = verify(sign(b"record", load_private(keys / "ours"), owner=1000), policy)
    assert (found.record, found.key, found.owner) == (b"record", policy.trusted[0], 1000)


def test_who_is_not_trusted_is_refused(keys: Path) -> None:
    policy = Policy(trusted=(load_public(keys / "ours.pub"),))
    with pytest.raises(UntrustedKey) as caught:
        verify(sign(b"record", load_private(keys / "theirs")), policy)
    assert caught.value.object == load_public(keys / "theirs.pub").hex()


def test_a_record_without_a_signature_is_refused_unless_the_policy_takes_it() -> None:
    with pytest.raises(UnsignedRecord):
        verify(b"record", Policy())
    found = verify(b"record", Policy(require=False))
    assert (found.record, found.key, found.owner) == (b"record", None, None)


@pytest.mark.parametrize("require", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"record": b"recorD"}, {"owner": 1001}, {"owner": None}, {"key": bytes(32)}, {"key": b""},
        {"signature": bytes(64)}, {"signature": b""},
    ],
)  # fmt: skip
def test_what_was_altered_is_refused_whatever_the_policy(keys: Path, change: dict[str, object], require: bool) -> None:
    signed = codec.unpack(Signed, sign(b"record", load_private(keys / "ours"), owner=1000))
    data = codec.pack(dataclasses.replace(signed, **change))  # type: ignore[arg-type]
    with pytest.raises(BadSignature):
        verify(data, Policy(trusted=(signed.key, bytes(32)), require=require))


def test_a_damaged_wrapping_does_not_pass_for_a_record_without_one(keys: Path) -> None:
    data = sign(b"record", load_private(keys / "ours"))
    for at in range(60, len(data)):
        with pytest.raises(TcpmigError):
            verify(data[:at], Policy(require=False))
    other = codec.unpack(Signed, data)
    with pytest.raises(BadRecord, match="version 2"):
        verify(codec.pack(dataclasses.replace(other, version=2)), Policy(require=False))


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_whatever_comes_only_the_documented_errors(data: bytes) -> None:
    try:
        verify(data, Policy())
    except (UnsignedRecord, BadRecord, BadSignature, UntrustedKey):
        return
    raise AssertionError("it was taken")


@settings(max_examples=300)
@given(st.data())
def test_one_flipped_bit_is_found(keys: Path, data: st.DataObject) -> None:
    policy = Policy(trusted=(load_public(keys / "ours.pub"),))
    signed = bytearray(sign(b"a record of some length", load_private(keys / "ours"), owner=7))
    at = data.draw(st.integers(0, len(signed) * 8 - 1))
    signed[at // 8] ^= 1 << at % 8
    with pytest.raises((UnsignedRecord, BadRecord, BadSignature, UntrustedKey)):
        verify(bytes(signed), policy)


def test_key_files_are_private(keys: Path) -> None:
    assert (keys / "ours").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        generate_key(keys / "ours")
    exposed = keys / "exposed"
    exposed.write_bytes((keys / "ours").read_bytes())
    exposed.chmod(0o640)
    with pytest.raises(BadKeyFile, match="0640"):
        load_private(exposed)
    exposed.chmod(0o600)
    assert load_private(exposed)
    for content in (b"", b"nonsense", (keys / "ours.pub").read_bytes()):
        exposed.write_bytes(content)
        with pytest.raises(BadKeyFile):
            load_private(exposed)
    with pytest.raises(BadKeyFile):
        load_public(keys / "ours")
    os.unlink(exposed)


def test_the_example_of_the_reference_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs/reference/tcpstate.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n([^`]*?tcpstate\.signing.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"record": RECORD, "ConnectionRecord": ConnectionRecord}
    exec(compile(example, "example", "exec"), names)
    assert names["record"] == RECORD


def openssl_key(folder: Path, name: str, algorithm: str = "ed25519") -> tuple[Path, Path]:
    """Keys as an administrator may make them."""
    private, public = folder / f"{name}.key", folder / f"{name}.pem"
    for command in (
        ["openssl", "genpkey", "-algorithm", algorithm, "-out", private],
        ["openssl", "pkey", "-in", private, "-pubout", "-out", public],
    ):
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
    private.chmod(0o600)
    return private, public


def test_a_chaperone_takes_what_another_has_signed_and_for_whom(tmp_path: Path) -> None:
    private, public = openssl_key(tmp_path, "a")
    stranger, _ = openssl_key(tmp_path, "b")
    verifier = Verifier([public])
    assert verifier(Signer(private)(b"record", 1001)) == (b"record", 1001)
    with pytest.raises(UntrustedKey):
        verifier(Signer(stranger)(b"record", 1001))
    for unsaid in (b"record", sign(b"record", load_private(private))):
        with pytest.raises(UnsignedRecord):
            verifier(unsaid)


def test_a_chaperone_does_not_start_with_keys_that_are_none(tmp_path: Path) -> None:
    private, public = openssl_key(tmp_path, "a")
    other_private, other_public = openssl_key(tmp_path, "b", "X25519")
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (public, other_private, tmp_path / "none", tmp_path, tmp_path / "pipe"):
        with pytest.raises(BadKeyFile):
            Signer(path)
    for path in (private, other_public, tmp_path / "none", tmp_path, tmp_path / "pipe"):
        with pytest.raises(BadKeyFile):
            Verifier([path])
