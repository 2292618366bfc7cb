"""Debian's kernels, fetched by apt at the first use and kept; an initramfs with what a guest needs to find its root.

The kernel is the one that the stable release's own meta-package names, without a package being installed.  A guest with
another machine cannot run this machine's programs: for it a root of Debian's packages is unpacked, too.
Source: Documentation/driver-api/early-userspace/buffer-format.rst (newc).
"""

from __future__ import annotations

import fcntl
import lzma
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["ARM64", "KEPT", "META_PACKAGE", "Kernel", "fetch", "initramfs"]

#: where they are kept: root's, so that nobody else chooses the kernel
KEPT: Final = Path("/var/cache/tcpmig-tests")
#: depends on the kernel of this Debian release (bookworm: 6.1)
META_PACKAGE: Final = "linux-image-cloud-amd64"
#: the same for aarch64
ARM64: Final = "linux-image-cloud-arm64"
#: what tests run there, with all that these depend on
_ARM64_ROOT: Final = (
    *("python3", "busybox-static", "iproute2", "dash", "coreutils", "procps", "util-linux", "gcc", "libc6-dev"),
    *("python3-click", "python3-msgpack", "python3-psutil", "python3-pyroute2", "python3-rich", "python3-zstandard"),
    *(
        "python3-cryptography",
        "python3-pytest",
        "python3-pytest-timeout",
        "python3-hypothesis",
        "redis-server",
        "nftables",
    ),
)
#: what it takes to get to the root, with all that these depend on
_MODULES: Final = ("virtio_pci", "virtiofs", "overlay", "virtio_net")
_BUSYBOX: Final = Path("/bin/busybox")


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel package.

    image    what qemu boots
    release  as ``uname -r`` says it
    modules  folder of its modules, with modules.dep
    machine  as ``uname -m`` says it
    root     the files of a guest; None: this machine's
    """

    image: Path
    release: str
    modules: Path
    machine: str = "x86_64"
    root: Path | None = None


def fetch(meta: str = META_PACKAGE) -> Kernel:
    """The kernel that the meta-package depends on. CalledProcessError, LookupError."""
    KEPT.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (KEPT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        env = _foreign() if meta == ARM64 else None
        told = _run("apt-cache", "depends", meta, env=env)
        found = re.search(r"Depends: (linux-image-\S+)", told)
        if found is None:
            raise LookupError(f"apt knows no kernel of {meta}: {told!r}")
        home = KEPT / found[1]
        if not home.exists():
            _unpack(found[1], home, env)
        root = KEPT / "arm64-root" if env else None
        if root and not root.exists():
            _fill(root, env)
    (modules,) = (home / "lib/modules").iterdir()
    machine = "aarch64" if env else "x86_64"
    return Kernel(home / f"boot/vmlinuz-{modules.name}", modules.name, modules, machine, root)


def _run(*argv: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    return subprocess.run(argv, cwd=cwd, env=env, check=True, capture_output=True, text=True).stdout


def _foreign() -> dict[str, str]:
    """The environment of apt for packages of arm64: lists of its own, and nothing installed."""
    home = KEPT / "apt-arm64"
    env = os.environ | {"APT_CONFIG": str(home / "apt.conf")}
    if not (home / "ready").exists():
        for name in ("state/lists/partial", "cache/archives/partial"):
            (home / name).mkdir(parents=True, exist_ok=True)
        (home / "status").touch()
        (home / "apt.conf").write_text(
            'APT::Architecture "arm64";\nAPT::Architectures { "arm64"; };\nAPT::Sandbox::User "root";\n'
            f'Dir::State "{home}/state";\nDir::State::status "{home}/status";\nDir::Cache "{home}/cache";\n'
        )
        _run("apt-get", "-qq", "update", env=env)
        (home / "ready").touch()
    return env


def _download(packages: Iterable[str], fresh: Path, env: dict[str, str] | None) -> None:
    """Unpacked into ``fresh``, which is made."""
    shutil.rmtree(fresh, ignore_errors=True)
    (fresh / "archives").mkdir(parents=True)
    _run("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *packages, cwd=fresh / "archives", env=env)
    for archive in (fresh / "archives").glob("*.deb"):
        _run("dpkg", "-x", str(archive), str(fresh))
    shutil.rmtree(fresh / "archives")


def _fill(root: Path, env: dict[str, str]) -> None:
    fresh = root.with_name(root.name + ".new")
    plan = _run("apt-get", "-s", "install", "--no-install-recommends", *_ARM64_ROOT, env=env)
    _download(re.findall(r"^Inst (\S+)", plan, re.MULTILINE), fresh, env)
    for name in ("proc", "sys", "dev", "tmp", "run", "root", "srv", "work"):
        (fresh / name).mkdir(exist_ok=True)
    (fresh / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    fresh.rename(root)


def _unpack(package: str, home: Path, env: dict[str, str] | None) -> None:
    """Made under another name, so that what is there is whole."""
    fresh = home.with_name(home.name + ".new")
    _download([package], fresh, env)
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
SEEN$bb cp /agent.py /bin/busybox /new/run/
exec $bb switch_root /new PYTHON -I -S /run/agent.py
"""


def initramfs(kernel: Kernel, agent: Path, python: str, see: Iterable[Path] = ()) -> bytes:
    """A cpio archive, uncompressed: unpacking takes long in an emulated machine. ``python`` runs ``agent`` as PID 1.

    see  the folders that are shared as see0, see1 and so on, by the paths that they get
    """
    order = _in_order(kernel)
    busybox = kernel.root / "bin/busybox" if kernel.root else _BUSYBOX
    seen = "".join(f"$bb mkdir -p /new{path}\n$bb mount -t virtiofs see{i} /new{path}\n" for i, path in enumerate(see))
    init = _INIT.replace("SEEN", seen).replace("MODULES", str(kernel.modules)).replace("PYTHON", python)
    files = {
        "init": init.encode(),
        "bin/busybox": busybox.read_bytes(),
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
