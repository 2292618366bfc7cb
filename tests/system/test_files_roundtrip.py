"""Every kind of open file, set up by one process, captured, rebuilt, given to another process and tried there.

Each test also captures the new process's files again: the records must be equal.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from checkpoint.errors import FileMissing, LockTaken, Refused
from checkpoint.files import links
from checkpoint.files.rebuild import Rebuilder
from tests.system.files_children import capture, children, round_trip
from tests.system.files_essence import captured, same


def test_regular_file_positions_flags_and_sharing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    outcome = same(
        f"""
a = os.open({str(tmp_path / "file")!r}, os.O_RDWR | os.O_CLOEXEC); os.lseek(a, 4, 0)
b = os.dup(a); os.set_inheritable(b, True)
os.dup2(a, 77, inheritable=False)
c = os.open({str(tmp_path / "file")!r}, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
keep.update(a=a, b=b, c=c)
""",
        """
assert os.read(keep['a'], 2) == b'45' and os.read(keep['b'], 1) == b'6' and os.read(77, 1) == b'7'
os.write(keep['c'], b'end'); assert os.pread(keep['a'], 99, 0) == b'0123456789end'
assert not os.get_inheritable(keep['a']) and os.get_inheritable(keep['b'])
""",
    )
    # the three descriptors of one description, the other, /dev/null three times
    assert len(outcome.records.files) == 5


def test_directory_and_path_only(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("nowhere")
    same(
        f"""
d = os.open({str(tmp_path)!r}, os.O_RDONLY | os.O_DIRECTORY); os.scandir(d).__next__()
p = os.open({str(tmp_path / "link")!r}, os.O_PATH | os.O_NOFOLLOW)
keep.update(d=d, p=p)
""",
        """
assert 'c' in os.listdir(keep['d'])
assert os.readlink('', dir_fd=keep['p']) == 'nowhere'
""",
    )


def test_deleted_temporary_file_of_python() -> None:
    # opened with O_NOFOLLOW, and so not to be opened again in the same way through /proc
    round_trip(
        """
import tempfile
t = tempfile.TemporaryFile(); t.write(b'kept'); t.flush()
keep['t'] = t.fileno()
""",
        """
assert os.pread(keep['t'], 9, 0) == b'kept'
os.write(keep['t'], b' on'); assert os.pread(keep['t'], 9, 0) == b'kept on'
""",
    )


def test_deleted_file_keeps_its_bytes_and_its_name(tmp_path: Path) -> None:
    path = str(tmp_path / "gone")
    same(
        f"""
a = os.open({path!r}, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o640)
os.write(a, b'x' * 10000); os.pwrite(a, b'far', 1 << 20)
b = os.open({path!r}, os.O_WRONLY | os.O_APPEND)
os.unlink({path!r}); os.lseek(a, 3, 0)
keep.update(a=a, b=b)
""",
        f"""
assert os.pread(keep['a'], 5, 9998) == b'xx' + bytes(3) and os.pread(keep['a'], 9, 1 << 20) == b'far'
assert os.lseek(keep['a'], 0, 1) == 3
os.write(keep['b'], b'more'); assert os.pread(keep['a'], 9, (1 << 20) + 3) == b'more'
assert os.readlink('/proc/self/fd/%d' % keep['a']) == {path!r} + ' (deleted)'
assert os.fstat(keep['a']).st_blocks * 512 < 1 << 19, 'the hole was filled'
""",
    )
    assert not any(tmp_path.iterdir())


def test_name_is_gone_but_a_hard_link_is_beside_it(tmp_path: Path) -> None:
    path, other = str(tmp_path / "log"), str(tmp_path / "log.1")
    outcome = round_trip(
        f"""
a = os.open({path!r}, os.O_RDWR | os.O_CREAT); os.write(a, b'old'); os.link({path!r}, {other!r}); os.unlink({path!r})
keep['a'] = a
""",
        "os.write(keep['a'], b'+new')",
    )
    assert (tmp_path / "log.1").read_bytes() == b"old+new"
    assert not (tmp_path / "log").exists()
    assert any(getattr(f, "path", "") == other for f in outcome.records.files)


def test_hard_link_that_is_too_far_away_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_MOST", 1)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(Refused, match="TM-0344"):
        round_trip(
            f"""
a = os.open({str(tmp_path / "log")!r}, os.O_RDWR | os.O_CREAT)
os.link({str(tmp_path / "log")!r}, {str(tmp_path / "elsewhere" / "x")!r}); os.unlink({str(tmp_path / "log")!r})
""",
            "",
        )


def test_missing_and_differing_files_are_told_before_anything_is_built(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"12345")
    with children(1) as (source,):
        source.bare()
        source.do(f"a = os.open({str(path)!r}, os.O_RDONLY)")
        source.stop()
        records = captured(source.pid)
    rebuilder = Rebuilder(records)
    assert rebuilder.check() == []
    path.write_bytes(b"123456")
    assert any("here 6 bytes" in warning for warning in rebuilder.check())
    path.write_bytes(b"1")
    with pytest.raises(Refused, match="TM-0346"):
        rebuilder.check()
    path.unlink()
    with pytest.raises(FileMissing):
        rebuilder.check()
    os.mkfifo(path)
    with pytest.raises(FileMissing, match="not a regular file"):
        rebuilder.rebuild()


def test_devices() -> None:
    same(
        """
keep['fds'] = [os.open('/dev/' + n, os.O_RDWR) for n in ('null', 'zero', 'full', 'random', 'urandom')]
""",
        """
null, zero, full, random, urandom = keep['fds']
assert os.read(zero, 3) == bytes(3) and os.read(null, 3) == b'' and len(os.read(urandom, 5)) == 5
try: os.write(full, b'x')
except OSError as error: assert error.errno == errno.ENOSPC
else: raise AssertionError
""",
    )


@pytest.mark.parametrize("count", [0, 5, 2**33, 2**64 - 2])
@pytest.mark.parametrize("semaphore", [False, True])
def test_eventfd(count: int, semaphore: bool) -> None:
    same(
        f"""
e = os.eventfd(0, os.EFD_NONBLOCK | ({semaphore} and os.EFD_SEMAPHORE)); {count} and os.eventfd_write(e, {count})
keep['e'] = e
""",
        f"""
if {count} == 0:
    try: os.eventfd_read(keep['e'])
    except BlockingIOError: pass
    else: raise AssertionError
else:
    assert os.eventfd_read(keep['e']) == (1 if {semaphore} else {count})
""",
    )


TIMER = """
libc = ctypes.CDLL(None, use_errno=True)
def timer(clock, flags, value, interval):
    fd = libc.timerfd_create(clock, os.O_NONBLOCK)
    spec = struct.pack('<4q', interval // 10**9, interval % 10**9, value // 10**9, value % 10**9)
    assert libc.timerfd_settime(fd, flags, spec, None) == 0
    return fd
def left(fd):
    out = ctypes.create_string_buffer(32); assert libc.timerfd_gettime(fd, out) == 0
    a, b, c, d = struct.unpack('<4q', out.raw); return c * 10**9 + d, a * 10**9 + b
"""


def test_timerfd_running_periodic_disarmed_and_absolute() -> None:
    same(
        TIMER
        + """
now = time.clock_gettime_ns(time.CLOCK_REALTIME)
keep.update(once=timer(1, 0, 50 * 10**9, 0), period=timer(1, 0, 20 * 10**9, 10**9), off=timer(0, 0, 0, 0),
            wall=timer(0, 1, now + 100 * 10**9, 0), when=now + 100 * 10**9)
""",
        TIMER
        + """
value, interval = left(keep['once']); assert 45 * 10**9 < value <= 50 * 10**9 and interval == 0, value
value, interval = left(keep['period']); assert 15 * 10**9 < value <= 20 * 10**9 and interval == 10**9, (value, interval)
assert left(keep['off']) == (0, 0)
error = time.clock_gettime_ns(time.CLOCK_REALTIME) + left(keep['wall'])[0] - keep['when']
assert abs(error) < 2 * 10**6, error
""",
    )


def test_timerfd_that_expired_unread_counts_on_in_its_phase() -> None:
    outcome = round_trip(
        TIMER + "keep['t'] = timer(1, 0, 20 * 10**6, 60 * 10**9); keep['u'] = timer(1, 0, 10**6, 0); time.sleep(0.05)",
        TIMER
        + """
value, interval = left(keep['t']); assert 50 * 10**9 < value < 60 * 10**9 and interval == 60 * 10**9, (value, interval)
assert struct.unpack('Q', os.read(keep['t'], 8)) == (1,) and struct.unpack('Q', os.read(keep['u'], 8)) == (1,)
assert left(keep['u']) == (0, 0)
""",
    )
    timers = [f for f in outcome.records.files if type(f).__name__ == "TimerFd"]
    assert [t.ticks for t in timers] == [1, 1]  # type: ignore[attr-defined]


def test_signalfd() -> None:
    same(
        """
signal.pthread_sigmask(signal.SIG_BLOCK, [10, 40])
fd = ctypes.CDLL(None).signalfd(-1, struct.pack('<Q', 1 << 9 | 1 << 39), os.O_NONBLOCK); keep['s'] = fd
""",
        """
signal.pthread_sigmask(signal.SIG_BLOCK, [10, 40]); os.kill(os.getpid(), 40)
assert struct.unpack_from('<I', os.read(keep['s'], 128)) == (40,)
""",
    )


def test_epoll_nested_duplicated_closed_and_one_shot() -> None:
    outcome = same(
        """
r, w = os.pipe(); e = os.eventfd(1); late = os.eventfd(3); fired = os.eventfd(1); deaf_r, deaf_w = os.pipe()
outer, inner = select.epoll(), select.epoll()
inner.register(r, select.EPOLLIN | select.EPOLLET)
inner.register(late, select.EPOLLIN)
inner.register(e, select.EPOLLIN | select.EPOLLPRI)
inner.register(fired, select.EPOLLIN | select.EPOLLONESHOT)
inner.register(deaf_r, select.EPOLLIN | select.EPOLLONESHOT)
os.write(deaf_w, b'x'); inner.poll(0, 99); os.read(deaf_r, 1)
outer.register(inner.fileno(), select.EPOLLIN)
other = os.dup(late); os.close(late)
assert os.open('/dev/null', os.O_RDWR) == late     # the number leads elsewhere now
keep.update(r=r, w=w, e=e, late=late, other=other, fired=fired, deaf=deaf_w,
            outer=outer.fileno(), inner=inner.fileno())
""",
        """
inner, outer = select.epoll.fromfd(keep['inner']), select.epoll.fromfd(keep['outer'])
assert [fd for fd, _ in outer.poll(0)], 'nothing is ready'
ready = dict(inner.poll(0, 99))
assert set(ready) == {keep['e'], keep['late']}, ready
os.eventfd_read(keep['e']); os.eventfd_read(keep['other'])
assert inner.poll(0, 99) == [] and outer.poll(0) == []
os.write(keep['w'], b'x'); assert inner.poll(0) == [(keep['r'], 1)] and inner.poll(0) == []
os.eventfd_write(keep['other'], 1); assert inner.poll(0) == [(keep['late'], 1)]
""",
    )
    assert sum(len(f.watches) for f in outcome.records.files if hasattr(f, "watches")) == 6


def test_memfd_with_seals_and_two_descriptions() -> None:
    same(
        """
m = os.memfd_create('some name', os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC); os.write(m, b'content')
os.ftruncate(m, 1 << 20)
plain = os.memfd_create('plain'); os.write(plain, b'q')
other = os.open('/proc/self/fd/%d' % m, os.O_RDONLY)
fcntl.fcntl(m, 1033, 2 | 8); os.lseek(m, 2, 0)
keep.update(m=m, other=other, plain=plain)
""",
        """
assert os.read(keep['m'], 5) == b'ntent' and os.pread(keep['other'], 7, 0) == b'content'
assert fcntl.fcntl(keep['m'], 1034) == 10 and fcntl.fcntl(keep['plain'], 1034) == 1
try: os.pwrite(keep['m'], b'x', 0)
except PermissionError: pass
else: raise AssertionError('it is not sealed')
assert os.fstat(keep['m']).st_size == 1 << 20
assert os.readlink('/proc/self/fd/%d' % keep['m']) == '/memfd:some name (deleted)'
""",
    )


def test_flock_ofd_and_record_locks(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(bytes(100))
    same(
        f"""
a, b, c = (os.open({str(tmp_path)!r} + '/' + n, os.O_RDWR) for n in 'abc')
fcntl.flock(a, fcntl.LOCK_EX)
fcntl.fcntl(b, 37, struct.pack('<hh4xqqi4x', 0, 0, 10, 5, 0))
fcntl.lockf(c, fcntl.LOCK_EX, 7, 20)
keep.update(a=a, b=b, c=c)
""",
        f"""
def taken(name, request):
    pid = os.fork()
    if pid == 0:
        fd = os.open({str(tmp_path)!r} + '/' + name, os.O_RDWR)
        try: request(fd)
        except OSError: os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert taken('a', lambda fd: fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB))
assert taken('b', lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 14))
assert not taken('b', lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 15))
assert taken('c', lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 26))
assert not taken('c', lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 27))
""",
    )


def test_owner_and_signal_of_readiness() -> None:
    same(
        """
