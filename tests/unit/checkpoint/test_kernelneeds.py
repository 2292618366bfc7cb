"""What processes use of their kernel, and what is said where it is missing."""

from __future__ import annotations

import pytest

from checkpoint import kernelneeds
from checkpoint.verdict import Status


def test_what_is_here_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernelneeds._HERE, kernelneeds.GUARDS, (lambda: True, "6.13"))
    assert kernelneeds.judge([kernelneeds.GUARDS]) == []


def test_what_is_missing_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernelneeds._HERE, kernelneeds.GUARDS, (lambda: False, "6.13"))
    (verdict,) = kernelneeds.judge([kernelneeds.GUARDS])
    assert (verdict.status, verdict.code, verdict.subject) == (Status.REFUSE, "TM-0742", "guard regions")
    assert "6.13" in verdict.text


def test_what_a_younger_tcpmig_asks_for_is_refused() -> None:
    (verdict,) = kernelneeds.judge(["teleportation"])
    assert (verdict.status, verdict.code) == (Status.REFUSE, "TM-0742")
    assert "does not know" in verdict.text
