"""Namespaces of the whole tree: names, settings, mounts, users, control groups."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

from tests.system.state.case import Here, case
from tests.system.state.spaces import GROUP, NEWCGROUP, NEWIPC, NEWNS, NEWUSER, NEWUTS, mount


def read(path: str) -> str:
    with open(path) as file:
        return file.read()


@case("namespaces/uts", spaces=NEWUTS)
def names(here: Here) -> Iterator[None]:
    socket.sethostname("of-the-case")
    yield
    assert os.uname().nodename == "of-the-case"


@case("namespaces/ipc", spaces=NEWIPC)
def settings_of_ipc(here: Here) -> Iterator[None]:
    with open("/proc/sys/kernel/msgmax", "w") as file:
        file.write("7777")
    yield
    assert read("/proc/sys/kernel/msgmax").strip() == "7777"


@case("namespaces/mounts", spaces=NEWNS)
def mounts(here: Here) -> Iterator[None]:
    mount("none", "/mnt", "tmpfs", 2, "size=1m,mode=710")
    yield
    (line,) = [line for line in read("/proc/self/mountinfo").splitlines() if line.split()[4] == "/mnt"]
    assert "nosuid" in line
    assert "size=1024k,mode=710" in line


@case("namespaces/memory", spaces=NEWNS)
def files_in_memory(here: Here) -> Iterator[None]:
    mount("none", "/mnt", "tmpfs", 0, "size=1m")
    os.makedirs("/mnt/deep/er")
    with open("/mnt/deep/file", "w") as file:
        file.write("what is in it")
    os.chown("/mnt/deep/file", 7, 8)
    os.chmod("/mnt/deep/file", 0o4751)
    os.setxattr("/mnt/deep/file", "trusted.case", b"value")
    os.symlink("deep/file", "/mnt/link")
    os.mknod("/mnt/null", 0o20666, os.makedev(1, 3))
    mount("none", "/mnt/deep/er", "tmpfs", 0, "size=1m")
    os.mkdir("/mnt/deep/er/inner")
    yield
    assert read("/mnt/link") == "what is in it"
    found = os.stat("/mnt/deep/file")
    assert (found.st_mode, found.st_uid, found.st_gid) == (0o104751, 7, 8)
    assert os.getxattr("/mnt/deep/file", "trusted.case") == b"value"
    assert os.stat("/mnt/null").st_rdev == os.makedev(1, 3)
    assert os.listdir("/mnt/deep/er") == ["inner"]


@case("namespaces/mounts", spaces=NEWNS)
def an_overlay(here: Here) -> Iterator[None]:
    layers = {name: here.path(name) for name in ("lower", "upper", "work")}
    for path in layers.values():
        os.mkdir(path)
    with open(f"{layers['lower']}/file", "w") as file:
        file.write("below")
    data = "lowerdir={lower},upperdir={upper},workdir={work}".format(**layers)
    mount("none", "/mnt", "overlay", 0, data)
    with open("/mnt/new", "w") as file:
        file.write("above")
    yield
    assert (read("/mnt/file"), read("/mnt/new")) == ("below", "above")
    assert os.path.exists(f"{layers['upper']}/new")


@case("namespaces/users", spaces=NEWUSER)
def users(here: Here) -> Iterator[None]:
    """Privileges inside, and none outside."""
    yield
    assert read("/proc/self/uid_map").split() == ["0", "0", "1", "1000", "100000", "100"]
    os.setgroups([1001])
    os.setresuid(1002, 1002, 1002)
    assert os.getresuid() == (1002, 1002, 1002)


@case("namespaces/users", "state/credentials", spaces=NEWUSER)
def somebody_inside(here: Here) -> Iterator[None]:
    os.setgroups([1001, 1005])
    os.setresgid(1003, 1003, 1004)
    os.setresuid(1007, 1007, 1008)
    yield
    assert os.getresgid() == (1003, 1003, 1004)
    assert os.getresuid() == (1007, 1007, 1008)
    assert sorted(os.getgroups()) == [1001, 1005]
    assert read("/proc/self/gid_map").split()[:3] == ["0", "0", "1"]


@case("namespaces/users", "namespaces/uts", spaces=NEWUSER | NEWUTS | NEWNS)
def what_belongs_to_users(here: Here) -> Iterator[None]:
    socket.sethostname("before")
    yield
    assert os.uname().nodename == "before"
    socket.sethostname("after")
    mount("none", "/mnt", "tmpfs", 0)
    assert read("/proc/self/uid_map").split()[3:] == ["1000", "100000", "100"]


@case("namespaces/cgroups", spaces=NEWCGROUP)
def control_groups(here: Here) -> Iterator[None]:
    assert GROUP not in read("/proc/self/cgroup")
    yield
    assert "0::/\n" in read("/proc/self/cgroup")
