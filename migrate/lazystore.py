"""What is known of processes of this host whose pages still come: some files each in ``TCPMIG_RUNTIME_DIR/lazy``, mode
0600, root's.

::

    ID.lazy    LazyRecord; there as long as pages are missing
    ID.pages   how it goes (checkpoint.memory.pagelog)
    ID.sock    where who brings them hears of a line to the host where they are (migrate.pageline)
"""

from __future__ import annotations

import enum
import logging
import re
import time
from pathlib import Path

from checkpoint import procfs
from checkpoint.errors import NoSuchProcess
from checkpoint.memory.pagelog import State, read_progress
from migrate import records
from migrate.errors import PageBringerFailed
from migrate.hostfacts import host_facts
from tcpstate import codec
from tcpstate.errors import BadRecord
from tcpstate.frozen import runtime_dir
from tcpstate.slotted import dataclass

__all__ = ["Lazy", "LazyRecord", "LazyState", "folder", "forget", "pages_path", "remember", "socket_path", "survey"]

_log = logging.getLogger(__name__)

_ID = re.compile(r"[0-9a-f]{32}")
#: what those who bring pages are called
_COMM = "tcpmig-lazy"


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyRecord:
    """Processes whose pages still come.

    lazy           ID, 32 hexadecimal digits
    boot_id, pids  of which boot and PID namespace they are
    since          seconds since the epoch
    source         where the pages come from: a file, or a host
    processes      by their numbers here
    """

    lazy: str
    boot_id: str
    pids: int
    since: float
    source: str
    processes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.lazy):
            raise ValueError("it is named by 32 hexadecimal digits")

    @property
    def here(self) -> bool:
        """Whether it is of this boot and PID namespace."""
        facts = host_facts()
        return (self.boot_id, self.pids) == (facts.boot_id, facts.pids)


class LazyState(enum.Enum):
    """How it goes."""

    COMING = "coming"
    WAITING = "waiting"  # the pages cannot be had at the moment: whoever needs one waits
    DEAD = "dead"  # those who bring them were killed, both at once: pages that had not come are empty
    ELSEWHERE = "elsewhere"  # of another boot or another namespace


@dataclass(frozen=True, slots=True, kw_only=True)
class Lazy:
    """Processes whose pages still come.

    age             seconds
    missing, total  bytes
    faults          how many pages were asked for
    reason          why it waits
    servers         PIDs of those who bring the pages: one works, one stands by
    """

    lazy: str
    state: LazyState
    age: float
    missing: int
    total: int
    faults: int
    source: str
    processes: tuple[int, ...]
    reason: str
    servers: tuple[int, ...]


def folder() -> Path:
    """Where the files are; made if it is not there. PageBringerFailed."""
    return records.private_directory("lazy", "its directory", PageBringerFailed)


def pages_path(lazy: str) -> Path:
    """The file that tells how it goes."""
    return folder() / f"{lazy}.pages"


def socket_path(lazy: str) -> Path:
    """Where who brings the pages listens."""
    return folder() / f"{lazy}.sock"


def remember(lazy: str, source: str, processes: tuple[int, ...]) -> None:
    """Write the record. OSError."""
    facts = host_facts()
    record = LazyRecord(
        lazy=lazy, boot_id=facts.boot_id, pids=facts.pids, since=time.time(), source=source, processes=processes
    )
    records.replace(folder() / f"{lazy}.lazy", codec.pack(record))


def forget(lazy: str) -> None:
    """All pages are there, or nobody needs them."""
    for kind in ("lazy", "pages", "sock", "new"):
        (runtime_dir() / "lazy" / f"{lazy}.{kind}").unlink(missing_ok=True)


def survey() -> list[Lazy]:
    """All there are, oldest first; a damaged record is named in the log."""
    found: list[Lazy] = []
    place = runtime_dir() / "lazy"
    for path in sorted(place.glob("*.lazy")) if place.is_dir() else []:
        try:
            record = codec.unpack(LazyRecord, records.read_own(path))
        except FileNotFoundError:
            continue  # it has just been done
        except BadRecord as error:
            _log.warning("%s: %s", path, error.message)
            continue
        found.append(_describe(record))
    return sorted(found, key=lambda one: -one.age)


def _describe(record: LazyRecord) -> Lazy:
    progress = read_progress(runtime_dir() / "lazy" / f"{record.lazy}.pages")
    servers: tuple[int, ...] = ()
    state = LazyState.ELSEWHERE
    if record.here:
        servers = () if progress is None else tuple(filter(_serves, (progress.worker, progress.guard)))
        state = LazyState.COMING if servers else LazyState.DEAD
        if servers and progress is not None and progress.state is State.WAITING:
            state = LazyState.WAITING
    return Lazy(
        lazy=record.lazy,
        state=state,
        age=round(max(0.0, time.time() - record.since), 3),
        missing=0 if progress is None else progress.missing,
        total=0 if progress is None else progress.total,
        faults=0 if progress is None else progress.faults,
        source=record.source,
        processes=record.processes,
        reason="" if progress is None else progress.reason,
        servers=servers,
    )


def _serves(pid: int) -> bool:
    try:
        stat = procfs.read_stat(pid) if pid else None
    except NoSuchProcess:
        return False
    return stat is not None and stat.comm == _COMM and not stat.zombie
