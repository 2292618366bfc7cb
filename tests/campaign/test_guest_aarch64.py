"""Connections on aarch64: the library (tcpstate) on Debian's kernel for arm64, in an emulated machine. One boot."""

import re
import subprocess
from pathlib import Path

from tcpstate.kernel.machine import aarch64
from tests.guest import Guest
from tests.guest.debian import ARM64

CHECKOUT = Path(__file__).resolve().parents[2]
#: the calls of the machine; a connection in every state from one network namespace to another
INSIDE = ("tests/guest/aarch64", "tests/guest/inside/test_in_guest_states.py")


def assembled(source: str, folder: Path) -> bytes:
    text, obj, flat = folder / "code.s", folder / "code.o", folder / "code.bin"
    text.write_text(source)
    subprocess.run(["aarch64-linux-gnu-as", "-o", obj, text], check=True)
    subprocess.run(["aarch64-linux-gnu-objcopy", "-O", "binary", "-j", ".text", obj, flat], check=True)
    return flat.read_bytes()


def test_the_routine_is_its_source_assembled(tmp_path: Path) -> None:
    assert assembled(aarch64.SOURCE, tmp_path) == aarch64.ROUTINE
    # position-independent: the same bytes wherever it stands
    assert assembled(f"        .text\n{aarch64.WALK_SOURCE}", tmp_path) in aarch64.ROUTINE


def test_connections_move_there() -> None:
    with Guest(ARM64, see=[CHECKOUT]) as guest:
        assert guest.run(["uname", "-m"]).stdout == "aarch64\n"
        argv = ["python3", "-m", "pytest", "-v", "--color=no", "--tb=short", "-p", "no:cacheprovider", *INSIDE]
        done = guest.run(argv, cwd=CHECKOUT, env={"PYTHONDONTWRITEBYTECODE": "1"}, timeout=3000)
        found = re.search(r"(\d+) passed", done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr + guest.console()[-2000:]
        assert found is not None, done.stdout
        assert int(found[1]) == len(re.findall(r"^\S+::\S+ PASSED", done.stdout, re.MULTILINE))
        assert "SKIPPED" not in done.stdout
