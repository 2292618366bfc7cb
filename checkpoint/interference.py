"""What in a process would spoil injected system calls: seccomp filters and system call dispatch.

Filters are suspended while we trace (PTRACE_O_SUSPEND_SECCOMP), but that ends with us: should the tool be killed in the
middle, the injected code that makes the process whole again runs under the filter.  So the filters are asked first
what they would say to exactly the calls that this code makes then.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import Final

from checkpoint import procfs
from checkpoint.arch import AUDIT_ARCH
from checkpoint.errors import SeccompInTheWay, SyscallDispatch
from checkpoint.kernel import cbpf, ptrace
from checkpoint.kernel.seccomp import Mode
from checkpoint.thread import Thread
from checkpoint.tracee import Process
from tcpstate.kernel.machine import SYS

__all__ = ["require_no_interference"]

_SIG_SETMASK: Final = 2
_PASSES = frozenset({cbpf.Verdict.ALLOW, cbpf.Verdict.LOG})
# A call that fails with an error leaves something behind (a mapping, a descriptor) but harms nothing; without the old
# signal mask the thread would be damaged.
_FAILS_SAFE = _PASSES | {cbpf.Verdict.ERRNO}
_NEEDED: Final = (
    (SYS.rt_sigprocmask, (_SIG_SETMASK,), _PASSES),
    (SYS.tgkill, (), _FAILS_SAFE),
    (SYS.munmap, (), _FAILS_SAFE),
    (SYS.close, (), _FAILS_SAFE),
)


def require_no_interference(
    process: Process, code: int, callers: Sequence[Thread], *, accept_seccomp_risk: bool
) -> None:
    """Raise SyscallDispatch or SeccompInTheWay if calls from ``code``, an address, could harm the process.

    callers              the threads that make them
    accept_seccomp_risk  go on although the filter would damage the process if the tool were killed in the middle
    """
    asked: set[tuple[bytes, ...]] = set()
    for thread in callers:
        if ptrace.syscall_dispatch_on(thread.tid):
            raise SyscallDispatch("its system calls go to a handler of its own", object=thread.name)
        filters = tuple(_filters(process, thread))
        if not filters or filters in asked:
            continue
        asked.add(filters)
        if not process.seccomp_suspended:
            raise SeccompInTheWay("it has a seccomp filter that we may not suspend", object=thread.name)
        if accept_seccomp_risk:
            continue
        for call, args, harmless in _NEEDED:
            verdict = cbpf.evaluate(filters, cbpf.seccomp_data(call, AUDIT_ARCH, code, args))
            if verdict not in harmless:
                raise SeccompInTheWay(f"its seccomp filter forbids {call.name}", object=thread.name)
    if int(process.status.get("Seccomp", Mode.DISABLED)) == Mode.STRICT and not accept_seccomp_risk:
        raise SeccompInTheWay("it is in seccomp's strict mode", object=f"pid {process.pid}")


def _filters(process: Process, thread: Thread) -> Iterator[bytes]:
    """The programs of all filters of a thread."""
    index = 0
    while True:
        try:
            program = ptrace.seccomp_filter(thread.tid, index)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return  # none, or the kernel has no seccomp
            if error.errno != errno.EACCES:
                raise
            # we may not read filters (no CAP_SYS_ADMIN, or one of our own): is there any?
            if int(procfs.read_status(process.pid, thread.tid).get("Seccomp", Mode.DISABLED)) != Mode.DISABLED:
                raise SeccompInTheWay("it has a seccomp filter that we may not read", object=thread.name) from error
            return
        if program is None:
            return
        yield program
        index += 1
