"""What is mounted in a mount namespace of a tree's own: found, and judged.

Source: /proc/PID/mountinfo.
"""

from __future__ import annotations

import os
import stat
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

from checkpoint.errors import MountNotMovable, NoSuchProcess
from checkpoint.files.abi import unshare_filesystem
from checkpoint.kernel import nsfs
from checkpoint.kernel.clone import CloneFlag
from checkpoint.kernel.mountinfo import MountInfo, read_mounts
from checkpoint.kernel.mounts import MountFlag
from checkpoint.namespaces.memoryfs import DEVICES, Folder
from checkpoint.namespaces.mounts import FLAGS, MADE_UP, MEMORY, OPTIONS, OVERLAY, TERMINALS, Mount, Mounts
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS

__all__ = ["judge", "mounts_of"]


def mounts_of(pid: int, cgroup: str = "/") -> Mounts:
    """Those of a process. ``cgroup``: of version 2, where its cgroup namespace begins. MountNotMovable,
    NoSuchProcess."""
    theirs, ours = read_mounts(pid), read_mounts("thread-self")
    for error in _reasons(pid, theirs, ours):
        raise error
    found = _on_top(theirs, ours)
    look = _Look(pid, theirs, ours, cgroup)
    added = tuple(map(look.mount, found))
    # a root of its own may be an overlay's, which is nobody's slave
    own = bool(added) and added[0].at == "/"
    return Mounts(slave=any(_slave(one) for one in theirs if own or one.at == "/"), added=added)


def judge(pid: int, cgroup: str) -> Iterator[MountNotMovable]:
    """What of a process's mount namespace cannot be made again. ``cgroup``: as of :func:`mounts_of`. NoSuchProcess."""
    theirs, ours = read_mounts(pid), read_mounts("thread-self")
    yield from _reasons(pid, theirs, ours)
    if any(one.at == "/" for one in theirs):
        look = _Look(pid, theirs, ours, cgroup)
        for one in _on_top(theirs, ours):
            try:
                look.mount(one)
            except MountNotMovable as error:
                yield error


def _slave(one: MountInfo) -> bool:
    return any(field.startswith("master:") for field in one.propagation)


def _on_top(theirs: Sequence[MountInfo], ours: Sequence[MountInfo]) -> list[MountInfo]:
    """What they have and we have not, each after what it is mounted on; all that they have, if they have another
    root."""
    found = []
    known = Counter(one.key for one in ours)
    if any(one.at == "/" and known[one.key] for one in theirs):
        for one in theirs:
            if known[one.key]:
                known[one.key] -= 1
            else:
                found.append(one)
        return found
    left = list(theirs)
    while left:
        waiting = {one.id for one in left}
        ready = [one for one in left if one.parent not in waiting or one.parent == one.id]
        # of all that could come next the first: as they were made
        found.append(ready[0])
        left.remove(ready[0])
    return found


def _reasons(pid: int, theirs: Sequence[MountInfo], ours: Sequence[MountInfo]) -> Iterator[MountNotMovable]:
    """Why a mount tree cannot be made again at all."""
    if not any(one.at == "/" for one in theirs) or not _at_root(pid):
        yield MountNotMovable("its first process has another root directory than its mount namespace", object="/")
        return
    uppermost = {one.at: one for one in theirs}
    if sum(one.at == "/" for one in _on_top(theirs, ours)) > 1:
        yield MountNotMovable("something else is mounted over its root", object="/")
    for one in _on_top(theirs, ours):
        if one.kind == MEMORY and uppermost[one.at] is not one:
            yield MountNotMovable("something else is mounted over a file system in memory", object=one.at)
    for one in theirs:
        if any(field.startswith("shared:") for field in one.propagation):
            yield MountNotMovable("what is mounted below it shows in another mount namespace, too", object=one.at)


def _at_root(pid: int) -> bool:
    """Whether the root directory of a process is that of its mount namespace. NoSuchProcess."""
    seen: list[os.stat_result] = []

    def look() -> None:
        unshare_filesystem()
        syscall(SYS.setns, space, CloneFlag.NEWNS)
        seen.append(os.stat("/"))

    try:
        space = nsfs.opened(pid, "mnt")
    except OSError as error:
        raise NoSuchProcess("the process does not exist, or has just ended", object=f"pid {pid}") from error
    try:
        thread = threading.Thread(target=look, name="other mounts")
        thread.start()
        thread.join()
        return bool(seen) and os.path.samestat(seen[0], os.stat(f"/proc/{pid}/root"))
    finally:
        os.close(space)


