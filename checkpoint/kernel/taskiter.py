"""BPF iterators over tasks and their mappings, attached to one thread: what the kernel keeps, and no interface of its
own tells, or only slowly.

Nothing is changed.  Attaching to a single thread came with Linux 6.1.

Source: kernel/bpf/task_iter.c, include/uapi/linux/bpf.h (union bpf_iter_link_info).
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable
from typing import Final

from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.btf import BadBtf, Kind
from tcpstate.kernel.bpf.layout import Layout, layout

__all__ = [
    "FILES",
    "LINK_INFO",
    "MAPPINGS",
    "META",
    "TASK",
    "TASKS",
    "VMA",
    "lent",
    "load",
    "read",
    "read_process",
    "wanted",
]

_log = logging.getLogger(__name__)

#: members of struct bpf_iter__task and bpf_iter__task_vma, the program's context: pointers, laid out by the macro of
#: include/linux/bpf.h
META, TASK, VMA = 0, 8, 16
#: what is walked over: tasks, the mappings of their memory, or their open files
TASKS, MAPPINGS, FILES = "bpf_iter_task", "bpf_iter_task_vma", "bpf_iter_task_file"
Again = Callable[[bytes, bytes], bool]
LINK_INFO: Final = struct.Struct("=III4x")  # tid, pid, pid_fd


def load(known: Layout, code: bytes, name: str, over: str = TASKS) -> int:
    """A descriptor of the program. OSError, BadBtf."""
    return call.load(
        call.ProgramType.TRACING,
        code,
        attach=call.Attach.TRACE_ITER,
        target=known.id(Kind.FUNCTION, over),
        name=name,
        gpl=True,
    )


def wanted(build: Callable[[Layout], bytes], name: str, lacking: str) -> int:
    """The program over open files that ``build`` makes, loaded. KernelFeatureMissing: ``lacking``."""
    known = layout()
    try:
        return load(known, build(known), name, FILES)
    except (OSError, BadBtf) as error:
        raise KernelFeatureMissing(
            f"{lacking}: {error}",
            object=FILES,
            fix="Run as root (CAP_BPF, CAP_PERFMON) on a kernel from 6.12 on with CONFIG_DEBUG_INFO_BTF.",
        ) from None
    finally:
        known.save()


def lent(build: Callable[[Layout], bytes], name: str, lacking: str, over: str = TASKS) -> int | None:
    """The program that ``build`` makes, loaded; None where the kernel does not lend it: ``lacking`` is logged then."""
    known = layout()
    try:
        return load(known, build(known), name, over)
    except (OSError, BadBtf) as error:
        _log.info("%s: %s", lacking, error)
        return None
    finally:
        known.save()


def read(program: int, tid: int, again: Again | None = None) -> bytes:
    """What the program writes of a thread; nothing of one that has ended. ``again`` as :func:`call.iterate` wants it.
    OSError."""
    return _read(program, LINK_INFO.pack(tid, 0, 0), again)


def read_process(program: int, pid: int) -> bytes:
    """What the program writes of all threads of a process. OSError."""
    return _read(program, LINK_INFO.pack(0, pid, 0))


def _read(program: int, of: bytes, again: Again | None = None) -> bytes:
    link = call.link(program, 0, call.Attach.TRACE_ITER, info=of)
    try:
        return call.iterate(link, again)
    finally:
        os.close(link)
