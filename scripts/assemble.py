#!/usr/bin/env python3
"""Assemble the machine code of the project again, after a change of its source, and write the bytes beside it.

The sources and the bytes stand in the same files; tests compare them.  Needs binutils (of both machines) and ruff.
Usage: .venv/bin/python scripts/assemble.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: file -> (name of the source, name of the bytes, {name of an offset: its label})
PIECES: dict[str, list[tuple[str, str, dict[str, str]]]] = {
    "tcpstate/kernel/machine/x86_64.py": [("SOURCE", "ROUTINE", {})],
    "tcpstate/kernel/machine/aarch64.py": [("SOURCE", "ROUTINE", {})],
    "checkpoint/arch/x86_64/engine.py": [
        ("BOOT_SOURCE", "BOOT", {"BOOT_STOP": "boot_stop"}),
        ("ENGINE_SOURCE", "ENGINE", {"ENGINE_STOP": "engine_stop"}),
    ],
    "checkpoint/arch/x86_64/stub.py": [("SPAWN_SOURCE", "SPAWN", {}), ("STUB_SOURCE", "STUB", {})],
}


def assemble(source: str, machine: str) -> tuple[bytes, dict[str, int]]:
    """The bytes, and where the labels are."""
    prefix, options = {"x86_64": ("", ["--64"]), "aarch64": ("aarch64-linux-gnu-", [])}[machine]
    with tempfile.TemporaryDirectory() as directory:
        text, obj, flat = (Path(directory) / name for name in ("code.s", "code.o", "code.bin"))
        text.write_text(source, encoding="ascii")
        subprocess.run([f"{prefix}as", *options, "-o", obj, text], check=True)
        subprocess.run([f"{prefix}objcopy", "-O", "binary", "-j", ".text", obj, flat], check=True)
        names = subprocess.run([f"{prefix}nm", obj], check=True, capture_output=True, text=True).stdout
        labels = {words[2]: int(words[0], 16) for words in map(str.split, names.splitlines())}
        return flat.read_bytes(), labels


def replaced(text: str, pattern: str, new: str) -> str:
    """``text`` with the one place that matches replaced."""
    text, count = re.subn(pattern, lambda _: new, text, flags=re.MULTILINE)
    if count != 1:
        raise SystemExit(f"{pattern} matches {count} times")
    return text


def main() -> int:
    """Assemble all pieces; 1 if anything has changed."""
    sys.path.insert(0, str(ROOT))
    changed = 0
    for name, pieces in PIECES.items():
        path = ROOT / name
        before = text = path.read_text(encoding="utf-8")
        module = __import__(name.removesuffix(".py").replace("/", "."), fromlist=["*"])
        for source, code, offsets in pieces:
            data, labels = assemble(getattr(module, source), "aarch64" if "aarch64" in name else "x86_64")
            lines = "\n".join(f'    "{data[at : at + 40].hex()}"' for at in range(0, len(data), 40))
            text = replaced(
                text, rf"^{code}: Final = bytes\.fromhex\([^)]*\)", f"{code}: Final = bytes.fromhex(\n{lines}\n)"
            )
            for offset, label in offsets.items():
                text = replaced(text, rf"^{offset}: Final = .*$", f"{offset}: Final = {labels[label]:#x}")
        ruff = [str(Path(sys.executable).parent / "ruff"), "format", "--stdin-filename", str(path), "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
        if text != before:
            path.write_text(text, encoding="utf-8")
            print(f"changed: {name}")
            changed = 1
    return changed


if __name__ == "__main__":
    sys.exit(main())