class _Look:
    """Looks at the mounts of one process."""

    def __init__(self, pid: int, theirs: Sequence[MountInfo], ours: Sequence[MountInfo], cgroup: str) -> None:
        self._pid = pid
        self._theirs = theirs
        self._ours = ours
        self._cgroup = cgroup
        self._users, self._numbers = (
            os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/thread-self/ns/{kind}")
            for kind in ("user", "pid")
        )
        self._slave = any(map(_slave, theirs))

    def mount(self, one: MountInfo) -> Mount:
        """A mount of theirs. MountNotMovable."""
        flags = int(sum(flag for name, flag in FLAGS.items() if name in one.options))
        if not flags & (MountFlag.NOATIME | MountFlag.RELATIME):
            flags |= MountFlag.STRICTATIME
        if one.kind in MADE_UP and one.root == (self._cgroup if one.kind == "cgroup2" else "/"):
            return self._filled(one, flags)
        bound = self._place(one, self._ours, "")
        own = "" if bound is not None else self._within(one)
        if bound is not None or own:
            return self._bound(one, flags, bound or own, inside=bound is None)
        if one.kind == MEMORY and one.root == "/":
            points = {each.at for each in self._theirs}
            folder = Folder.read(f"/proc/{self._pid}/root", one.at, points, contents=False)
            if flags & MountFlag.RDONLY and len(folder.nodes) > 1:
                raise MountNotMovable("a file system in memory with files in it is mounted read-only", object=one.at)
            return self._filled(one, flags)
        if one.kind == TERMINALS and one.root == "/":
            if self._users and not self._numbers:
                raise MountNotMovable("pseudo terminals of a user namespace without a PID namespace", object=one.at)
            return self._filled(one, flags)
        if one.kind == OVERLAY and one.root == "/":
            try:
                made = self._filled(one, flags)
            except ValueError:
                raise MountNotMovable("the directories of an overlay have no plain paths", object=one.at) from None
            missing = [path for path in made.layers if not os.path.isdir(path)]
            if missing:
                raise MountNotMovable(f"{missing[0]}, of an overlay, is no directory of the host", object=one.at)
            return made
        raise MountNotMovable(
            f"a file system {one.kind} ({one.source}) is mounted there for the tree alone", object=one.at
        )

    def _filled(self, one: MountInfo, flags: int) -> Mount:
        """A file system that is mounted anew. ValueError of an overlay whose directories have strange names."""
        options = [option for option in one.super if option.partition("=")[0] in OPTIONS.get(one.kind, ())]
        if self._users and any(option.startswith("gid=") for option in options):
            # shown as a number of ours, and wanted as one of the user namespace
            raise MountNotMovable(f"a file system {one.kind} of a user namespace with a group (gid=)", object=one.at)
        return Mount(kind=one.kind, source=one.source, at=one.at, flags=flags, data=",".join(options))

    def _bound(self, one: MountInfo, flags: int, source: str, *, inside: bool) -> Mount:
        found = os.stat(f"/proc/{self._pid}/root{source}" if inside else source)
        device = (0, 0)
        if inside and stat.S_ISCHR(found.st_mode):
            device = os.major(found.st_rdev), os.minor(found.st_rdev)
            if device not in DEVICES:
                raise MountNotMovable(f"a device {device[0]}:{device[1]} of the tree alone", object=one.at)
        return Mount(
            kind="",
            source=source,
            at=one.at,
            flags=flags,
            file=not stat.S_ISDIR(found.st_mode),
            device=device,
            inside=inside,
            private=self._slave and not inside and not _slave(one),
        )

    def _within(self, one: MountInfo) -> str:
        """The path by which the tree itself had the directory before it was mounted here; empty: by none."""
        before = self._theirs[: self._theirs.index(one)]
        return self._place(one, before, f"/proc/{self._pid}/root") or ""

    def _place(self, one: MountInfo, grounds: Sequence[MountInfo], root: str) -> str | None:
        """The path by which one of these mounts has the directory that is mounted; None: by none."""
        for ground in grounds:
            beyond = os.path.relpath(one.root, ground.root)
            if ground.device != one.device or beyond.startswith(".."):
                continue
            path = os.path.normpath(os.path.join(ground.at, beyond))
            try:
                same = os.path.samestat(os.stat(root + path), os.stat(f"/proc/{self._pid}/root{one.at}"))
            except OSError:
                continue
            if same:
                return path
        return None
