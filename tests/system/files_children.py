"""Processes for the tests of open files: one that sets files up, one that is given rebuilt ones.

Both are forked from the test and have no descriptor in common with it: orders go through shared memory. Code that is
run in them sees ``keep`` (a dict that travels from the process that set up to the one that checks).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from checkpoint.files.install import install
from checkpoint.files.rebuild import Rebuilder
from checkpoint.files.table import FileTable, TreeFiles
from checkpoint.files.tcp import TcpGroup
from checkpoint.records import FilesDelta
from tcpstate import codec
from tcpstate.kernel import batch
from tcpstate.kernel.calls import CallTable

_IMPORTS = "import array, ctypes, errno, fcntl, mmap, os, select, signal, socket, stat, struct, time"
_SIZE = 64 << 20
_HEAD = 16  # two words: number of the last order, length of what stands behind
_TIMEOUT = 20.0


class Child:
    """A forked process that runs what it is told. ``tool_pidfd``: as a stub has it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SIZE)
        self._words = memoryview(self._memory)[:_HEAD].cast("Q")
        self._order = 0
        self.tool_pidfd = os.pidfd_open(os.getpid())
        self.users = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._serve()
            finally:
                os._exit(1)

    # ---- in the child

    def _serve(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        seen = 0
        space: dict[str, Any] = {"keep": {}}
        exec(_IMPORTS, space)
        while True:
            order = self._words[0]
            if order == seen:
                if os.getppid() == 1:
                    os._exit(0)
                time.sleep(0.0005)
                continue
            seen = order
            try:
                what, value = self._read()
                if what == "table":
                    batch.run(value)
                    answer: tuple[bool, Any] = (True, value)
                else:
                    code, keep = value
                    if keep is not None:
                        space["keep"] = keep
                    exec(compile(code, "<child>", "exec"), space)  # our own test's code
                    answer = (True, space["keep"])
            except BaseException:
                answer = (False, traceback.format_exc())
            seen += 1
            self._write(seen, answer)

    def _write(self, order: int, value: Any) -> None:
        data = pickle.dumps(value)
        self._memory[_HEAD : _HEAD + len(data)] = data
        self._words[1] = len(data)
        self._words[0] = order  # in one store, and last: the other side looks at it all the time

    def _read(self) -> Any:
        return pickle.loads(self._memory[_HEAD : _HEAD + self._words[1]])

    # ---- in the test

    def _ask(self, value: Any) -> Any:
        self._order += 1
        self._write(self._order, value)
        end = time.monotonic() + _TIMEOUT
        while self._words[0] != self._order + 1:
            assert time.monotonic() < end, "the child does not answer"
            time.sleep(0.0005)
        self._order += 1
        good, answer = self._read()
        assert good, answer
        return answer

    def do(self, code: str, keep: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run code in the child; its ``keep``."""
        return self._ask(("code", (code, keep)))

    def run(self, table: CallTable) -> None:
        """Run a table of system calls in the child, as a stub does."""
        done = self._ask(("table", table))
        table._results, table._data = done._results, done._data

    def bare(self) -> None:
        """Rid it of every descriptor; 0, 1 and 2 are /dev/null."""
        self.do("import os; os.closerange(0, 4096); [os.open('/dev/null', os.O_RDWR) for _ in range(3)]")

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def end(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self.tool_pidfd)
            self.pid = 0


@contextlib.contextmanager
def children(count: int = 2) -> Iterator[list[Child]]:
    made = [Child() for _ in range(count)]
    try:
        yield made
    finally:
        for child in made:
            child.end()


@dataclass
class Outcome:
    """What a round trip brought."""

    records: TreeFiles
    again: TreeFiles
    keep: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def capture(*pids: int) -> tuple[FileTable, TreeFiles]:
    """The open files of stopped processes, after a journey through the codec."""
    table = FileTable()
    try:
        for pid in pids:
            table.add_process(_Pid(pid))
        return table, codec.unpack(TreeFiles, codec.pack(table.records()))
    except BaseException:
        table.close()
        raise


@dataclass(frozen=True)
class _Pid:
    pid: int


def round_trip(
    setup: str,
    check: str,
    *,
    kill_first: bool = True,
    between: Callable[[TreeFiles], None] | None = None,
    network: bool = False,
    enter: str = "",
) -> Outcome:
    """Set up in one process, capture it, rebuild, install in another, capture that, and run ``check`` in it."""
    with children() as (source, target):
        source.bare()
        keep = source.do(setup)
        source.stop()
        table, records = capture(source.pid)
        with table:
            group = TcpGroup(table)
            if network:
                group.freeze()
                group.export()
            delta = {**table.recapture(), **group.records()}
            bytes_of = [
                [(run, table.contents.read(i, *run)) for run in table.contents.runs(i)]
                for i in range(len(table.contents))
            ]
            if network:
                group.discard()
        if kill_first:
            source.end()
        if between is not None:
            between(records)
        warnings: list[str] = []
        rebuilder = Rebuilder(records, warn=warnings.append)
        try:
            rebuilder.rebuild()
            pid = next(iter(records.tables))
            install(rebuilder, pid, target)
            for index, runs in enumerate(bytes_of):
                for run, data in runs:
                    rebuilder.write_content(index, [run], data)
            rebuilder.take(codec.unpack(FilesDelta, codec.pack(FilesDelta(files=delta))).files)
            rebuilder.complete(elapsed=0.1)
            assert rebuilder.compare() == []
            rebuilder.release()
        except BaseException:
            rebuilder.abort()
            raise
        rebuilder.close()
        if enter:
            target.do(f"os.chdir({enter!r})")
        target.stop()
        table, again = capture(target.pid)
        table.close()
        os.kill(target.pid, signal.SIGCONT)
        target.do(check, keep)
        return Outcome(records, again, keep, warnings)
