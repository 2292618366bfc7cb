"""Who has restricted himself by Landlock is refused in the stop, and runs on; nobody else is."""

from __future__ import annotations

import sys

import pytest
from state_moves import running

from checkpoint import procfs
from checkpoint.dump import Dump
from checkpoint.errors import InLandlockDomain
from checkpoint.image.frames import Kind

PROGRAM = """
import ctypes, os, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
user, how = int(sys.argv[1]), sys.argv[2]
def restrict():
    rights = (ctypes.c_uint64 * 1)(1 << 12)
    ruleset = libc.syscall(444, rights, 8, 0)
    assert ruleset >= 0 and libc.syscall(446, ruleset, 0) == 0
    os.close(ruleset)
if user:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
if how != "nothing":
    assert libc.prctl(38, 1, 0, 0, 0) == 0
if how == "all":
    restrict()
if how == "one thread":
    done = threading.Event()
    def work():
        restrict()
        done.set()
        time.sleep(1000)
    threading.Thread(target=work, daemon=True).start()
    done.wait()
os.write(1, b"ready\\n")
while True:
    time.sleep(0.01)
"""


def program(user: int, how: str) -> tuple[object, ...]:
    return (sys.executable, "-Ic", PROGRAM, user, how)


def goes_on(pid: int) -> bool:
    def switches() -> int:
        return int(procfs.read_status(pid)["voluntary_ctxt_switches"])

    before = switches()
    while switches() == before:
        pass
    return procfs.read_status(pid)["TracerPid"] == "0"


@pytest.mark.parametrize("user", [0, 65534])
@pytest.mark.parametrize("how", ["all", "one thread"])
def test_a_domain(user: int, how: str) -> None:
    with running(*program(user, how)) as pid:
        dump = Dump([pid])
        dump.prepare()
        name = f"pid {pid} thread" if how == "one thread" else f"pid {pid}"
        dump.stop()
        with pytest.raises(InLandlockDomain, match=name):
            list(dump.skeleton())
        dump.resume()
        assert goes_on(pid)


@pytest.mark.parametrize("user", [0, 65534])
@pytest.mark.parametrize("how", ["nothing", "no new privileges"])
def test_none(user: int, how: str) -> None:
    with running(*program(user, how)) as pid:
        dump = Dump([pid])
        dump.prepare()
        dump.stop()
        assert Kind.STATES in [kind for kind, _ in dump.skeleton()]
        dump.resume()
        assert goes_on(pid)
