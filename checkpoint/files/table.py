"""The open files of a tree of processes: one entry per open file description.

Descriptors are added first, all of them; then every entry is given its kind and captured, so that a kind may ask for
what else is in the tree (the other end of a pipe, the file behind a number in an epoll instance). Two descriptors are
the same description if kcmp(2) says so; a socket has one description only, its inode tells.

All descriptors are read through duplicates of our own (pidfd_getfd), which stay open until :meth:`FileTable.close`: the
sockets are worked through them, and contents are read from them after the descriptors were listed.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import stat
from typing import TYPE_CHECKING, Final

from checkpoint import procfs
from checkpoint.errors import FileCaptureFailed, LockTaken, SharedDescriptors, UnsupportedMapping
from checkpoint.files import abi, locks
from checkpoint.files.abi import CAPTURED_FLAGS, AccessMode, FileFlag, Kcmp
from checkpoint.files.base import FdView, FileLock, OpenFile, PosixLock, kind_name, locks_of, parse_info, read_info
from checkpoint.files.content import ContentKind
from checkpoint.files.contents import ContentTable
from checkpoint.files.descriptors import ensure_descriptors
from checkpoint.files.epoll import EPOLL_LINK
from checkpoint.files.identity import Evidence
from checkpoint.files.kinds import kind_for
from checkpoint.files.outside import Outside
from checkpoint.files.plain import moved_on
from checkpoint.files.policy import NO_POLICY, Policy
from checkpoint.files.sysv import SysvSegment, remove_deserted
from checkpoint.files.treefiles import LastMapped, LocksOfFile, Mapping, Owner, TreeFiles
from checkpoint.files.unixdiag import UnixSocket, unix_sockets
from checkpoint.kernel.kcmp import KcmpType, Known
from checkpoint.namespaces.ways import way_of
from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.beside import Beside
from tcpstate.md5keys import SigningKey, all_keys, listeners_keys

if TYPE_CHECKING:
    from checkpoint.files.ahead import Ahead

__all__ = ["FileTable", "LocksOfFile", "Mapping", "Owner", "TreeFiles"]

_CLOEXEC: Final = int(FileFlag.CLOEXEC)


class FileTable:
    """The open files of the source. ``add_process`` for each process, ``add_mapped`` for each file mapping, then
    ``records``. Close it when the capture is over.

    ``live``: the processes run; descriptors that vanish meanwhile are left out, and nothing is captured.
    ``policy``: what the user decided.
    ``ahead``: files that were told before the stop, and are looked at from now on: they are the first entries.
    ``stopped``: the processes stand still already: what takes long to ask is asked beside.
    """

    def __init__(
        self, *, live: bool = False, policy: Policy = NO_POLICY, ahead: Ahead | None = None, stopped: bool = False
    ) -> None:
        self.live = live
        self.ahead = ahead
        self.policy = policy
        #: whether the capture at hand is the last one (:meth:`recapture`)
        self.late = False
        self.entries: list[FdView] = []
        self.contents = ContentTable()
        self.tables: dict[int, dict[int, tuple[int, bool]]] = {}
        self.warnings: list[str] = []
        self.outside = Outside(self)
        self._known_tables = Known(KcmpType.FILES)
        self._pidfds: dict[int, int] = {}
        self._ways: dict[int, str] = {}
        self._by_socket: dict[int, int] = {}
        self._by_mapping: dict[tuple[int, int, bool], int] = {}
        self._last_mapped: LastMapped | None = None
        # per file: indexes in kcmp's order
        self._by_file: dict[tuple[int, int, str], list[int]] = {}
        self._files: list[OpenFile] = []
        #: by process: descriptors that were not told ahead
        self._told_now: dict[int, dict[int, tuple[int, bool]]] = {}
        #: (path, size, time, inode) -> what else is known of a file's content, from before the stop
        self.evidence: dict[tuple[str, int, int, int], Evidence] = {}
        #: descriptors that their processes give up: not among the entries
        self.closed: set[tuple[int, int]] = set()
        self._written: set[tuple[int, int]] = set()
        self._given_up: list[tuple[int, FileLock]] = []
        #: where the entries begin that were not told ahead
        self.first = 0 if ahead is None else ahead.count
        #: what tells of connections that are told ahead tells whether sockets have keys
        self._told = ahead if ahead is not None and ahead.connections else None
        self._posix: dict[int, dict[tuple[int, int], tuple[int, tuple[PosixLock, ...]]]] = {}
        # the kernel goes through all sockets of the host: milliseconds
        self._keys = Beside(all_keys) if stopped and self._told is None else None
        if ahead is not None:
            ahead.look()
            self.entries += ahead.views
            self._files += ahead.files

    def __enter__(self) -> FileTable:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The processes that were added."""
        return list(self._pidfds)

    # ---- listing

    def add_process(self, process: Owner) -> dict[int, tuple[int, bool]]:
        """All descriptors of a process; its table, which is empty if a process that was added before has the very same
        (CLONE_FILES). SharedDescriptors if a thread has one of its own."""
        numbers = [] if self.ahead is not None else sorted(int(name) for name in os.listdir(f"/proc/{process.pid}/fd"))
        # the dead have no table, and any two of them would seem to share it
        if (numbers or not self.live) and self._shares_table(process.pid):
            self._pidfd(process.pid)
            return {}
        if self.ahead is not None:
            numbers = self._add_standing(self.ahead, process.pid)
        self._pidfd(process.pid)
        ensure_descriptors(len(self.entries) + len(numbers))
        for number in numbers:
            if self.policy.closes(process.pid, number):
                self.closed.add((process.pid, number))
                continue
            try:
                self.add(process, number)
            except (FileNotFoundError, ProcessLookupError) as error:
                if not self.live:
                    raise FileCaptureFailed(
                        "the descriptor vanished", object=f"pid {process.pid} fd {number}"
                    ) from error
        return self.tables.setdefault(process.pid, {})

    def _add_standing(self, ahead: Ahead, pid: int) -> list[int]:
        """The descriptors that are as they were told ahead; the numbers of the others."""
        try:
            stand = ahead.standing(pid)
        except OSError as error:
            raise FileCaptureFailed(f"its descriptors: {error.strerror}", object=f"pid {pid}") from error
        # another process, captured before, has it as well by now; or has another description of that file
        for inode in stand.inodes.keys() & self._by_socket.keys():
            ahead.leave(stand, stand.inodes.pop(inode))
        for file in stand.files.keys() & self._by_file.keys():
            ahead.leave(stand, stand.files.pop(file))
        self._by_socket.update(stand.inodes)
        self._by_file.update((file, [index]) for file, index in stand.files.items())
        for index in ahead.moved_on.keys() & stand.files.values():
            self._files[index] = moved_on(ahead.files[index], ahead.moved_on[index])
        self.tables.setdefault(pid, {}).update(stand.table)
        return sorted(stand.others)

    def _shares_table(self, pid: int) -> bool:
        """Whether a process that was added before has the same table."""
        for tid in os.listdir(f"/proc/{pid}/task"):
            apart = int(tid) != pid and self._kcmp(pid, int(tid), Kcmp.FILES, 0, 0) != 0
            if apart and procfs.lives(pid, int(tid)):
                raise SharedDescriptors(f"thread {tid} has a descriptor table of its own", object=f"pid {pid}")
        try:
            owner = self._known_tables.first(pid)
        except ProcessLookupError as error:
            raise self._lost(pid, error) from error
        return owner != pid

    def _lost(self, pid: int, error: OSError) -> OSError | FileCaptureFailed:
        """A process has ended: what may be if it runs."""
        return error if self.live else FileCaptureFailed(f"kcmp: {error.strerror}", object=f"pid {pid}")

    def _kcmp(self, pid: int, other: int, type: Kcmp, first: int, second: int) -> int:
        try:
            return abi.kcmp(pid, other, type, first, second)
        except OSError as error:
            if error.errno == errno.ENOSYS:
                raise KernelFeatureMissing("kcmp(2) (CONFIG_KCMP)", object="kernel") from None
            if error.errno in (errno.ESRCH, errno.EBADF) and self.live:
                return 1
            raise FileCaptureFailed(f"kcmp: {error.strerror}", object=f"pid {pid} fd {first}") from error

    def add(self, process: Owner, fd: int) -> int:
        """The index of the open file description behind a descriptor. FileNotFoundError if there is none."""
        pid = process.pid
        magic = f"/proc/{pid}/fd/{fd}"
        link = os.readlink(magic)
        row = self.ahead.epolls.row(pid, fd) if self.ahead is not None and link == EPOLL_LINK else None
        lines, info = parse_info(read_info(pid, fd) if row is None else f"flags:\t0{row.status:o}")
        try:
            flags = int(info["flags"], 8)
            inode = int(link[8:-1]) if link.startswith("socket:[") else 0
        except (KeyError, ValueError):
            raise FileCaptureFailed(f"not understood: {link} {lines}", object=f"pid {pid} fd {fd}") from None
        index = self._by_socket.get(inode, -1) if inode else -1
        if index < 0:
            index = self._describe(pid, fd, magic, link, flags & CAPTURED_FLAGS, lines, info)
            if inode:
                self._by_socket[inode] = index
        self.entries[index].places.append((pid, fd))
        self.tables.setdefault(pid, {})[fd] = place = (index, bool(flags & _CLOEXEC))
        self._told_now.setdefault(pid, {})[fd] = place
        self._note_posix(pid, index, lines)
        return index

    def way(self, pid: int) -> str:
        """As :func:`checkpoint.namespaces.ways.way_of` says when it is first asked for: each file asks."""
        if pid not in self._ways:
            self._ways[pid] = way_of(pid)
        return self._ways[pid]

    def _pidfd(self, pid: int) -> int:
        if pid not in self._pidfds:
            self._pidfds[pid] = os.pidfd_open(pid)
        return self._pidfds[pid]

    def _describe(
        self, pid: int, fd: int, magic: str, link: str, flags: int, lines: tuple[str, ...], info: dict[str, str]
    ) -> int:
        try:
            dup = abi.pidfd_getfd(self._pidfd(pid), fd)
        except OSError as error:
            if error.errno in (errno.EBADF, errno.ESRCH):
                raise FileNotFoundError(error.errno, error.strerror, magic) from None
            raise
        view = FdView(
            pid=pid,
            fd=fd,
            dup=dup,
            magic=magic,
            link=link,
            flags=flags,
            pos=int(info.get("pos", 0)),
            info=info,
            lines=lines,
            stat=os.fstat(dup),
            table=self,
            places=[],
        )
        return self._place(view)

    def _place(self, view: FdView) -> int:
        """The index of an equal entry, else of a new one."""
        if stat.S_ISSOCK(view.stat.st_mode):
            known = self._by_socket.get(view.stat.st_ino)
            if known is not None:
                view.close()
                return known
            self._by_socket[view.stat.st_ino] = len(self.entries)
        else:
            same = self._by_file.setdefault((view.stat.st_dev, view.stat.st_ino, view.link), [])
            # kcmp orders the descriptions: a search by halves, since all eventfds and the like share one inode
            low, high = 0, len(same)
            while low < high:
                middle = (low + high) // 2
                other = self.entries[same[middle]]
                order = self._kcmp(view.pid, other.pid, Kcmp.FILE, view.fd, other.fd)
                if order == 0:
                    view.close()
                    return same[middle]
                low, high = (low, middle) if order == 1 else (middle + 1, high)
            same.insert(low, len(self.entries))
        self._enter(view)
        return len(self.entries) - 1

    def _enter(self, view: FdView) -> None:
        self.entries.append(view)
        if view.access.writes:
            self._written.add((view.stat.st_dev, view.stat.st_ino))

    def add_in_flight(self, fd: int) -> int:
        """The index of a description that a message in a socket's queue carries; ``fd`` is ours, and given up to us."""
        lines, info = parse_info(read_info(os.getpid(), fd))
        flags = int(info["flags"], 8) & CAPTURED_FLAGS
        magic = f"/proc/{os.getpid()}/fd/{fd}"
        view = FdView(
            pid=os.getpid(),
            fd=fd,
            dup=fd,
            magic=magic,
            link=os.readlink(magic),
            flags=flags,
            pos=int(info.get("pos", 0)),
            info=info,
            lines=lines,
            stat=os.fstat(fd),
            table=self,
            places=[],
        )
        return self._place(view)

    def add_mapped(self, process: Owner, vma: Mapping) -> int:
        """The index of the file behind a mapping. Mappings of one file in one way share an entry. UnsupportedMapping
        for what is neither a file nor shared memory."""
        # The parts of a program or library lie side by side: of all but the first nothing is to be asked.
        before = self._last_mapped
        beside = not vma.shared and before is not None and before.continued_by(process.pid, vma)
        index = before.index if before is not None and beside else self._mapped_file(process, vma)
        self._last_mapped = LastMapped(process.pid, vma, index)
        return index

    def _mapped_file(self, process: Owner, vma: Mapping) -> int:
        magic = f"/proc/{process.pid}/map_files/{vma.start:x}-{vma.end:x}"
        link = os.readlink(magic)
        found = os.stat(magic)
        # the permissions of the link say how the file was opened
        writable = vma.shared and bool(os.lstat(magic).st_mode & stat.S_IWUSR)
        key = (found.st_dev, found.st_ino, writable)
        index = self._by_mapping.get(key)
        if index is not None:
            return index
        view = FdView(
            pid=process.pid,
            fd=-1,
            dup=-1,
            magic=magic,
            link=link,
            flags=AccessMode.BOTH if writable else AccessMode.READ,
            pos=0,
            info={},
            lines=(),
            stat=found,
            table=self,
            places=[],
        )
        kind = kind_for(view)
        if not kind.mappable:
            raise UnsupportedMapping(f"mapping of {link} ({kind_name(kind)})", object=view.object)
        kind.examine(view)
        self._enter(view)
        self._by_mapping[key] = len(self.entries) - 1
        return len(self.entries) - 1

    def _note_posix(self, pid: int, index: int, lines: tuple[str, ...]) -> None:
        if not any(line.startswith("lock:") for line in lines):
            return
        view = self.entries[index]
        locks = tuple(lock for kind, lock in locks_of(lines, f"pid {pid}") if kind == "POSIX")
        if not locks:
            return
        held = self._posix.setdefault(pid, {})
        inode = (view.stat.st_dev, view.stat.st_ino)
        # any descriptor of the file shows them; to set a lock again it must be open in the way of the lock
        known = held.get(inode)
        if known is None or (view.access is AccessMode.BOTH and self.entries[known[0]].access is not AccessMode.BOTH):
            held[inode] = (index, locks)

    # ---- asking

    @property
    def later(self) -> list[FdView]:
        """The entries that were not told ahead."""
        return self.entries[self.first :]

    @property
    def masters(self) -> set[int]:
        """The numbers of the pseudo terminals whose masters are among the entries."""
        return {view.number("tty-index") for view in self.later if "tty-index" in view.info}

    def index_of_socket(self, inode: int) -> int | None:
        """The entry of the socket with this inode, if the tree has it and keeps it."""
        index = self._by_socket.get(inode)
        if index is not None and self.policy.external and self.policy.replaces(self.entries[index].places):
            return None
        return index

    def ships(self, view: FdView) -> bool:
        """Whether the bytes of a file travel, since somebody of the tree writes to it and it would stay behind."""
        written = (view.stat.st_dev, view.stat.st_ino) in self._written
        return written and not self.live and self.policy.ship and self.policy.stays_behind(view.link)

    def same_file(self, view: FdView) -> list[FdView]:
        """Every entry of the tree that is the same file (same inode, link), in the order of the entries: the ends of
        a pipe."""
        same = self._by_file.get((view.stat.st_dev, view.stat.st_ino, view.link), [])
        return [self.entries[i] for i in sorted(same)]

    @functools.cached_property
    def unix_sockets(self) -> dict[int, UnixSocket]:
        """The AF_UNIX sockets of this network namespace, as they were when first asked for."""
        return unix_sockets()

    @functools.cached_property
    def signing_keys(self) -> dict[int, tuple[SigningKey, ...]]:
        """The TCP MD5 keys of this network namespace's sockets, by inode, as they were when first asked for."""
        if self._told is not None and self._told.nobody_signs:
            return {}
        return all_keys() if self._keys is None else self._keys.result()

    @functools.cached_property
    def listeners_keys(self) -> dict[int, tuple[SigningKey, ...]]:
        """Those of listeners. The others may still be asked for by somebody else, beside us: this does not wait."""
        return self.signing_keys if self._told is None else listeners_keys()

    def content(self, view: FdView, kind: ContentKind, name: str, huge: int = 0) -> int:
        """The index of the content of a file, recorded when it is first asked for."""
        return self.contents.of(view, kind, name, huge)

    # ---- capturing

    def records(self) -> TreeFiles:
        """Every entry captured (those added since, if it is called again). Entries that come to light meanwhile (in
        flight in messages) are captured as well. The tables are without the descriptors that were told ahead."""
        index = len(self._files)
        while index < len(self.entries):
            view = self.entries[index]
            try:
                self._files.append(kind_for(view).capture(view))
            except OSError as error:
                raise FileCaptureFailed(f"{view.link}: {error}", object=view.object) from error
            index += 1
        return TreeFiles(
            files=list(self._files),
            contents=list(self.contents.records),
            tables=self.tables if self.ahead is None else self._told_now,
            locks=self._posix_locks(),
        )

    def untold(self, files: TreeFiles, staged: dict[int, int]) -> TreeFiles:
        """Of :meth:`records` what was not told ahead; ``staged`` as in TreeFiles."""
        if self.ahead is None:
            return dataclasses.replace(files, staged=staged)
        return dataclasses.replace(
            files,
            files=files.files[self.first :],
            ahead=self.first,
            gone=tuple(self.ahead.gone),
            moved_on=dict(self.ahead.moved_on),
            staged=staged,
        )

    @property
    def fresh(self) -> list[OpenFile]:
        """Of :meth:`records` what was not told ahead."""
        return self._files[self.first :]

    def record(self, index: int) -> OpenFile:
        """The record of an entry, after :meth:`records`."""
        return self._files[index]

    def recapture(self, *, clocks_stand: bool = False) -> dict[int, OpenFile]:
        """The entries that differ from what :meth:`records` told: what changed while the processes rested. Connections
        are not among them (:class:`checkpoint.files.tcp.TcpGroup` brings those).

        clocks_stand  the clocks will go on from the stop, as out of an image file: what only time has changed since
                      has not happened there.  (In a migration they go on from now.)

        flock and OFD locks are given up now, for their new owner; :meth:`go_on` takes them back."""
        changed = {}
        self.late = True
        # what was told ahead has no locks, and connections are told at the end
        later = list(enumerate(self.fresh, self.first))
        for index, old in later:
            kind = type(old)
            if kind.by_clock and clocks_stand:
                continue
            if kind.late is not OpenFile.late and not getattr(kind, "in_group", False):
                new = kind.capture(self.entries[index])
                if new != old:
                    changed[index] = self._files[index] = new
        for index, _ in later:
            for lock in self._files[index].locks:
                locks.release(self.entries[index].dup, lock)
                self._given_up.append((index, lock))
        return changed

    def go_on(self) -> None:
        """The processes go on here: take back what :meth:`recapture` gave up."""
        given_up, self._given_up = self._given_up, []
        for index, lock in given_up:
            if not locks.take(self.entries[index].dup, lock):
                raise LockTaken("another process took a file lock meanwhile", object=self.entries[index].object)

    def _posix_locks(self) -> dict[int, list[LocksOfFile]]:
        return {
            pid: [LocksOfFile(file=index, locks=locks) for index, locks in held.values()]
            for pid, held in self._posix.items()
        }

    def close(self) -> None:
        """Give up all duplicates."""
        if self._keys is not None:
            self._keys.wait()
        segments = {view.stat.st_ino for view in self.entries if view.fd < 0 and kind_for(view) is SysvSegment}
        # the processes were captured to the end, and are gone: what only they had goes with them
        if segments and self.late and not any(map(procfs.lives, self._pidfds)):
            remove_deserted(segments)
        for view in self.entries:
            view.close()
        self.contents.close()
        while self._pidfds:
            os.close(self._pidfds.popitem()[1])
