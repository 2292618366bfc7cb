"""Where the kernel keeps the sockets that this process has open: addresses for :mod:`tcpstate.kernel.bpf.memory`.

A BPF iterator over the open files of one process writes the cookie and the address of every socket that has a cookie.
Nothing is changed.  Attaching to a single process came with Linux 6.1; an older kernel walks all processes.

Source: kernel/bpf/task_iter.c (bpf_iter_task_file), include/uapi/linux/bpf.h (union bpf_iter_link_info).
"""

from __future__ import annotations

import functools
import os
import socket
import struct
from collections.abc import Callable
from typing import Final

from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf, Kind
from tcpstate.kernel.bpf.layout import Layout, layout
from tcpstate.kernel.sockets import SO, Level

__all__ = ["address", "lacking", "of_file", "over_files"]

_RECORD: Final = struct.Struct("=QQ")  # cookie, address
_LINK_INFO: Final = struct.Struct("=III4x")  # thread, process, pidfd
#: members of struct bpf_iter__task_file, the program's context: pointers and a number, laid out by the macro of
#: include/linux/bpf.h (eight bytes each)
_META, _FILE = 0, 24


def of_file(known: Layout) -> Asm:
    """The beginning of a program: register 6 is the iterator's meta, register 7 the struct sock behind a file; "out" if
    it is none."""
    asm = Asm().load(8, 6, 1, _META).load(8, 1, 1, _FILE).jump_if(Jump.EQUAL, 1, 0, "out")
    asm.call(Helper.SOCK_FROM_FILE).jump_if(Jump.EQUAL, 0, 0, "out")
    return asm.load(8, 7, 0, known.offset("socket", "sk")).jump_if(Jump.EQUAL, 7, 0, "out")


def _code(known: Layout) -> bytes:
    start = -_RECORD.size
    asm = of_file(known)
    asm.load(8, 1, 7, known.offset("sock_common", "skc_cookie")).jump_if(Jump.EQUAL, 1, 0, "out")
    asm.store(8, FRAME, start, 1).store(8, FRAME, start + 8, 7)
    asm.load(8, 1, 6, known.offset("bpf_iter_meta", "seq")).frame(2, start).set(3, _RECORD.size)
    return asm.call(Helper.SEQ_WRITE).label("out").exit(0).code()


def lacking(error: Exception) -> KernelFeatureMissing:
    """There is no such iterator here."""
    return KernelFeatureMissing(
        f"no BPF iterator over open files: {error}",
        object="bpf_iter_task_file",
        fix="Run as root (CAP_BPF, CAP_PERFMON) on a kernel with CONFIG_BPF_SYSCALL and CONFIG_DEBUG_INFO_BTF.",
    )


def over_files(code: Callable[[Layout], bytes], name: str) -> int:
    """An iterator's program that is run for each open file. KernelFeatureMissing."""
    known = layout()
    try:
        target = known.id(Kind.FUNCTION, "bpf_iter_task_file")
        return call.load(
            call.ProgramType.TRACING,
            code(known),
            attach=call.Attach.TRACE_ITER,
            target=target,
            name=name,
            gpl=True,
        )
    except (OSError, BadBtf) as error:
        raise lacking(error) from None
    finally:
        known.save()


@functools.cache
def _program() -> int:
    return over_files(_code, "tcpmig_socks")


def address(sock: socket.socket) -> int:
    """Of the struct sock behind a socket of ours. KernelFeatureMissing, OSError."""
    cookie = int.from_bytes(sock.getsockopt(Level.SOCKET, SO.COOKIE, 8), "little")
    made = call.link(_program(), 0, call.Attach.TRACE_ITER, info=_LINK_INFO.pack(0, os.getpid(), 0))
    try:
        found = dict(_RECORD.iter_unpack(call.iterate(made)))
    finally:
        os.close(made)
    if cookie not in found:
        raise KernelFeatureMissing(
            "the iterator over open files does not show this socket", object="bpf_iter_task_file"
        )
    return int(found[cookie])
