"""Giving new processes the descriptors that were told ahead of the stop, and epoll instances what they watch.

As :mod:`checkpoint.files.install` does with all others: pidfd_getfd takes the lowest free number, dup3 moves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from checkpoint.files.abi import EPOLL_CTL_ADD, EpollEvent, Fcntl, FileFlag
from checkpoint.files.descriptors import allow
from checkpoint.files.peercred import Stub
from checkpoint.files.treefiles import AheadFiles
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS

__all__ = ["install_ahead"]


def install_ahead(
    told: AheadFiles, files: Sequence[int], epolls: Sequence[int], stubs: Mapping[int, Stub]
) -> dict[int, Stub]:
    """``files`` and ``epolls`` are our descriptors of what is told (-1: it is not open). The processes that have them
    now; a process that is not there, or has other descriptors than that of us, gets none, and then none does.
    CallError, TooManyDescriptors."""
    wanted: dict[int, list[tuple[int, bool, int]]] = {}
    for (pid, fd, cloexec), ours in (
        *(((p.pid, p.fd, p.cloexec), ours) for p, ours in zip(told.places, files, strict=True) if ours >= 0),
        *(((e.pid, e.fd, e.cloexec), ours) for e, ours in zip(told.epolls, epolls, strict=True)),
    ):
        wanted.setdefault(pid, []).append((fd, cloexec, ours))
    if not wanted.keys() <= stubs.keys():
        return {}
    for pid, descriptors in wanted.items():
        stub, calls = stubs[pid], CallTable()
        tool = max(fd for fd, _, _ in descriptors) + 1
        allow(stub.pid, tool)
        if stub.tool_pidfd != tool:
            calls.call(SYS.dup3, stub.tool_pidfd, tool, FileFlag.CLOEXEC, label="moving our pidfd")
            calls.call(SYS.close, stub.tool_pidfd, label="moving our pidfd")
        taken, lowest = {tool}, 0
        for fd, cloexec, ours in sorted(descriptors):
            while lowest in taken:
                lowest += 1
            got = calls.call(SYS.pidfd_getfd, tool, ours, 0, label=f"taking fd {fd}")
            if lowest != fd:
                calls.call(SYS.dup3, got, fd, FileFlag.CLOEXEC if cloexec else 0, label=f"fd {fd}")
                calls.call(SYS.close, got, label=f"closing after fd {fd}")
            elif not cloexec:
                # what pidfd_getfd returns is close-on-exec
                calls.call(SYS.fcntl, fd, Fcntl.SETFD, 0, label=f"fd {fd}")
            taken.add(fd)
        for epoll in told.epolls:
            for watch in epoll.watches if epoll.pid == pid else ():
                event = calls.put(EpollEvent(events=watch.events, data=watch.data).pack())
                label = f"epoll entry {watch.number}"
                calls.call(SYS.epoll_ctl, epoll.fd, EPOLL_CTL_ADD, watch.number, event, label=label)
        stub.run(calls)
        stub.tool_pidfd = tool
    return {pid: stubs[pid] for pid in wanted}
