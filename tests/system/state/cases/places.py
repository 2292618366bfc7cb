"""Where a process is: directories, root, umask, cgroup."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tests.system.state.calls import call, threaded
from tests.system.state.case import Here, case


@case("state/filesystem")
def directory_and_umask(here: Here) -> Iterator[None]:
    os.mkdir(here.path("in side"))
    os.chdir(here.path("in side"))
    os.umask(0o137)
    yield
    assert os.getcwd() == here.path("in side")
    os.close(os.open("made", os.O_CREAT | os.O_WRONLY, 0o777))
    assert os.stat("made").st_mode & 0o777 == 0o640


@case("state/filesystem")
def another_root(here: Here) -> Iterator[None]:
    os.makedirs(here.path("root/deep/er"))
    with open(here.path("root/file"), "w") as file:
        file.write("inside")
    os.chroot(here.path("root"))
    os.chdir("/deep/er")
    yield
    assert os.getcwd() == "/deep/er"
    with open("/file") as file:
        assert file.read() == "inside"
    assert not os.path.exists("/etc/passwd")


@case("state/filesystem")
def a_directory_outside_of_the_root(here: Here) -> Iterator[None]:
    os.makedirs(here.path("root"))
    os.makedirs(here.path("outside"))
    os.chdir(here.path("outside"))
    os.chroot(here.path("root"))
    with open("beside", "w") as file:
        file.write("x")
    yield
    assert os.listdir(".") == ["beside"]
    assert os.listdir("/") == []


@case("state/cgroups")
def a_group_of_its_own(here: Here) -> Iterator[None]:
    with open("/proc/self/mountinfo") as file:
        mounts = [line.split(" - ") for line in file]
    (point, *_) = [left.split()[4] for left, right in mounts if right.startswith("cgroup2 ")]
    name = f"tcpmig-case-{os.getpid()}-{here.slot}"
    os.mkdir(f"{point}/{name}")
    with open(f"{point}/{name}/cgroup.procs", "w") as file:
        file.write("0")

    def mine() -> str:
        with open("/proc/self/cgroup") as file:
            return next(line for line in file if line.startswith("0::"))

    before = mine()
    yield
    after = mine()
    with open(f"{point}/cgroup.procs", "w") as file:
        file.write("0")
    os.rmdir(f"{point}/{name}")
    assert before == after
    assert name in after


@case("state/directories-of-a-thread")
def threads_with_directories_of_their_own(here: Here) -> Iterator[None]:
    """As file servers have them, for each client."""

    def place(name: str, umask: int) -> threaded:
        def set_up() -> None:
            os.makedirs(here.path(f"{name}/in"))
            call(272, 0x200)  # unshare(CLONE_FS)
            os.chdir(here.path(f"{name}/in"))
            os.umask(umask)

        def look(_: object) -> None:
            assert os.getcwd() == here.path(f"{name}/in")
            assert os.umask(0) == umask

        return threaded(set_up, look)

    threads = [place("first", 0o11), place("second", 0o22)]

    def jail() -> None:
        os.makedirs(here.path("jail/cell"))
        call(272, 0x200)
        os.chroot(here.path("jail"))
        os.chdir("/cell")

    def inside(_: object) -> None:
        assert os.getcwd() == "/cell"
        assert os.listdir("/") == ["cell"]

    threads.append(threaded(jail, inside))
    os.mkdir(here.path("main"))
    os.chdir(here.path("main"))
    os.umask(0o33)
    yield
    for each in threads:
        each.verify()
    assert os.getcwd() == here.path("main")
    assert os.umask(0) == 0o33
