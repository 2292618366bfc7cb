"""Paths in records: Linux names files by bytes, which need not be UTF-8."""

from __future__ import annotations

import os
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from tcpstate.codec import pack, unpack


@dataclass(frozen=True)
class Named:
    path: str


@given(st.binary())
def test_every_path_comes_back(name: bytes) -> None:
    record = Named(os.fsdecode(name))
    assert unpack(Named, pack(record)) == record
