"""Makes the caller's namespaces a container, as runc does, and becomes the program in it:
container.py ROOT [OPTION..] -- PROGRAM ARGUMENT..

Run by `unshare --mount --pid --fork ..`.  ROOT becomes the root directory (pivot_root), with /usr of the host shown in
it, file systems of its own on /proc, /dev, /dev/pts, /dev/shm, /dev/mqueue and /sys, and the old root is unmounted.

overlay  it is the lower directory of an overlay whose upper one is ROOT.upper
bound    devices are shown from the host: who is in a user namespace cannot make any
chroot   the root directory is changed, and the old one stays what the namespace has
slave    what is mounted on the host shows inside
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys

RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC = 1, 2, 4, 8, 32, 4096, 16384
PRIVATE, SLAVE, STRICTATIME, DETACH = 1 << 18, 1 << 19, 1 << 24, 2
DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    given = [os.fsencode(one) if isinstance(one, str) else one for one in arguments]
    if getattr(libc, name)(*given):
        error = ctypes.get_errno()
        raise OSError(error, f"{name} {arguments}: {os.strerror(error)}")


def mount(kind: str, at: str, flags: int = 0, data: str = "", source: str | None = None) -> None:
    call("mount", source or kind or "none", at, kind or None, flags, data or None)


def bind(source: str, at: str, flags: int = 0) -> None:
    mount("", at, BIND, source=source)
    if flags:
        mount("", at, BIND | REMOUNT | flags)


def devices(bound: bool) -> None:
    for name, number in DEVICES.items():
        if bound:
            os.close(os.open(f"dev/{name}", os.O_CREAT | os.O_WRONLY))
            bind(f"/dev/{name}", f"dev/{name}")
        else:
            os.mknod(f"dev/{name}", stat.S_IFCHR | 0o666, os.makedev(*number))
            os.chmod(f"dev/{name}", 0o666)
    for name, target in {"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0"}.items():
        os.symlink(target, f"dev/{name}")


def main(root: str, options: list[str], program: list[str]) -> None:
    mount("", "/", REC | (SLAVE if "slave" in options else PRIVATE))
    if "overlay" in options:
        layers = f"lowerdir={root},upperdir={root}.upper,workdir={root}.work"
        mount("overlay", root, 0, layers)
    else:
        bind(root, root)
    os.chdir(root)
    bind("/usr", "usr", RDONLY)
    mount("proc", "proc", NOSUID | NODEV | NOEXEC)
    mount("tmpfs", "dev", NOSUID | STRICTATIME, "mode=755,size=65536k")
    devices("bound" in options)
    for name in ("pts", "shm", "mqueue"):
        os.mkdir(f"dev/{name}")
    group = "" if "bound" in options else ",gid=5"
    mount("devpts", "dev/pts", NOSUID | NOEXEC, f"newinstance,ptmxmode=0666,mode=0620{group}")
    mount("tmpfs", "dev/shm", NOSUID | NODEV | NOEXEC, "mode=1777,size=65536k", source="shm")
    mount("mqueue", "dev/mqueue", NOSUID | NODEV | NOEXEC)
    if os.path.isdir("sys"):
        mount("sysfs", "sys", NOSUID | NODEV | NOEXEC | RDONLY)
    mount("tmpfs", "tmp", NOSUID | NODEV, "mode=1777")
    # what is masked, and what may only be read
    bind("dev/null", "proc/keys")
    bind("proc/sys", "proc/sys", RDONLY | NOSUID | NODEV | NOEXEC)
    mount("tmpfs", "proc/fs", RDONLY, "size=0k")
    if "chroot" in options:
        os.chroot(".")
    else:
        call("pivot_root", ".", ".")
        call("umount2", ".", DETACH)
    os.chdir("/")
    os.execvp(program[0], program)


if __name__ == "__main__":
    at = sys.argv.index("--")
    main(sys.argv[1], sys.argv[2:at], sys.argv[at + 1 :])
