"""On Debian's own kernel (6.1 with bookworm), in an emulated machine: what this one lacks (kTLS, VRFs), and what is
older there. One boot, one pytest in it; minutes, because it runs at a tenth of the speed."""

import re
import sys
from pathlib import Path

from tests.guest import Guest

CHECKOUT = Path(__file__).resolve().parents[2]
#: and what of this kernel's tests takes another way there
INSIDE = (
    "tests/guest/inside",
    "tests/kernel/test_corked_facts.py",
    "tests/system/engine/test_engine_stub.py::test_a_time_namespace_that_was_unshared_is_entered",
)
_PYTEST = (
    "-m",
    "pytest",
    "-v",
    "--color=no",
    "--tb=short",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "--timeout=900",
)


def test_what_is_tested_inside_passes_there() -> None:
    with Guest() as guest:
        done = guest.run([sys.executable, *_PYTEST, *INSIDE], cwd=CHECKOUT, timeout=3000)
        found = re.search(r"(\d+) passed", done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr + guest.console()[-2000:]
        assert found is not None, done.stdout
        # none is skipped: all that is asked for is in that kernel
        assert int(found[1]) == len(re.findall(r"^\S+::\S+ PASSED", done.stdout, re.MULTILINE))
        assert "SKIPPED" not in done.stdout


def test_streams_and_statuses_of_commands_in_a_guest() -> None:
    with Guest() as guest:
        done = guest.run(["/bin/sh", "-c", "uname -r; cat; echo no >&2; exit 3"], stdin=b"there\n")
        assert (done.returncode, done.stdout, done.stderr) == (3, f"{guest.kernel.release}\nthere\n", "no\n")
        assert guest.run(["/nowhere"]).returncode == 127
