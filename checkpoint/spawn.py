"""The processes that rebuilt ones start as. (First version: the interface.)"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from checkpoint.inject import Injection
from checkpoint.tracee import Process
from tcpstate.kernel.calls import CallTable

__all__ = ["Stub", "spawn_stub"]


class Stub(Process):
    """A process of ours, stopped, that will become a rebuilt one; killed if the tool dies until `survive_tool`.

    injection    open: `run` works at once
    tool_pidfd   number of a descriptor *in the stub* that is a pidfd of the tool: pidfd_getfd(tool_pidfd, fd) takes fd.
                 The only descriptor of the stub.
    window       (start, end): address space that is ours, free in all images; leave its mappings alone
    parking      (start, end): the part of the window where the vdso may wait for its place
    """

    injection: Injection
    tool_pidfd: int
    window: tuple[int, int]
    parking: tuple[int, int]

    def run(self, table: CallTable, tid: int | None = None) -> None: ...
    def run_all(self, tables: Mapping[int, CallTable]) -> None: ...
    def fork(self, pid: int | None, flags: int = 0) -> Stub: ...
    def clone_threads(self, tids: Sequence[int]) -> None: ...  # appended to `threads`
    def leave(self) -> None: ...  # unmaps the whole window; then set registers, mask, XSAVE area by Thread
    def survive_tool(self) -> None: ...
    def release(self) -> None: ...  # detach all threads
    def reap(self) -> int: ...  # after exit_group in a table or kill: the wait status


def spawn_stub(pid: int | None, avoid: Iterable[tuple[int, int]]) -> Stub: ...
