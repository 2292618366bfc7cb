"""/proc: what the kernel tells of processes without their being stopped.

Every function raises :class:`~checkpoint.errors.NoSuchProcess` if the process has gone, and reads, never writes.

Source: Linux Documentation/filesystems/proc.rst, fs/proc/array.c.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from checkpoint.errors import NoSuchProcess
from tcpstate.slotted import dataclass

__all__ = [
    "ZOMBIE_STATES",
    "FdInfo",
    "Stat",
    "call_of",
    "children",
    "children_of",
    "exists",
    "fdinfo",
    "fds",
    "inner_ids",
    "lives",
    "parents",
    "read_cgroups",
    "read_stat",
    "read_status",
    "read_timers",
    "threads",
    "tree",
    "users_of_number",
]

#: state letters of a task that has exited (Z: not yet waited for, X: going)
ZOMBIE_STATES = frozenset("ZX")
_PF_KTHREAD = 0x00200000  # include/linux/sched.h; field 9 of stat
_PF_EXITING = 0x00000004


def _read(pid: int, name: str) -> str:
    try:
        # unbuffered and decoded here: two thirds of the time of a text file, and this is read for every thread
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
            return file.read().decode("utf-8", "surrogateescape")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchProcess("the process does not exist, or has just ended", object=f"pid {pid}") from error


def _list(pid: int, name: str) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/{name}")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchProcess("the process does not exist, or has just ended", object=f"pid {pid}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """One line of /proc/PID/stat (proc_pid_stat(5)); the numbers behind the names are its fields.

    state        3: one letter: R running, S sleeping, D in the kernel, T stopped by a signal, t by a tracer, Z zombie
    tty          7: device number of the controlling terminal, 0 for none
    tpgid        8: foreground group of that terminal, -1 for none
    flags        9: PF_* of include/linux/sched.h
    start_time   22: clock ticks after boot
    exit_signal  38: what the parent gets at the end
    exit_code    52: wait status of a zombie; 0 if we may not trace it
    others       addresses in its memory
    """

    pid: int
    comm: str
    state: str
    ppid: int
    pgid: int
    sid: int
    tty: int
    tpgid: int
    flags: int
    nice: int
    num_threads: int
    start_time: int
    start_code: int
    end_code: int
    start_stack: int
    exit_signal: int
    rt_priority: int
    policy: int
    start_data: int
    end_data: int
    start_brk: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    exit_code: int

    @property
    def zombie(self) -> bool:
        """Whether it has exited and only waits for its parent to notice."""
        return self.state in ZOMBIE_STATES

    @property
    def kernel_thread(self) -> bool:
        """Whether it is a thread of the kernel: no memory of its own, no way to stop it."""
        return bool(self.flags & _PF_KTHREAD)

    @classmethod
    def parse(cls, text: str) -> Stat:
        """The fields of ``text``. The name may hold blanks and brackets: it ends at the last bracket."""
        first, last = text.index("("), text.rindex(")")
        field = text[last + 2 :].split()

        def number(n: int) -> int:
            return int(field[n - 3])

        return cls(
            pid=int(text[:first]),
            comm=text[first + 1 : last],
            state=field[0],
            ppid=number(4),
            pgid=number(5),
            sid=number(6),
            tty=number(7),
            tpgid=number(8),
            flags=number(9),
            nice=number(19),
            num_threads=number(20),
            start_time=number(22),
            start_code=number(26),
            end_code=number(27),
            start_stack=number(28),
            exit_signal=number(38),
            rt_priority=number(40),
            policy=number(41),
            start_data=number(45),
            end_data=number(46),
            start_brk=number(47),
            arg_start=number(48),
            arg_end=number(49),
            env_start=number(50),
            env_end=number(51),
            exit_code=number(52),
        )


def read_stat(pid: int, tid: int | None = None) -> Stat:
    """/proc/PID/stat, or that of one thread."""
    return Stat.parse(_read(pid, "stat" if tid is None else f"task/{tid}/stat"))


def read_status(pid: int, tid: int | None = None) -> dict[str, str]:
    """/proc/PID/status by line name, or that of one thread; values stripped."""
    text = _read(pid, "status" if tid is None else f"task/{tid}/status")
    return {name: value.strip() for name, colon, value in (line.partition(":") for line in text.split("\n")) if colon}


def exists(pid: int) -> bool:
    """Whether the number names a process (a zombie counts, a mere thread does not)."""
    try:
        return int(read_status(pid)["Tgid"]) == pid
    except NoSuchProcess:
        return False


def lives(pid: int, tid: int | None = None) -> bool:
    """Whether the process, or one of its threads, is there and not about to end: it then still has its memory, files
    and namespaces."""
    try:
        stat = read_stat(pid, tid)
    except NoSuchProcess:
        return False
    # set before the first of them is given up (do_exit, kernel/exit.c), the state Z only after the last
    return not stat.zombie and not stat.flags & _PF_EXITING


def inner_ids(pid: int, tid: int | None = None) -> tuple[int, int, int]:
    """(number, process group, session) as the process itself sees them: in the innermost PID namespace it is in."""
    status = read_status(pid, tid)
    number, pgid, sid = (int(status[name].split()[-1]) for name in ("NSpid", "NSpgid", "NSsid"))
    return number, pgid, sid


def threads(pid: int) -> list[int]:
    """The thread IDs of a process, its leader first, then ascending (age, as long as the numbers have not wrapped)."""
    return sorted((int(name) for name in _list(pid, "task")), key=lambda tid: (tid != pid, tid))


def exists_in(pid: int, tid: int) -> bool:
    """Whether the process has this thread."""
    return os.path.exists(f"/proc/{pid}/task/{tid}")


def children(pid: int) -> list[int]:
    """The children of all threads of a process, zombies too (CONFIG_PROC_CHILDREN). Exact only while it is stopped."""
    return [child for tid in threads(pid) for child in children_of(pid, tid)]


def children_of(pid: int, tid: int) -> list[int]:
    """Those of one thread, nobody's if it has just ended: its children have another parent then."""
    try:
        return list(map(int, _read(pid, f"task/{tid}/children").split()))
    except NoSuchProcess:
        return []


