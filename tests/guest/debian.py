"""Debian's kernels, fetched by apt at the first use and kept; an initramfs with what a guest needs to find its root.

The kernel is the one that the stable release's own meta-package names, without a package being installed.
Source: Documentation/driver-api/early-userspace/buffer-format.rst (newc).
"""

from __future__ import annotations

import fcntl
import lzma
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["KEPT", "Kernel", "fetch", "initramfs"]

#: where they are kept: root's, so that nobody else chooses the kernel
KEPT: Final = Path("/var/cache/tcpmig-tests")
#: depends on the kernel of this Debian release (bookworm: 6.1)
META_PACKAGE: Final = "linux-image-cloud-amd64"
#: what it takes to get to the root, with all that these depend on
_MODULES: Final = ("virtio_pci", "virtiofs", "overlay", "virtio_net")
_BUSYBOX: Final = Path("/bin/busybox")


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel package.

    image    what qemu boots
    release  as ``uname -r`` says it
    modules  folder of its modules, with modules.dep
    """

    image: Path
    release: str
    modules: Path


def fetch(meta: str = META_PACKAGE) -> Kernel:
    """The kernel that the meta-package depends on. CalledProcessError, LookupError."""
    KEPT.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (KEPT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = _run("apt-cache", "depends", meta)
        found = re.search(r"Depends: (linux-image-\S+)", told)
        if found is None:
            raise LookupError(f"apt knows no kernel of {meta}: {told!r}")
        home = KEPT / found[1]
        if not home.exists():
            _unpack(found[1], home)
    (modules,) = (home / "lib/modules").iterdir()
    return Kernel(home / f"boot/vmlinuz-{modules.name}", modules.name, modules)


def _run(*argv: str, cwd: Path | None = None) -> str:
    return subprocess.run(argv, cwd=cwd, check=True, capture_output=True, text=True).stdout


def _unpack(package: str, home: Path) -> None:
    """Made under another name, so that what is there is whole."""
    fresh = home.with_name(home.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    _run("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package, cwd=fresh)
    (archive,) = fresh.glob("*.deb")
    _run("dpkg", "-x", str(archive), str(fresh))
    archive.unlink()
    (modules,) = (fresh / "lib/modules").iterdir()
    for packed in modules.rglob("*.ko.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    _run(str(_BUSYBOX), "depmod", "-b", str(fresh), modules.name)
    fresh.rename(home)


def _in_order(kernel: Kernel) -> list[Path]:
    """The modules of ``_MODULES`` and what they depend on, each after what it depends on."""
    depends: dict[str, list[str]] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, needs = line.partition(":")
        depends[path] = needs.split()
    by_name = {Path(path).stem.replace("-", "_"): path for path in depends}
    order: list[str] = []

    def add(path: str) -> None:
        if path not in order:
            for need in depends[path]:
                add(need)
            order.append(path)

    for name in _MODULES:
        # else it is built in
        if name in by_name:
            add(by_name[name])
    return [kernel.modules / path for path in order]


_INIT: Final = """#!/bin/busybox sh
bb=/bin/busybox
$bb mkdir -p /proc /sys /dev /lower /upper /new
$bb mount -t proc proc /proc
$bb mount -t sysfs sys /sys
$bb mount -t devtmpfs dev /dev
for module in $($bb cat /order); do $bb insmod /m/$module; done
$bb mount -t virtiofs root /lower
$bb mount -t tmpfs tmpfs /upper
$bb mkdir /upper/data /upper/work
$bb mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work overlay /new
for name in proc sys dev; do $bb mount --move /$name /new/$name; done
$bb mkdir -p /new/dev/pts /new/dev/shm /new/lib/modules
$bb mount -t devpts -o ptmxmode=666 devpts /new/dev/pts
for name in dev/shm tmp run; do $bb mount -t tmpfs tmpfs /new/$name; done
$bb mount -t cgroup2 cgroup2 /new/sys/fs/cgroup
$bb mount -t bpf bpf /new/sys/fs/bpf
$bb ln -s MODULES /new/lib/modules/
$bb cp /agent.py /bin/busybox /new/run/
exec $bb switch_root /new PYTHON -I -S /run/agent.py
"""


def initramfs(kernel: Kernel, agent: Path, python: str) -> bytes:
    """A cpio archive, uncompressed: unpacking takes long in an emulated machine. ``python`` runs ``agent`` as PID 1."""
    order = _in_order(kernel)
    files = {
        "init": _INIT.replace("MODULES", str(kernel.modules)).replace("PYTHON", python).encode(),
        "bin/busybox": _BUSYBOX.read_bytes(),
        "agent.py": agent.read_bytes(),
        "order": " ".join(path.name for path in order).encode(),
        **{f"m/{path.name}": path.read_bytes() for path in order},
    }
    entries = [_entry(name, 0o40755) for name in ("bin", "m")]
    entries += [_entry(name, 0o100755, data) for name, data in files.items()]
    return b"".join([*entries, _entry("TRAILER!!!", 0)])


def _entry(name: str, mode: int, data: bytes = b"") -> bytes:
    text = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device (2), rdevice (2), length of the name, checksum
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(text), 0)
    head = b"070701" + b"".join(b"%08x" % number for number in numbers) + text
    return _aligned(head) + _aligned(data)


def _aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
