"""aarch64, on Debian's kernel for arm64, in an emulated machine: the library of connections, and processes. One boot;
the processes take half an hour."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyroute2
import pytest

from checkpoint.arch.aarch64 import engine, init, stub
from tcpstate.kernel.machine import aarch64
from tests.guest import Guest, wheels
from tests.guest.debian import ARM64

CHECKOUT = Path(__file__).resolve().parents[2]
#: the calls of the machine; a connection in every state from one network namespace to another
CONNECTIONS = ("tests/guest/aarch64/test_on_aarch64_calls.py", "tests/guest/inside/test_in_guest_states.py")
PROCESSES = ("tests/guest/aarch64/test_on_aarch64_commands.py", "tests/guest/aarch64/test_on_aarch64_process.py")
#: Debian's pyroute2 is too old; this one is the same on every machine
PYROUTE2 = Path(pyroute2.__file__).parent
SITE = "/usr/local/lib/python3.11/dist-packages"
#: what Debian has not, or not as new; with machine code in it
WHEELS = ("blake3", "xxhash")
#: every Python there keeps what it compiles, which is half of the time that it takes to begin
KEEPING = "import sys; sys.pycache_prefix = '/tmp/pyc'; sys.dont_write_bytecode = False\n"


def assembled(source: str, folder: Path) -> tuple[bytes, dict[str, int]]:
    """The code, and where its labels are."""
    text, obj, flat = folder / "code.s", folder / "code.o", folder / "code.bin"
    text.write_text(source)
    subprocess.run(["aarch64-linux-gnu-as", "-o", obj, text], check=True)
    subprocess.run(["aarch64-linux-gnu-objcopy", "-O", "binary", "-j", ".text", obj, flat], check=True)
    told = subprocess.run(["aarch64-linux-gnu-nm", obj], check=True, capture_output=True, text=True).stdout
    return flat.read_bytes(), {line.split()[2]: int(line.split()[0], 16) for line in told.splitlines()}


def test_the_routine_is_its_source_assembled(tmp_path: Path) -> None:
    assert assembled(aarch64.SOURCE, tmp_path)[0] == aarch64.ROUTINE
    # position-independent: the same bytes wherever it stands
    assert assembled(f"        .text\n{aarch64.WALK_SOURCE}", tmp_path)[0] in aarch64.ROUTINE


@pytest.mark.parametrize(
    ("source", "code"),
    [(stub.SPAWN_SOURCE, stub.SPAWN), (stub.STUB_SOURCE, stub.STUB), (init.INIT_SOURCE, init.INIT)],
    ids=["spawn", "stub", "init"],
)
def test_programs_are_their_sources_assembled(source: str, code: bytes, tmp_path: Path) -> None:
    assert assembled(source, tmp_path)[0] == code


@pytest.mark.parametrize(
    ("name", "source", "code", "stop", "behind"),
    [
        ("boot", engine.BOOT_SOURCE, engine.BOOT, engine.BOOT_STOP, 0),
        ("engine", engine.ENGINE_SOURCE, engine.ENGINE, engine.ENGINE_STOP, 24),
    ],
)
def test_the_engine_is_its_source_assembled(
    name: str, source: str, code: bytes, stop: int, behind: int, tmp_path: Path
) -> None:
    found, labels = assembled(source, tmp_path)
    assert found == code
    assert (labels[name], labels[f"{name}_stop"]) == (0, stop)
    assert labels["frame"] == len(code) - engine._FRAME_SIZE - behind
    assert labels["frame"] % 16 == 0  # sp is to point into it


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    others = wheels.fetch(WHEELS, "manylinux2014_aarch64")
    # one CPU: every one more is paid for by all the others
    with Guest(ARM64, see=[CHECKOUT, PYROUTE2, others], cpus=1) as booted:
        assert booted.run(["uname", "-m"]).stdout == "aarch64\n"
        assert booted.run(["mkdir", "-p", SITE]).returncode == 0
        assert booted.run(["ln", "-s", str(PYROUTE2), f"{SITE}/pyroute2"]).returncode == 0
        assert booted.run(["/bin/sh", "-c", f"cat > {SITE}/keeping.pth"], stdin=KEEPING.encode()).returncode == 0
        # the test hosts in there do not see all of /var
        assert booted.run(["cp", "-r", f"{others}/.", SITE]).returncode == 0
        yield booted


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("inside", [CONNECTIONS, PROCESSES], ids=["connections", "processes"])
def test_all_is_well_there(guest: Guest, inside: tuple[str, ...]) -> None:
    argv = ["python3", "-m", "pytest", "-v", "--color=no", "--tb=short", "-p", "no:cacheprovider", *inside]
    done = guest.run(argv, cwd=CHECKOUT, timeout=7000)
    found = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr + guest.console()[-2000:]
    assert found is not None, done.stdout
    assert int(found[1]) == len(re.findall(r"^\S+::.* PASSED", done.stdout, re.MULTILINE))
    assert "SKIPPED" not in done.stdout
