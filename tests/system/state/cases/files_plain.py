"""Regular files, directories, pipes, devices: what has a path or nothing but bytes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

from tests.system.state.case import Here, case


@case("files/file", "aspect/position")
def positions_and_sharing(here: Here) -> Iterator[None]:
    path = here.path("file")
    first = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(first, b"0123456789")
    os.lseek(first, 4, 0)
    second = os.dup(first)
    appending = os.open(path, os.O_WRONLY | os.O_APPEND)
    yield
    assert os.read(first, 2) == b"45"
    assert os.read(second, 1) == b"6"
    os.write(appending, b"end")
    assert os.pread(first, 99, 0) == b"0123456789end"


@case("files/directory")
def position_in_a_directory(here: Here) -> Iterator[None]:
    for name in "abcdef":
        os.close(os.open(here.path(name), os.O_CREAT | os.O_WRONLY))
    fd = os.open(here.folder, os.O_RDONLY | os.O_DIRECTORY)
    yield
    assert sorted(os.listdir(fd)) == list("abcdef")


@case("files/path-only")
def a_link_itself(here: Here) -> Iterator[None]:
    os.symlink("nowhere", here.path("link"))
    fd = os.open(here.path("link"), os.O_PATH | os.O_NOFOLLOW)
    yield
    assert os.readlink("", dir_fd=fd) == "nowhere"


@case("files/pipe")
def bytes_in_a_pipe(here: Here) -> Iterator[None]:
    r, w = os.pipe()
    os.write(w, b"x" * 5000)
    yield
    assert os.read(r, 9999) == b"x" * 5000
    os.write(w, b"y")
    assert os.read(r, 9) == b"y"


@case("files/external", alone=True, external=("77=/dev/zero",), differs=(r"/descriptors/77",))
def what_the_user_puts_in_its_place(here: Here) -> Iterator[None]:
    """The kernel's log could not follow."""
    fd = os.open("/dev/kmsg", os.O_WRONLY | os.O_NONBLOCK)
    os.dup2(fd, 77)
    os.close(fd)
    yield
    assert os.path.samestat(os.fstat(77), os.stat("/dev/zero"))


@case("files/shipped-file", alone=True, ship=("written",))
def a_file_that_travels_along(here: Here) -> Iterator[None]:
    path = here.path("written")
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o640)
    os.write(fd, b"to be kept")
    second = os.open(path, os.O_RDONLY)
    before = os.stat(path)
    yield
    after = os.stat(path)
    assert before.st_ino != after.st_ino, "it was made anew"
    assert (after.st_mode, after.st_mtime_ns, after.st_size) == (before.st_mode, before.st_mtime_ns, before.st_size)
    for each in (fd, second):
        assert os.path.samestat(os.fstat(each), after)
        assert os.pread(each, 99, 0) == b"to be kept"
    os.write(fd, b", and more")
    assert os.read(second, 99) == b"to be kept, and more"


@case("files/file", "files/directory")
def files_of_the_kernel(here: Here) -> Iterator[None]:
    """Of /proc, /sys and a cgroup: they tell of what is now."""
    with open("/proc/self/mounts") as mounts:
        group = next(line.split()[1] for line in mounts if line.split()[2] in ("cgroup", "cgroup2"))
    version = os.open("/proc/version", os.O_RDONLY)
    cpus = os.open("/sys/devices/system/cpu/possible", os.O_RDONLY)
    members = os.open(f"{group}/cgroup.procs", os.O_RDONLY)
    folder = os.open("/proc/sys", os.O_RDONLY | os.O_DIRECTORY)
    first = os.read(version, 3)
    yield
    with open("/proc/version", "rb") as file:
        assert first + os.read(version, 999) == file.read()
    with open("/sys/devices/system/cpu/possible", "rb") as file:
        assert os.read(cpus, 99) == file.read()
    assert b"\n" in os.read(members, 65536)
    assert "kernel" in os.listdir(folder)


@case("files/file-of-a-process")
def files_of_the_tree_in_proc(here: Here) -> Iterator[None]:
    pid, child = os.getpid(), os.fork()
    if not child:
        signal.pause()
    waiting = threading.Thread(target=threading.Event().wait, daemon=True)
    waiting.start()
    names = (
        "self/status",
        "self/maps",
        f"{child}/stat",
        "self/fd",
        f"self/task/{waiting.native_id}/stat",
        "self/net/tcp",
    )
    opened = {name: os.open(f"/proc/{name}", os.O_RDONLY) for name in names}
    opened |= {"place": os.open("/proc/self", os.O_PATH), "comm": os.open("/proc/self/comm", os.O_RDWR)}
    opened |= {"link": os.open("/proc/self/exe", os.O_PATH | os.O_NOFOLLOW)}
    links = {name: os.readlink(f"/proc/self/fd/{fd}") for name, fd in opened.items()}
    os.read(opened["self/maps"], 100)
    yield
    assert links == {name: os.readlink(f"/proc/self/fd/{fd}") for name, fd in opened.items()}
    assert f"\nPid:\t{pid}\n".encode() in os.read(opened["self/status"], 4096)
    assert os.lseek(opened["self/maps"], 0, os.SEEK_CUR) == 100
    os.lseek(opened["self/maps"], 0, os.SEEK_SET)
    assert b"-" in os.read(opened["self/maps"], 100).split(b" ")[0]
    assert os.read(opened[f"{child}/stat"], 4096).startswith(f"{child} (".encode())
    assert os.read(opened[f"self/task/{waiting.native_id}/stat"], 99).startswith(f"{waiting.native_id} (".encode())
    assert str(opened["comm"]) in os.listdir(opened["self/fd"])
    assert b"local_address" in os.read(opened["self/net/tcp"], 99)
    assert os.readlink("exe", dir_fd=opened["place"]) == os.readlink("/proc/self/exe")
    assert os.readlink("", dir_fd=opened["link"]) == os.readlink("/proc/self/exe")
    os.write(opened["comm"], b"renamed")
    assert os.pread(opened["comm"], 99, 0) == b"renamed\n"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
