"""Packages of this Python that a guest with another machine cannot take from here: the same versions, made for it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

from tests.guest.debian import KEPT

__all__ = ["fetch"]

#: of Debian's Python in the guest
_PYTHON: Final = "3.11"


def fetch(names: Sequence[str], platform: str) -> Path:
    """A folder with the packages, without what they depend on, fetched by pip at the first use and kept.
    CalledProcessError."""
    wanted = [f"{name}=={version(name)}" for name in names]
    home = KEPT / "-".join(["wheels", platform, *wanted])
    if home.exists():
        return home
    KEPT.mkdir(mode=0o700, parents=True, exist_ok=True)
    # made under another name, so that what is there is whole
    fresh = home.with_name(home.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary=:all:"]
    subprocess.run(
        [*argv, f"--platform={platform}", f"--python-version={_PYTHON}", f"--dest={fresh}", *wanted], check=True
    )
    for wheel in fresh.glob("*.whl"):
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(fresh)
        wheel.unlink()
    return fresh.rename(home)
