"""Who a process is: users and groups, capabilities, names, parents' wishes."""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Iterator

from tests.system.state.calls import call, libc, prctl, status, threaded
from tests.system.state.case import Here, case

CAPGET, CAPSET, SETFSUID, SETFSGID, SETRESUID, SETRESGID, SETGROUPS = 125, 126, 122, 123, 117, 119, 116
PR_PDEATHSIG, PR_DUMPABLE, PR_KEEPCAPS, PR_NAME, PR_SECUREBITS, PR_NNP, PR_SUBREAPER = 1, 4, 8, 15, 28, 38, 36
SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def header() -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(struct.pack("<Ii", 0x20080522, 0), 8)


def set_capabilities(effective: int, permitted: int, inheritable: int) -> None:
    low = (effective & 0xFFFFFFFF, permitted & 0xFFFFFFFF, inheritable & 0xFFFFFFFF)
    high = (effective >> 32, permitted >> 32, inheritable >> 32)
    call(CAPSET, header(), ctypes.create_string_buffer(struct.pack("<6I", *low, *high), 24))


@case("state/credentials")
def another_user(here: Here) -> Iterator[None]:
    os.setgroups([30, 31, 4000])
    os.setresgid(1001, 1002, 1003)
    os.setresuid(2001, 2002, 2003)
    yield
    assert os.getresuid() == (2001, 2002, 2003)
    assert os.getresgid() == (1001, 1002, 1003)
    assert os.getgroups() == [30, 31, 4000]
    assert int(status("CapEff"), 16) == 0


@case("state/credentials")
def ids_of_file_access(here: Here) -> Iterator[None]:
    call(SETFSUID, 3001)
    call(SETFSGID, 3002)
    yield
    assert status("Uid").split() == ["0", "0", "0", "3001"]
    assert status("Gid").split() == ["0", "0", "0", "3002"]


@case("state/credentials")
def threads_with_users_of_their_own(here: Here) -> Iterator[None]:
    def user(number: int) -> threaded:
        def set_up() -> None:
            groups = ctypes.create_string_buffer(struct.pack("<II", number + 10, number + 11), 8)
            call(SETGROUPS, 2, groups)
            call(SETRESGID, number, number, number)
            call(SETRESUID, number, number + 1, number)

        def look(_: object) -> None:
            tid = int(call(186))
            assert status("Uid", tid).split() == [str(number), str(number + 1), str(number), str(number + 1)]
            assert status("Groups", tid).split() == [str(number + 10), str(number + 11)]

        return threaded(set_up, look)

    threads = [user(5000), user(6000)]
    yield
    for each in threads:
        each.verify()
    assert os.getuid() == 0


@case("state/credentials")
def all_five_sets_of_capabilities(here: Here) -> Iterator[None]:
    for bit in (20, 21, 25):
        prctl(24, bit)  # PR_CAPBSET_DROP
    keep = 1 << 13 | 1 << 10 | 1 << 8 | 1 << 38
    set_capabilities(keep, keep, 1 << 13 | 1 << 38)
    prctl(47, 2, 13)  # PR_CAP_AMBIENT_RAISE
    set_capabilities(1 << 10, 1 << 13 | 1 << 10 | 1 << 38, 1 << 13 | 1 << 38)
    before = [status(name) for name in SETS]
    yield
    assert [status(name) for name in SETS] == before
    assert int(before[4], 16) == 1 << 13


@case("state/credentials")
def securebits(here: Here) -> Iterator[None]:
    wanted = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6
    prctl(PR_SECUREBITS, wanted)
    yield
    assert prctl(27) == wanted


@case("state/credentials")
def capabilities_kept_for_a_change(here: Here) -> Iterator[None]:
    prctl(PR_KEEPCAPS, 1)
    yield
    assert prctl(7) == 1


@case("state/credentials")
def no_new_privileges(here: Here) -> Iterator[None]:
    prctl(PR_NNP, 1)
    yield
    assert prctl(39) == 1


@case("state/dumpable")
def not_dumpable(here: Here) -> Iterator[None]:
    prctl(PR_DUMPABLE, 0)
    yield
    assert prctl(3) == 0


@case("state/dumpable")
def dumpable_in_spite_of_a_change_of_user(here: Here) -> Iterator[None]:
    os.setresuid(2001, 2001, 2001)
    prctl(PR_DUMPABLE, 1)
    yield
    assert prctl(3) == 1


