"""A process of our own taken apart and put together again, so that the code of the stop has been run once before it.

What a first run costs (caches, tables, code that the processor has not seen) is some milliseconds on either side, which
would otherwise be spent while processes stand still.  The process is a stub, and so is its copy: neither ever runs,
both die with us.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterable, Iterator

from checkpoint.files.install import install
from checkpoint.files.rebuild import Rebuilder
from checkpoint.files.table import FileTable, TreeFiles
from checkpoint.image.format import FrameReader, FrameWriter
from checkpoint.image.frames import Frame, Kind
from checkpoint.memory import layout, pages
from checkpoint.memory.layout import MemoryLayout
from checkpoint.memory.pages import PageWriter
from checkpoint.memory.vmflags import foresee
from checkpoint.records import ProcessRecord, StatesRecord, TreeRecord
from checkpoint.spawn import Stub, spawn_stub
from checkpoint.state import table
from checkpoint.tree import Task, plan
from tcpstate.errors import TcpmigError
from tcpstate.kernel.calls import CallTable

__all__ = ["rehearse"]

_log = logging.getLogger(__name__)

#: threads of the stub besides its first
_THREADS = 2


def rehearse(*, built: bool = True) -> None:
    """Do it; ``built``: also what is only done where processes are put together. It is no check: where it cannot be
    done, the real thing says so itself."""
    try:
        image = _taken_apart()
        if built:
            _put_together(*image)
    except (TcpmigError, OSError) as error:
        _log.debug("no rehearsal with a process: %s", error)


@contextlib.contextmanager
def _stub(avoid: Iterable[tuple[int, int]]) -> Iterator[Stub]:
    stub = spawn_stub(None, avoid)
    try:
        yield stub
    finally:
        stub.kill()


def _taken_apart() -> list[Frame]:
    """The image of a stub, but for its descriptor, which is a pidfd of ours."""
    with _stub(()) as stub, FileTable() as files:
        stub.foreseen = foresee(stub.pid)
        stub.forget_maps()
        stub.clone_threads([None] * _THREADS)
        calls = CallTable()
        brk = layout.query_brk(calls)
        state = table.capture(stub, stub.injection, calls)
        memory = layout.capture(stub, files, brk=brk.value, ours=stub.injection.ranges)
        stat = stub.stat
        task = Task(pid=stub.pid, ppid=stat.ppid, pgid=stat.pgid, sid=stat.sid)
        plan([task])
        record = ProcessRecord(task=task, comm=stat.comm, exit_signal=signal.SIGCHLD)
        records: list[tuple[Kind, object]] = [
            (Kind.TREE, TreeRecord(processes=(record,))),
            (Kind.FILES, files.records()),
            (Kind.MAPPINGS, memory),
            (Kind.STATES, StatesRecord(states=(state,), clocks=state.clocks)),
        ]
        writer, reader = FrameWriter(stream=True), FrameReader(stream=True)
        found = reader.feed(b"".join(writer.begin()))
        for kind, value in records:
            found += reader.feed(b"".join(writer.frame(kind, value)))
        for run in pages.read(stub, memory):
            found += reader.feed(b"".join(writer.pages(run)))
        return found


def _put_together(tree: Frame, files: Frame, mappings: Frame, states: Frame, *content: Frame) -> None:
    """Another stub becomes what the image tells of, up to the moment before it would run."""
    (record,) = tree.decode(TreeRecord).living
    memory = mappings.decode(MemoryLayout)
    rebuilder = Rebuilder(files.decode(TreeFiles), warn=_log.debug)
    try:
        with _stub((m.start, m.end) for m in memory.mappings) as stub:
            rebuilder.rebuild()
            calls = CallTable()
            layout.rebuild(memory, stub, calls, rebuilder.descriptor)
            stub.run(calls)
            stub.forget_maps()
            install(rebuilder, record.task.pid, stub)
            writer = PageWriter(stub, memory)
            for frame in content:
                writer.write(frame.pages())
                frame.release()
            (state,) = states.decode(StatesRecord).states
            table.build(stub, state, warn=_log.debug)
            stub.leave()
            table.install(stub, state)
    finally:
        rebuilder.abort()
