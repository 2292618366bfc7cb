"""What the passes over a process's files take for granted of Linux, and what they say of files that were told ahead."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.files.aheadtell import tell
from checkpoint.files.plain import Numbers
from checkpoint.files.policy import NO_POLICY, Policy
from checkpoint.files.table import FileTable
from checkpoint.kernel import filerows

DOER = """
import fcntl, os, sys
place = sys.argv[1]
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Doer:
    """A process that does what it is told with its files."""

    def __init__(self, place: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-IS", "-c", DOER, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def do(self, line: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture
def doer(tmp_path: Path) -> Iterator[Doer]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_bytes(b"0123456789")
    one = Doer(tmp_path)
    one.do("os.chdir(place); f = os.dup2(os.open(place + '/folder/file', os.O_RDWR), 50)")
    one.do("d = os.dup2(os.open(place + '/folder', os.O_RDONLY), 51)")
    one.do("os.closerange(3, 50)")
    try:
        yield one
    finally:
        one.process.communicate()


def row_of(pid: int, fd: int) -> filerows.FileRow:
    return next(row for _, row in filerows.rows(filerows.table(pid)) if row.fd == fd)


def test_the_rows_say_what_fstat_and_the_link_say(tmp_path: Path) -> None:
    fds = [os.open(tmp_path / f"{n}", os.O_CREAT | os.O_RDWR) for n in range(300)]
    ends = os.pipe()
    for n, fd in enumerate(fds):
        os.write(fd, bytes(n))
        os.lseek(fd, n // 2, os.SEEK_SET)
    os.unlink(tmp_path / "7")
    os.rename(tmp_path / "8", tmp_path / "eight")
    os.link(tmp_path / "9", tmp_path / "nine")
    os.unlink(tmp_path / "9")
    found = {row.fd: row for _, row in filerows.rows(filerows.table(os.getpid()))}
    for n, fd in enumerate(fds):
        now = os.fstat(fd)
        assert found[fd] == (fd, n // 2, now.st_size, now.st_mtime_ns, os.readlink(f"/proc/self/fd/{fd}"))
    assert not {*ends} & found.keys(), "pipes are no files"
    for fd in (*fds, *ends):
        os.close(fd)


def test_a_path_that_is_too_long_is_not_told(tmp_path: Path) -> None:
    """Room is for 192 bytes; d_path says when it has not enough, and cuts nothing off."""
    long = tmp_path / ("d" * 100) / ("e" * 100)
    long.mkdir(parents=True)
    fd = os.open(long, os.O_RDONLY)
    assert row_of(os.getpid(), fd).path == ""
    os.close(fd)
    most = 191 - len(str(tmp_path)) - 1
    for length, told in ((most, True), (most + 1, False)):
        fd = os.open(tmp_path / ("f" * length), os.O_CREAT)
        assert bool(row_of(os.getpid(), fd).path) is told
        os.close(fd)


def test_the_same_file_has_the_same_row(tmp_path: Path) -> None:
    """What lies behind the end of a path is the same each time."""
    fd = os.open(tmp_path / "a name that is longer than nothing", os.O_CREAT | os.O_RDWR)
    found = [filerows.rows(filerows.table(os.getpid())) for _ in range(50)]
    assert len({raw for table in found for raw, row in table if row.fd == fd}) == 1
    os.close(fd)


#: (what is done to 50, a file, and 51, a directory: whether 50 is what it was; 51; whether 50 has moved on)
DONE = {
    "nothing": ("pass", True, True, False),
    "written": ("os.write(50, b'abc')", True, True, True),
    "read": ("os.read(50, 2)", True, True, True),
    "sought": ("os.lseek(50, 77, os.SEEK_SET)", True, True, True),
    "truncated": ("os.truncate(place + '/folder/file', 2)", True, True, True),
    "touched": ("os.utime(place + '/folder/file', (1, 1))", True, True, True),
    "renamed": ("os.rename('folder/file', 'folder/other')", False, True, False),
    "replaced": ("os.rename(os.close(os.open('new', os.O_CREAT)) or 'new', 'folder/file')", False, True, False),
    "removed": ("os.unlink('folder/file')", False, True, False),
    "folder renamed": ("os.rename('folder', 'another')", False, False, False),
    "closed": ("os.close(50)", False, True, False),
    "another": ("os.dup2(51, 50)", False, True, False),
    "twice": ("os.dup(50)", True, True, False),
    "flags": ("fcntl.fcntl(50, fcntl.F_SETFL, os.O_APPEND)", False, True, False),
    "close-on-exec": ("os.set_inheritable(50, not os.get_inheritable(50))", False, True, False),
    "locked": ("fcntl.flock(50, fcntl.LOCK_EX)", False, True, False),
    "record lock": ("fcntl.lockf(50, fcntl.LOCK_EX, 1)", False, True, False),
    "leased": ("fcntl.fcntl(50, fcntl.F_SETLEASE, fcntl.F_WRLCK)", False, True, False),
    "owned": ("fcntl.fcntl(50, fcntl.F_SETOWN, os.getpid())", False, True, False),
}


@pytest.mark.parametrize(("line", "file", "folder", "moved"), DONE.values(), ids=DONE)
def test_what_happened_since_it_was_told(doer: Doer, line: str, file: bool, folder: bool, moved: bool) -> None:
    ahead, told = tell([doer.pid], [], NO_POLICY, evidence={})
    assert ahead is not None
    assert told is not None
    places = [place.fd for place in told.places]
    assert {50, 51} <= set(places)
    doer.do(line)
    with FileTable(ahead=ahead, stopped=True) as table:
        table.add_process(doer)
        table.records()
        gone = {places[index] for index in ahead.gone}
        assert (50 not in gone, 51 not in gone) == (file, folder)
        index = places.index(50)
        assert (index in ahead.moved_on) == moved
        now = os.stat(f"/proc/{doer.pid}/fd/50") if file else None
        if moved and now is not None:
            with open(f"/proc/{doer.pid}/fdinfo/50", encoding="ascii") as info:
                pos = int(info.readline().split()[1])
            assert ahead.moved_on[index] == Numbers(pos, now.st_size, now.st_mtime_ns)
            assert table.record(index).pos == pos
        for fd in os.listdir(f"/proc/{doer.pid}/fd"):
            view = table.entries[table.tables[doer.pid][int(fd)][0]]
            assert os.path.samestat(view.stat, os.stat(f"/proc/{doer.pid}/fd/{fd}"))
        if line == "os.dup(50)":
            # one description, by two descriptors
            assert len([fd for fd, (at, _) in table.tables[doer.pid].items() if at == index]) == 2
    ahead.close()


def test_what_travels_is_not_told(doer: Doer) -> None:
    """Its bytes do, with --ship; in the stop."""
    ahead, told = tell([doer.pid], [], Policy(ship=True), evidence={})
    assert told is None or 50 not in [place.fd for place in told.places]
    if ahead is not None:
        ahead.close()


def test_a_handful_of_files_among_thousands_of_others_is_not_told(doer: Doer) -> None:
    """A pass over all descriptors would take longer in the stop than to capture them."""
    doer.do("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (4000, 4000))")
    doer.do("pipes = [os.pipe() for _ in range(1500)]")
    ahead, told = tell([doer.pid], [], NO_POLICY, evidence={})
    assert (ahead, told) == (None, None)


def test_two_descriptions_of_one_file(doer: Doer) -> None:
    """One of them is told; the other is told from it in the stop."""
    doer.do("os.dup2(os.open(place + '/folder/file', os.O_RDWR), 52); os.closerange(3, 50)")
    ahead, told = tell([doer.pid], [], NO_POLICY, evidence={})
    assert ahead is not None
    assert told is not None
    assert len({50, 52} & {place.fd for place in told.places}) == 1
    with FileTable(ahead=ahead, stopped=True) as table:
        found = table.add_process(doer)
        assert found[50][0] != found[52][0]
    ahead.close()