@case("state/comm")
def names_of_threads(here: Here) -> Iterator[None]:
    def named(name: bytes) -> threaded:
        def look(_: object) -> None:
            found = ctypes.create_string_buffer(16)
            prctl(16, found)
            assert found.value == name

        return threaded(lambda: prctl(PR_NAME, ctypes.create_string_buffer(name)), look)

    threads = [named(b"worker (1)"), named(b"\xff\xfe %s"), named(b"")]
    yield
    for each in threads:
        each.verify()


@case("state/parent-death-signal")
def a_signal_at_the_parents_death(here: Here) -> Iterator[None]:
    prctl(PR_PDEATHSIG, 12)
    yield
    found = ctypes.c_int()
    prctl(2, ctypes.byref(found))
    assert found.value == 12


@case("state/child-subreaper")
def a_subreaper_gets_the_orphans(here: Here) -> Iterator[None]:
    prctl(PR_SUBREAPER, 1)
    yield
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            os._exit(7)
        os._exit(0)
    os.waitpid(child, 0)
    _, wait = os.wait()
    assert os.waitstatus_to_exitcode(wait) == 7


@case("memory/fields")
def arguments_and_environment(here: Here) -> Iterator[None]:
    """Of a program that was executed with its own."""
    reading, writing = os.pipe()
    text = f"open({here.path('ready')!r}, 'w').close(); import os; os.read({reading}, 1)"
    child = os.fork()
    if child == 0:
        import sys

        os.close(writing)
        os.set_inheritable(reading, True)
        os.execve(sys.executable, ["name of its own", "-ISc", text, "\udcff"], {"A": "1", "B\udcfe": "2"})
    while not os.path.exists(here.path("ready")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)

    def seen() -> list[bytes]:
        found = []
        for name in ("cmdline", "environ", "auxv"):
            with open(f"/proc/{child}/{name}", "rb") as file:
                found.append(file.read())
        return found

    before, exe = seen(), os.readlink(f"/proc/{child}/exe")
    yield
    assert seen() == before
    assert os.readlink(f"/proc/{child}/exe") == exe
    os.write(writing, b"x")
    assert os.waitpid(child, 0)[1] == 0


@case("state/personality")
def a_personality_for_each_thread(here: Here) -> Iterator[None]:
    def person(value: int) -> threaded:
        def look(_: object) -> None:
            assert libc.personality(ctypes.c_ulong(0xFFFFFFFF)) == value

        return threaded(lambda: call(135, value), look)

    # ADDR_NO_RANDOMIZE, STICKY_TIMEOUTS, PER_LINUX with UNAME26
    threads = [person(0x0040000), person(0x4000000), person(0x0020000)]
    yield
    for each in threads:
        each.verify()


KEYCTL, ADD_KEY = 250, 248
SESSION = -3  # KEY_SPEC_SESSION_KEYRING


def keyring() -> tuple[int, bytes]:
    """ID and name of the session keyring."""
    room = ctypes.create_string_buffer(256)
    call(KEYCTL, 6, SESSION, room, 256)
    return call(KEYCTL, 0, SESSION, 0), room.value.split(b";")[-1]


@case("state/session-keyring")
def a_keyring_of_its_own(here: Here) -> Iterator[None]:
    name = f"tcpmig-{here.slot}".encode()
    call(KEYCTL, 1, name)
    call(ADD_KEY, b"user", b"a key", b"secret", 6, SESSION)
    child = os.fork()
    if child == 0:
        while True:
            time.sleep(1)
    yield
    # by name they have the same again
    assert keyring()[1] == name
    added = call(ADD_KEY, b"user", b"another", b"secret", 6, SESSION)
    assert call(KEYCTL, 10, SESSION, b"user", b"another", 0) == added
    os.kill(child, 9)
    os.waitpid(child, 0)


@case("state/session-keyring")
def a_keyring_without_a_name(here: Here) -> Iterator[None]:
    asks, answers = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        call(KEYCTL, 1, None)
        os.read(asks[0], 1)
        os.write(answers[1], str(keyring()[0]).encode())
        os._exit(0)
    call(KEYCTL, 1, None)
    assert keyring()[1] == b"_ses"
    yield
    number, name = keyring()
    assert name == b"_ses"
    os.write(asks[1], b"x")
    # nor is it that of the tool, which would be everybody's
    assert int(os.read(answers[0], 99)) != number
    os.waitpid(child, 0)