def tree(pid: int) -> list[int]:
    """``pid`` and all that descend from it, parents before children. Exact only while all of them are stopped."""
    found = [pid]
    for each in found:  # grows while it is walked
        try:
            found += [child for child in children(each) if child not in found]
        except NoSuchProcess:
            if each == pid:
                raise
    return found


def parents(pid: int) -> list[int]:
    """The parent, its parent, ... up to the init of this PID namespace."""
    found = []
    while (pid := read_stat(pid).ppid) > 0:
        found.append(pid)
    return found


@dataclass(frozen=True, slots=True)
class FdInfo:
    """/proc/PID/fdinfo/FD: (name, value) of each line; some names come several times (``tfd``, ``lock``, ``inotify``).

    ``info["pos"]`` is the first value of that name (KeyError if none); values are stripped text.
    """

    lines: Sequence[tuple[str, str]]

    def __getitem__(self, name: str) -> str:
        for each, value in self.lines:
            if each == name:
                return value
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return any(each == name for each, _ in self.lines)

    def get(self, name: str, default: str | None = None) -> str | None:
        """The first value of that name, or ``default``."""
        return next(self.all(name), default)

    def all(self, name: str) -> Iterator[str]:
        """Every value of that name, in order."""
        return (value for each, value in self.lines if each == name)

    @property
    def pos(self) -> int:
        """The file offset."""
        return int(self["pos"])

    @property
    def flags(self) -> int:
        """The open file status flags, with O_CLOEXEC if this descriptor closes on exec."""
        return int(self["flags"], 8)


def fdinfo(pid: int, fd: int) -> FdInfo:
    """What the kernel tells of one descriptor. NoSuchProcess also if the descriptor is not open."""
    lines = []
    for line in _read(pid, f"fdinfo/{fd}").split("\n"):
        name, _, value = line.partition(":")
        # inotify and fanotify lines have blanks instead of a colon after their first word
        if " " in name:
            name, _, value = line.partition(" ")
        if name:
            lines.append((name.strip(), value.strip()))
    return FdInfo(tuple(lines))


def fds(pid: int) -> list[int]:
    """The numbers of the open descriptors, ascending."""
    return sorted(map(int, _list(pid, "fd")))


def read_cgroups(pid: int) -> list[str]:
    """The lines of /proc/PID/cgroup: hierarchy, controllers, path; with colons between."""
    return _read(pid, "cgroup").splitlines()


def read_timers(pid: int) -> str:
    """/proc/PID/timers: the POSIX timers as text (CONFIG_CHECKPOINT_RESTORE)."""
    return _read(pid, "timers")


def call_of(pid: int, tid: int) -> tuple[int, int] | None:
    """The number of the system call that a thread waits in, and the instruction after it; None if it runs, or we may
    not know."""
    try:
        words = _read(pid, f"task/{tid}/syscall").split()
    except (NoSuchProcess, OSError):
        return None  # it has ended, or is not ours to look at: stopping it will tell
    return (int(words[0]), int(words[-1], 16)) if words and words[0].isdigit() else None


def users_of_number(number: int) -> list[str]:
    """Who uses ``number`` in this PID namespace, in words: as a process, a thread, a process group, a session.

    A number cannot be given to a new process as long as anyone uses it in any of these ways (kernel/pid.c).
    """
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            stat = read_stat(pid)
            if number == pid:
                found.append(f"process {pid} ({stat.comm}{', a zombie' if stat.zombie else ''})")
            elif number in threads(pid):
                found.append(f"a thread of process {pid} ({stat.comm})")
            elif number in (stat.pgid, stat.sid):
                what = "session" if number == stat.sid else "process group"
                found.append(f"the {what} of process {pid} ({stat.comm}{', a zombie' if stat.zombie else ''})")
        except NoSuchProcess:
            continue
    return found
