"""The bytes that ask the CPU for its XSAVE layout are what their source says."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

from checkpoint.arch.x86_64 import xstate


def test_the_blob_is_its_source_assembled(tmp_path: Path) -> None:
    source, obj, binary = (tmp_path / name for name in ("cpuid.s", "cpuid.o", "cpuid.bin"))
    source.write_text(xstate._CPUID_SOURCE)
    subprocess.run(["as", source, "-o", obj], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", obj, binary], check=True)
    assert binary.read_bytes() == xstate._CPUID


def test_this_cpu_has_a_layout():
    layout = xstate.xstate_layout()
    assert layout
    ordered = sorted(layout, key=lambda component: component.offset)
    assert all(a.end <= b.offset for a, b in itertools.pairwise(ordered))