a, b = socket.socketpair()
fcntl.fcntl(a, 15, struct.pack('<ii', 1, 1)); fcntl.fcntl(a, 10, 40)
fcntl.fcntl(a, fcntl.F_SETFL, fcntl.fcntl(a, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)
keep.update(a=a.detach(), b=b.detach())
""",
        """
assert fcntl.fcntl(keep['a'], 11) == 40
assert struct.unpack('<ii', fcntl.fcntl(keep['a'], 16, bytes(8))) == (1, 1)
assert fcntl.fcntl(keep['a'], fcntl.F_GETFL) & os.O_ASYNC
""",
    )


def test_inotify_watches_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "seen").mkdir()
    same(
        f"""
libc = ctypes.CDLL(None); i = libc.inotify_init1(os.O_NONBLOCK)
path = {str(tmp_path / "seen")!r}.encode()
for _ in range(3):
    n = libc.inotify_add_watch(i, path, 0x100); libc.inotify_rm_watch(i, n)
keep.update(i=i, wd=libc.inotify_add_watch(i, path, 0x100)); os.read(i, 9999)
""",
        f"""
open({str(tmp_path / "seen" / "new")!r}, 'w').close()
wd, mask = struct.unpack_from('<iI', os.read(keep['i'], 999))
assert wd == keep['wd'] == 4 and mask == 0x100, (wd, mask)
""",
    )


@pytest.mark.parametrize(
    ("setup", "what"),
    [
        ("keep['x'] = os.open('/proc/self/ns/net', os.O_RDONLY)", "namespace"),
        ("keep['x'] = ctypes.CDLL(None).syscall(323, os.O_CLOEXEC)", "userfaultfd"),
        ("keep['x'] = ctypes.CDLL(None).syscall(425, 4, bytes(120))", "io_uring"),
    ],
)
def test_refused_by_name(setup: str, what: str) -> None:
    with children(1) as (source,):
        source.bare()
        keep = source.do(setup)
        assert keep["x"] > 2
        source.stop()
        with pytest.raises(Refused, match=f"{what}.*pid {source.pid} fd {keep['x']}"):
            captured(source.pid)


def test_locks_change_hands_while_the_original_lives(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(10))
    setup = f"a = os.open({str(tmp_path / 'a')!r}, os.O_RDWR); fcntl.flock(a, fcntl.LOCK_EX); keep['a'] = a"
    outcome = round_trip(setup, "fcntl.flock(keep['a'], fcntl.LOCK_EX | fcntl.LOCK_NB)", kill_first=False)
    assert outcome.warnings == []
    with children(1) as (source,):
        source.bare()
        source.do(setup)
        source.stop()
        table, _ = capture(source.pid)
        fd = os.open(tmp_path / "a", os.O_RDONLY)
        with table:
            with pytest.raises(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            table.recapture()
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            with pytest.raises(LockTaken):
                table.go_on()
            fcntl.flock(fd, fcntl.LOCK_UN)
            table.recapture()
            table.go_on()
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.close(fd)
