"""What has no path: counters, timers, signals, epoll, inotify, memory, deleted files."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import signal
import struct
import tempfile
import time
from collections.abc import Iterator

from tests.system.state.case import Here, case

libc = ctypes.CDLL(None, use_errno=True)
SECOND = 10**9


@case("files/eventfd")
def eventfd_with_a_count(here: Here) -> Iterator[None]:
    fd = os.eventfd(7, os.EFD_NONBLOCK)
    os.eventfd_write(fd, 2**33)
    yield
    assert os.eventfd_read(fd) == 2**33 + 7
    os.eventfd_write(fd, 5)
    assert os.eventfd_read(fd) == 5


@case("files/eventfd")
def eventfd_as_semaphore(here: Here) -> Iterator[None]:
    fd = os.eventfd(2, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
    yield
    assert [os.eventfd_read(fd), os.eventfd_read(fd)] == [1, 1]
    assert not select.select([fd], [], [], 0)[0]


@case("files/eventfd")
def eventfd_that_is_full(here: Here) -> Iterator[None]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    os.eventfd_write(fd, 2**64 - 2)
    yield
    assert not select.select([], [fd], [], 0)[1]
    assert os.eventfd_read(fd) == 2**64 - 2


def timer(clock: int, flags: int, value: int, interval: int = 0) -> int:
    fd = libc.timerfd_create(clock, os.O_NONBLOCK)
    assert (
        libc.timerfd_settime(fd, flags, struct.pack("<4q", *divmod(interval, SECOND), *divmod(value, SECOND)), None)
        == 0
    )
    return int(fd)


def left(fd: int) -> tuple[int, int]:
    out = ctypes.create_string_buffer(32)
    assert libc.timerfd_gettime(fd, out) == 0
    interval, more, value, rest = struct.unpack("<4q", out.raw)
    return value * SECOND + rest, interval * SECOND + more


@case("files/timerfd")
def timerfd_that_runs(here: Here) -> Iterator[None]:
    fd, begun = timer(time.CLOCK_MONOTONIC, 0, 1000 * SECOND), time.monotonic_ns()
    yield
    value, interval = left(fd)
    assert interval == 0
    # never before its time, on the program's own clock; after it by no more than a restore takes
    late = value - (begun + 1000 * SECOND - time.monotonic_ns())
    assert -SECOND // 1000 < late < 60 * SECOND, late


@case("files/timerfd")
def timerfd_periodic_with_ticks(here: Here) -> Iterator[None]:
    fd = timer(time.CLOCK_MONOTONIC, 0, SECOND // 1000, 1000 * SECOND)
    select.select([fd], [], [])
    yield
    assert struct.unpack("Q", os.read(fd, 8)) == (1,)
    value, interval = left(fd)
    assert interval == 1000 * SECOND
    assert 900 * SECOND < value < 1000 * SECOND


@case("files/timerfd")
def timerfd_absolute_on_the_wall_clock(here: Here) -> Iterator[None]:
    end = time.time_ns() + 500 * SECOND
    fd = timer(time.CLOCK_REALTIME, 1, end)
    yield
    assert abs(time.time_ns() + left(fd)[0] - end) < SECOND // 2


@case("files/timerfd")
def timerfd_disarmed(here: Here) -> Iterator[None]:
    fd = timer(time.CLOCK_BOOTTIME, 0, 0)
    yield
    assert left(fd) == (0, 0)


@case("files/signalfd")
def signalfd_with_its_mask(here: Here) -> Iterator[None]:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, 40])
    fd = libc.signalfd(-1, struct.pack("<Q", 1 << 9 | 1 << 39), os.O_NONBLOCK)
    os.kill(os.getpid(), 40)
    yield
    assert struct.unpack_from("<I", os.read(fd, 128)) == (40,)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert struct.unpack_from("<I", os.read(fd, 128)) == (signal.SIGUSR1,)


@case("files/epoll", "aspect/epoll-entries")
def epoll_of_every_trigger(here: Here) -> Iterator[None]:
    ep = select.epoll()
    level, w1 = os.pipe()
    edge, w2 = os.pipe()
    once, w3 = os.pipe()
    ep.register(level, select.EPOLLIN)
    ep.register(edge, select.EPOLLIN | select.EPOLLET)
    ep.register(once, select.EPOLLIN | select.EPOLLONESHOT)
    for fd in (w1, w2, w3):
        os.write(fd, b"x")
    assert len(ep.poll(0)) == 3
    yield
    found = dict(ep.poll(0))
    assert level in found
    assert once not in found, "it has fired"
    os.write(w2, b"y")
    assert edge in dict(ep.poll(0))
    ep.modify(once, select.EPOLLIN | select.EPOLLONESHOT)
    assert once in dict(ep.poll(0))


@case("files/epoll", "aspect/epoll-entries")
def epoll_nested_and_of_duplicates(here: Here) -> Iterator[None]:
    r, w = os.pipe()
    other = os.dup(r)
    inner, outer = select.epoll(), select.epoll()
    inner.register(other, select.EPOLLIN)
    os.close(other)  # the entry stays, under a number that is free
    outer.register(inner.fileno(), select.EPOLLIN)
    yield
    assert outer.poll(0) == []
    os.write(w, b"x")
    assert outer.poll(0) == [(inner.fileno(), select.EPOLLIN)]
    assert inner.poll(0) == [(other, select.EPOLLIN)]


@case("files/epoll", "aspect/epoll-entries")
def epoll_shared_with_a_child(here: Here) -> Iterator[None]:
    r, w = os.pipe()
    ep = select.epoll()
    ep.register(r, select.EPOLLIN)
    pid = os.fork()
    if pid == 0:
        while True:
            if ep.poll():
                os.close(os.open(here.path("woken"), os.O_CREAT | os.O_WRONLY))
                time.sleep(1000)
    yield
    os.write(w, b"x")
    end = time.monotonic() + 20
    while not os.path.exists(here.path("woken")):
        assert time.monotonic() < end
        time.sleep(0.002)


@case("files/inotify")
def inotify_of_a_directory_and_a_file(here: Here) -> Iterator[None]:
    fd = libc.inotify_init1(os.O_NONBLOCK)
    os.mkdir(here.path("d"))
    open(here.path("f"), "w").close()
    first = libc.inotify_add_watch(fd, here.path("d").encode(), 0x100)
    gone = libc.inotify_add_watch(fd, str(here.folder).encode(), 0x200)
    libc.inotify_rm_watch(fd, gone)
    os.read(fd, 4096)
    last = libc.inotify_add_watch(fd, here.path("f").encode(), 0x2)
    yield
    open(here.path("d/new"), "w").close()
    with open(here.path("f"), "w") as file:
        file.write("x")
    data, seen = os.read(fd, 4096), []
    while data:
        watch, mask, _, length = struct.unpack_from("<iIII", data)
        seen.append((watch, mask, data[16 : 16 + length].rstrip(b"\0")))
        data = data[16 + length :]
    assert (first, 0x100, b"new") in seen
    assert (last, 0x2, b"") in seen


@case("files/inotify")
def inotify_with_unread_events(here: Here) -> Iterator[None]:
    fd = libc.inotify_init1(os.O_NONBLOCK)
    watch = libc.inotify_add_watch(fd, os.fsencode(here.folder), 0x100)  # IN_CREATE
    os.mkdir(here.path("before"))
    os.mkdir(here.path("before too"))
    yield
    # it cannot be told what there was, but that there was something; and only this
    assert os.read(fd, 9999) == struct.pack("iIII", -1, 0x4000, 0, 0)  # IN_Q_OVERFLOW
    os.mkdir(here.path("new"))
    number, mask, _, length = struct.unpack_from("iIII", os.read(fd, 9999))
    assert (number, mask, length) == (watch, 0x40000100, 16)


@case("files/fanotify")
def fanotify_of_a_file_a_directory_and_a_mount(here: Here) -> Iterator[None]:
    fd = libc.fanotify_init(0x2 | 0x200, os.O_RDONLY)  # FAN_NONBLOCK, FAN_REPORT_FID

    def mark(flags: int, mask: int, path: str) -> None:
        assert libc.fanotify_mark(fd, 1 | flags, ctypes.c_ulong(mask), -100, os.fsencode(path)) == 0

    with open(here.path("file"), "wb"):
        pass
    os.mkdir(here.path("folder"))
    mark(0, 0x2, here.path("file"))  # FAN_MODIFY
    mark(0x20 | 0x40, 0x20, here.path("file"))  # but not FAN_OPEN, also after it was changed
    mark(0, 0x20 | 0x40000000 | 0x8000000, here.path("folder"))
    mark(0x10, 0x8, "/run")  # FAN_CLOSE_WRITE on a whole mount
    with open(f"/proc/self/fdinfo/{fd}") as file:
        before = [line for line in file if line.startswith("fanotify")]
    yield
    with open(f"/proc/self/fdinfo/{fd}") as file:
        assert sorted(line for line in file if line.startswith("fanotify")) == sorted(before)
    with open(here.path("file"), "wb") as changed:
        changed.write(b"x")
    length, _, _, _, mask, _, _ = struct.unpack_from("IBBHQii", os.read(fd, 9999))
    assert (length, mask) == (24 + 28, 0x2)
    os.listdir(here.path("folder"))
    assert struct.unpack_from("IBBHQii", os.read(fd, 9999))[4] == 0x20 | 0x40000000


@case("files/memfd")
def memfd_sealed(here: Here) -> Iterator[None]:
    fd = os.memfd_create("name of it", os.MFD_ALLOW_SEALING)
    os.write(fd, b"kept" * 1000)
    os.pwrite(fd, b"far", 1 << 22)
    fcntl.fcntl(fd, 1033, 0x2 | 0x4)
    yield
    assert os.readlink(f"/proc/self/fd/{fd}") == "/memfd:name of it (deleted)"
    assert fcntl.fcntl(fd, 1034) == 0x2 | 0x4
    assert os.lseek(fd, 0, 1) == 4000
    assert os.pread(fd, 8, 3996) == b"kept" + bytes(4)
    assert os.pread(fd, 9, 1 << 22) == b"far"
    assert os.fstat(fd).st_blocks * 512 < 1 << 20


@case("files/memfd")
def memfd_mapped_by_two(here: Here) -> Iterator[None]:
    fd = os.memfd_create("shared")
    os.ftruncate(fd, 8192)
    memory = mmap.mmap(fd, 8192)
    pid = os.fork()
    if pid == 0:
        while not memory[0]:
            time.sleep(0.001)
        memory[4096] = memory[0] + 1
        time.sleep(1000)
    yield
    memory[0] = 41
    end = time.monotonic() + 20
    while memory[4096] != 42:
        assert time.monotonic() < end
        time.sleep(0.001)
    assert os.pread(fd, 1, 4096) == b"*"


@case("files/shared-memory")
def shared_memory_of_a_family(here: Here) -> Iterator[None]:
    memory = mmap.mmap(-1, 1 << 16)
    memory[:5] = b"early"
    pid = os.fork()
    if pid == 0:
        while memory[100:103] != b"now":
            time.sleep(0.001)
        memory[200:204] = b"done"
        time.sleep(1000)
    yield
    assert memory[:5] == b"early"
    memory[100:103] = b"now"
    end = time.monotonic() + 20
    while memory[200:204] != b"done":
        assert time.monotonic() < end
        time.sleep(0.001)


@case("files/deleted-file")
def deleted_file_with_a_hole(here: Here) -> Iterator[None]:
    path = here.path("gone")
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o640)
    os.write(fd, b"x" * 10000)
    os.pwrite(fd, b"far", 1 << 20)
    appending = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.unlink(path)
    os.lseek(fd, 3, 0)
    yield
    assert os.readlink(f"/proc/self/fd/{fd}") == f"{path} (deleted)"
    assert os.lseek(fd, 0, 1) == 3
    os.write(appending, b"more")
    assert os.pread(fd, 99, 1 << 20) == b"farmore"
    assert os.pread(fd, 4, 9998) == b"xx\0\0"
    assert os.fstat(fd).st_blocks * 512 < 1 << 19
    assert os.fstat(fd).st_mode & 0o777 == 0o640


# a name that is taken by another file cannot be had for the one that lost it
@case("files/deleted-file", differs=(r"/both \(deleted\)'",))
def deleted_and_made_anew(here: Here) -> Iterator[None]:
    path = here.path("both")
    old = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(old, b"old")
    os.unlink(path)
    new = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(new, b"new")
    yield
    assert os.pread(old, 9, 0) == b"old"
    assert os.pread(new, 9, 0) == b"new"
    assert open(path).read() == "new"
    assert os.fstat(old).st_nlink == 0


# O_TMPFILE is remembered among the flags, and means nothing afterwards
@case("files/deleted-file", differs=(r"/#\d+ \(deleted\)'",))
def file_that_never_had_a_name(here: Here) -> Iterator[None]:
    fd = os.open(here.folder, os.O_RDWR | os.O_TMPFILE, 0o600)
    os.write(fd, b"nameless")
    yield
    assert os.pread(fd, 99, 0) == b"nameless"
    assert os.lseek(fd, 0, 1) == 8
    assert os.listdir(here.folder) == []


@case("files/deleted-file", differs=(r"/#\d+ \(deleted\)'",))
def deleted_file_that_is_mapped(here: Here) -> Iterator[None]:
    with tempfile.TemporaryFile(dir=here.folder) as file:
        file.write(b"a" * 8192)
        file.flush()
        memory = mmap.mmap(file.fileno(), 8192)
        private = mmap.mmap(file.fileno(), 8192, flags=mmap.MAP_PRIVATE)
        private[0] = ord("p")
    yield
    assert memory[0] == memory[8191] == ord("a")
    assert private[:2] == b"pa"
    memory[4096] = ord("b")
    assert private[4096] == ord("b"), "they are not the same file"


# it is opened by the name that is left
@case("files/file", differs=(r"/log \(deleted\)'",))
def name_gone_but_linked_beside(here: Here) -> Iterator[None]:
    path = here.path("log")
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(fd, b"old")
    os.link(path, here.path("log.1"))
    os.unlink(path)
    yield
    os.write(fd, b"+new")
    assert open(here.path("log.1")).read() == "old+new"
    assert not os.path.exists(path)


@case("files/file", differs=(r"/here/log \(deleted\)'",))  # by the link that is left
def name_gone_but_linked_elsewhere(here: Here) -> Iterator[None]:
    for name in ("here", "there", "there/deep"):
        os.mkdir(here.path(name))
    fd = os.open(here.path("here/log"), os.O_CREAT | os.O_RDWR)
    os.write(fd, b"first")
    os.link(here.path("here/log"), here.path("there/deep/kept"))
    os.unlink(here.path("here/log"))
    os.rmdir(here.path("here"))
    yield
    os.write(fd, b" second")
    with open(here.path("there/deep/kept"), "rb") as file:
        assert file.read() == b"first second"
    assert os.fstat(fd).st_nlink == 1


@case("files/file")
def flags_of_a_file(here: Here) -> Iterator[None]:
    path = here.path("flags")
    open(path, "w").close()
    wanted = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_DSYNC | os.O_NOATIME
    fd = os.open(path, wanted)
    fcntl.fcntl(fd, fcntl.F_SETFD, 0)
    yield
    mask = os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK | os.O_SYNC | os.O_NOATIME
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & mask == wanted
    assert os.get_inheritable(fd)


@case("files/file")
def file_mapped_shared_and_closed(here: Here) -> Iterator[None]:
    path = here.path("mapped")
    with open(path, "wb") as file:
        file.write(bytes(8192))
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 8192)
    memory[0] = 1
    log = os.open(path, os.O_WRONLY | os.O_APPEND)
    yield
    memory[4096] = 2
    memory.flush()
    os.write(log, b"end")
    data = open(path, "rb").read()
    assert data[8192:] == b"end"
    assert (data[0], data[4096]) == (1, 2)


@case("files/device")
def devices_without_state(here: Here) -> Iterator[None]:
    null, zero, full, random = (os.open(f"/dev/{name}", os.O_RDWR) for name in ("null", "zero", "full", "urandom"))
    yield
    assert os.read(zero, 3) == bytes(3)
    assert os.read(null, 3) == b""
    assert len(os.read(random, 5)) == 5
    try:
        os.write(full, b"x")
    except OSError as error:
        assert error.errno == 28
    else:
        raise AssertionError("it took a byte")


@case("files/fifo")
def fifo_with_bytes(here: Here) -> Iterator[None]:
    os.mkfifo(here.path("fifo"))
    r = os.open(here.path("fifo"), os.O_RDONLY | os.O_NONBLOCK)
    w = os.open(here.path("fifo"), os.O_WRONLY)
    os.write(w, b"queued")
    yield
    assert os.read(r, 99) == b"queued"
    os.write(w, b"more")
    assert os.read(r, 99) == b"more"
    os.close(w)
    assert os.read(r, 99) == b""


@case("files/pipe")
def pipe_of_packets(here: Here) -> Iterator[None]:
    r, w = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
    for part in (b"one", b"three", b"x" * 4096):
        os.write(w, part)
    yield
    assert [os.read(r, 9999) for _ in range(3)] == [b"one", b"three", b"x" * 4096]


@case("files/pipe")
def pipe_of_another_size_that_is_full(here: Here) -> Iterator[None]:
    r, w = os.pipe2(os.O_NONBLOCK)
    fcntl.fcntl(w, 1031, 1 << 17)
    total = 0
    while select.select([], [w], [], 0)[1]:
        total += os.write(w, b"y" * 4096)
    yield
    assert fcntl.fcntl(r, 1032) == 1 << 17
    assert not select.select([], [w], [], 0)[1]
    found = 0
    while select.select([r], [], [], 0)[0]:
        found += len(os.read(r, 1 << 16))
    assert found == total == 1 << 17


@case("files/pipe")
def pipe_whose_reader_is_gone(here: Here) -> Iterator[None]:
    r, w = os.pipe()
    os.close(r)
    yield
    try:
        os.write(w, b"x")
    except BrokenPipeError:
        return
    raise AssertionError("somebody reads")


@case("files/pipe")
def pipe_whose_writer_is_gone(here: Here) -> Iterator[None]:
    r, w = os.pipe()
    os.write(w, b"rest")
    os.close(w)
    yield
    assert os.read(r, 99) == b"rest"
    assert os.read(r, 99) == b""


@case("files/pipe")
def pipe_between_processes(here: Here) -> Iterator[None]:
    r, w = os.pipe()
    r2, w2 = os.pipe()
    pid = os.fork()
    if pid == 0:
        while True:
            os.write(w2, os.read(r, 99).upper())
    yield
    os.write(w, b"loud")
    assert os.read(r2, 99) == b"LOUD"
